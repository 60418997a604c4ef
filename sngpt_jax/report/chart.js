// Charts of lines over steps: axes, crosshair, zoom. They share one `view`; `view.changed()` draws all of them anew.

const view = {axis: "step", from: null, to: null, cursor: null, told: null, charts: []};
const MARGIN = {left: 54, right: 10, top: 8, bottom: 22};

/** A number to read: five digits, thousands separated. */
function figure(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  if (size >= 1e5 || (size >= 1000 && Number.isInteger(x))) return integer(Math.round(x));
  if (size !== 0 && size < 1e-3) return x.toExponential(3);
  return String(Number(x.toPrecision(5)));
}

/** The same on an axis, as short as it can be. */
function short(x) {
  const size = Math.abs(x);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (size >= unit) return `${Number((x / unit).toPrecision(4))}${letter}`;
  return size !== 0 && size < 1e-3 ? x.toExponential(1).replace(".0e", "e") : String(Number(x.toPrecision(4)));
}

function clock(seconds) {
  const s = Math.round(seconds), two = (n) => String(n).padStart(2, "0");
  if (s < 60) return `${Number(seconds.toPrecision(3))} s`;
  return s < 3600 ? `${Math.floor(s / 60)}m${two(s % 60)}s` : `${Math.floor(s / 3600)}h${two(Math.floor(s / 60) % 60)}m`;
}

const place = (x) => view.axis === "time" ? clock(x) : view.axis === "tokens" ? `${figure(x)} tokens` : `step ${figure(x)}`;

/** Round numbers from `low` to `high`, about `count` of them; powers and their halves on a logarithmic axis. */
function ticks(low, high, count, log, clockwise) {
  if (log) {
    const found = [], decades = Math.log10(high / low), factors = decades > 3 ? [1] : decades > 1 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) for (const f of factors) found.push(f * 10 ** e);
    const inside = found.filter((x) => x >= low && x <= high);
    return inside.length > 1 ? inside : ticks(low, high, count, false);
  }
  const span = (high - low) / count, base = 10 ** Math.floor(Math.log10(span));
  let step = [1, 2, 2.5, 5, 10].map((f) => f * base).find((x) => x >= span);
  if (clockwise && span > 10) step = [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400].find((x) => x >= span) ?? Math.ceil(span / 86400) * 86400;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

/** The place in ascending `x` of the value nearest to `at` whose `y` is a number, -1 where there is none. */
function nearest(x, y, at) {
  let low = 0, high = x.length;
  while (low < high) { const middle = (low + high) >> 1; x[middle] < at ? low = middle + 1 : high = middle; }
  let left = low - 1, right = low;
  while (left >= 0 && y[left] === null) left--;
  while (right < x.length && y[right] === null) right++;
  if (left < 0) return right < x.length ? right : -1;
  return right >= x.length || at - x[left] <= x[right] - at ? left : right;
}

class Chart {
  /** `spec`: title, unit, spiky, height; lines() gives those to be drawn now, {name, color, dash, x, y, …}:
      width, opacity, dots; sd, of a band around y; tip: its value is shown at the crosshair. */
  constructor(spec) {
    this.spec = spec;
    this.log = this.all = false;
    this.height = spec.height ?? 230;
    this.plot = el("div", {class: "plot", style: `min-height: ${this.height}px`});
    this.tools = el("span", {class: "tools"});
    this.node = el("div", {class: "card chart", "data-chart": spec.id},
      el("div", {class: "head"}, el("h3", {}, spec.title), el("span", {class: "soft small"}, spec.unit), this.tools), this.plot);
    this.tool("log", "log", "logarithmic axis");
    if (spec.spiky) this.tool("all", "outliers", "show the few largest and smallest values too");
    view.charts.push(this);
  }

  tool(field, text, title) {
    const button = el("button", {type: "button", "aria-pressed": "false", title}, text);
    button.addEventListener("click", () => {
      this[field] = !this[field];
      button.setAttribute("aria-pressed", this[field]);
      this.draw();
    });
    this.tools.append(button);
  }

  /** The values to be seen, the axis' margin included; of spiky ones those within four quartiles' distances of the quartiles. */
  range(lines, from, to) {
    const values = [];
    for (const {x, y, sd} of lines) for (let i = 0; i < x.length; i++) {
      if (y[i] === null || x[i] < from || x[i] > to || (this.log && y[i] <= 0)) continue;
      values.push(y[i]);
      if (sd && !(this.log && y[i] <= sd[i])) values.push(y[i] - sd[i], y[i] + sd[i]);
    }
    if (!values.length) return null;
    values.sort((a, b) => a - b);
    let low = values[0], high = values.at(-1);
    if (this.spec.spiky && !this.all && values.length >= 20) {
      const quarter = (i) => values[Math.floor(i * values.length / 4)], reach = 4 * (quarter(3) - quarter(1));
      if (reach > 0) [low, high] = [Math.max(low, quarter(1) - reach), Math.min(high, quarter(3) + reach)];
    }
    if (this.log) { const pad = (high / low) ** 0.05; return low === high ? [low / 2, high * 2] : [low / pad, high * pad]; }
    const signed = lines.some(({y}) => y.some((value) => value < 0));
    if (!signed) low = Math.max(low, 0);  // a band may reach below what there can be
    const pad = low === high ? Math.abs(low) * 0.1 || 1 : 0.05 * (high - low);
    return [signed ? low - pad : Math.max(low - pad, 0), high + pad];
  }

  draw() {
    const width = this.plot.clientWidth, {height} = this;
    if (!width) return;
    this.lines = this.spec.lines();
    const [from, to] = [view.from ?? view.first, view.to ?? view.last];
    const inner = {width: Math.max(width - MARGIN.left - MARGIN.right, 10), height: height - MARGIN.top - MARGIN.bottom};
    let range = this.range(this.lines, from, to);
    if (!range && this.log) { this.log = false; range = this.range(this.lines, from, to); }
    const [low, high] = range ?? [0, 1], scale = this.log ? Math.log : (y) => y;
    this.toX = (x) => (x - from) / (to - from) * inner.width;
    this.toStep = (pixel) => from + (pixel - MARGIN.left) / inner.width * (to - from);
    this.toY = (y) => inner.height * (1 - (scale(y) - scale(low)) / (scale(high) - scale(low)));
    const svg = el("svg", {width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": this.spec.title});
    for (const y of range ? ticks(low, high, Math.max(inner.height / 45, 2), this.log) : []) {
      const at = MARGIN.top + this.toY(y);
      svg.append(el("line", {class: "gridline", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at}),
        el("text", {x: MARGIN.left - 6, y: at + 4, "text-anchor": "end"}, short(y)));
    }
    for (const x of ticks(from, to, Math.max(inner.width / 90, 2), false, view.axis === "time")) {
      svg.append(el("text", {x: MARGIN.left + this.toX(x), y: height - 6, "text-anchor": "middle"}, view.axis === "time" ? clock(x) : short(x)));
    }
    const area = el("g", {transform: "translate(4 4)"});  // clipped four pixels outside of the axes, so that dots stay whole
    for (const line of this.lines) this.drawLine(area, line);
    this.cursor = el("g");
    this.box = el("rect", {class: "zoom", y: 0, height: inner.height, width: 0});
    area.append(this.box, this.cursor);
    svg.append(el("svg", {x: MARGIN.left - 4, y: MARGIN.top - 4, width: inner.width + 8, height: inner.height + 8, overflow: "hidden"}, area));
    if (!range) svg.append(el("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "nothing to draw here"));
    this.tip = el("div", {class: "tip", hidden: ""});
    this.plot.replaceChildren(svg, this.tip);
    this.listen(svg);
    if (view.cursor !== null) this.point(view.told === this.spec.id);
  }

  drawLine(area, {x, y, sd, color, dash, width = 1.6, opacity = 1, dots}) {
    const style = `--color: var(${color}); stroke-width: ${width}px; opacity: ${opacity}`;
    const usable = (i) => y[i] !== null && (!this.log || y[i] > 0);
    if (sd) {
      const there = x.map((_, i) => i).filter(usable);
      const edge = (i, sign) => `${this.toX(x[i]).toFixed(1)} ${this.toY(this.log ? Math.max(y[i] + sign * sd[i], y[i] * 1e-3) : y[i] + sign * sd[i]).toFixed(1)}`;
      if (there.length) area.append(el("path", {class: "band", style: `--color: var(${color})`, d: `M${[...there.map((i) => edge(i, 1)), ...there.reverse().map((i) => edge(i, -1))].join("L")}Z`}));
    }
    let d = "", pen = false;
    const points = [];
    for (let i = 0; i < x.length; i++) {
      if (!usable(i)) { pen = false; continue; }
      const at = `${this.toX(x[i]).toFixed(1)} ${this.toY(y[i]).toFixed(1)}`;
      d += (pen ? "L" : "M") + at;
      const alone = !pen && (i + 1 === x.length || !usable(i + 1));
      if (dots || alone) points.push(at.split(" "));
      pen = true;
    }
    if (d) area.append(el("path", {class: `curve${dash ? ` dash${dash}` : ""}`, style, d}));
    for (const [cx, cy] of points) area.append(el("circle", {class: "dot", style: `--color: var(${color}); opacity: ${opacity}`, cx, cy, r: 2.4}));
  }

  // ---------------------------------------------------------------- crosshair and zoom

  listen(svg) {
    const pixel = (event) => event.clientX - svg.getBoundingClientRect().left;
    let start = null;
    const drop = () => { start = null; this.box.setAttribute("width", 0); };
    svg.addEventListener("pointermove", (event) => {
      this.moveTo(this.toStep(pixel(event)));
      if (start === null) return;
      const [a, b] = [start, pixel(event)].sort((p, q) => p - q);
      this.box.setAttribute("x", a - MARGIN.left);
      this.box.setAttribute("width", b - a);
    });
    svg.addEventListener("pointerdown", (event) => {
      this.moveTo(this.toStep(pixel(event)));
      if (event.pointerType !== "mouse" || event.button !== 0) return;
      start = pixel(event);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointerup", (event) => {
      const [a, b] = [start ?? 0, pixel(event)].sort((p, q) => p - q).map((p) => this.toStep(p));
      const moved = start !== null && Math.abs(pixel(event) - start) > 8;
      drop();
      if (moved) view.zoom(Math.max(a, view.from ?? view.first), Math.min(b, view.to ?? view.last));
    });
    svg.addEventListener("pointercancel", drop);
    svg.addEventListener("dblclick", () => view.zoom(null, null));
    svg.addEventListener("pointerleave", () => { if (start === null) this.moveTo(null); });
    svg.addEventListener("blur", () => this.moveTo(null));
    svg.addEventListener("keydown", (event) => {
      const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!by) return;
      event.preventDefault();
      const [from, to] = [view.from ?? view.first, view.to ?? view.last];
      this.moveTo(Math.min(Math.max((view.cursor ?? (from + to) / 2) + by * (to - from) / 100, from), to), false);
    });
  }

  /** The crosshair at the point nearest to `x`, in all charts; null: nowhere. */
  moveTo(x, snap = true) {
    if (x !== null && snap) {
      let best = null;
      for (const line of this.lines ?? []) {
        const i = line.tip ? nearest(line.x, line.y, x) : -1;
        if (i >= 0 && (best === null || Math.abs(line.x[i] - x) < Math.abs(best - x))) best = line.x[i];
      }
      x = best ?? x;
    }
    [view.cursor, view.told] = [x, this.spec.id];
    for (const chart of view.charts) chart.point(chart === this);
  }

  point(tell = false) {
    if (!this.cursor) return;
    this.cursor.replaceChildren();
    this.tip.hidden = true;
    if (view.cursor === null) return;
    const at = this.toX(view.cursor), near = Math.abs(this.toStep(4) - this.toStep(0)), table = el("table");
    this.cursor.append(el("line", {class: "cursor", x1: at, x2: at, y1: 0, y2: this.height}));
    for (const line of this.lines.filter((one) => one.tip)) {
      const i = nearest(line.x, line.y, view.cursor);
      const off = i < 0 ? 0 : Math.abs(line.x[i] - view.cursor);
      if (i < 0 || ((view.cursor < line.x[0] || view.cursor > line.x.at(-1)) && off > near)) continue;
      if (!this.log || line.y[i] > 0) this.cursor.append(el("circle", {class: "dot", style: `--color: var(${line.color})`, cx: this.toX(line.x[i]), cy: this.toY(line.y[i]), r: 3.2}));
      const j = line.mean ? nearest(line.mean.x, line.mean.y, view.cursor) : -1;
      const beside = [line.sd ? `± ${figure(line.sd[i])}` : "", j >= 0 ? `mean ${figure(line.mean.y[j])}` : "", off > near ? `at ${place(line.x[i])}` : ""];
      table.append(row("td", swatch(line), line.name, number(figure(line.y[i])), el("td", {class: "soft"}, beside.filter(Boolean).join(", "))));
    }
    if (!tell) return;
    this.tip.replaceChildren(el("div", {class: "soft"}, place(view.cursor)), table);
    this.tip.hidden = false;
    const left = MARGIN.left + at, room = this.plot.clientWidth, own = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, left + 14 + own <= room ? left + 14 : left - 14 - own >= 0 ? left - 14 - own : room - own)}px`;
  }
}

const swatch = ({color, dash}) => el("span", {class: `swatch${dash ? ` dash${dash}` : ""}`, style: `--color: var(${color})`});
