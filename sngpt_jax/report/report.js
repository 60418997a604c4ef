let report = data;
const hidden = new Set();  // names of runs whose curves are not drawn
let layer = "";  // of the sparse codes; "": the mean over layers

const colorOf = (group) => ({color: `--c${group % 8}`, dash: Math.floor(group / 8) % 3});

// ------------------------------------------------------------------ curves

/** Steps as places on the axis chosen, for one run. */
function places(run, steps) {
  if (view.axis === "tokens" && run.batch_tokens) return steps.map((step) => step * run.batch_tokens);
  const time = view.axis === "time" ? run.curves.elapsed_seconds : null;
  if (!time) return steps;
  const [at, seconds] = time.raw.map((i) => report.numbers[i]);
  let i = 0;
  return steps.map((step) => {
    while (i + 1 < at.length && at[i + 1] < step) i++;
    if (i + 1 >= at.length || step <= at[i]) return step < at[0] ? seconds[0] * step / at[0] : seconds[i];
    return seconds[i] + (seconds[i + 1] - seconds[i]) * (step - at[i]) / (at[i + 1] - at[i]);
  });
}

/** The lines of the metric `name`: of each run its values and running mean, of each group its band. */
function linesOf(name) {
  const back = [], front = [], array = (i) => report.numbers[i];
  report.groups.forEach((group, g) => {
    const shown = group.runs.map((i) => report.runs[i]).filter((run) => !hidden.has(run.name));
    const band = shown.length > 1 ? own(group.bands, name) : undefined;
    if (band) {
      const [steps, mean, sd] = band.map(array);
      front.push({...colorOf(g), name: `${group.name}, mean`, x: places(shown[0], steps), y: mean, sd, width: 2.2, tip: true});
    }
    for (const run of band && !$("singles").checked ? [] : shown) {
      const curve = own(run.curves, name);
      if (!curve) continue;
      const [steps, values] = curve.raw.map(array);
      const line = {...colorOf(g), name: run.name, x: places(run, steps), y: values, tip: true};
      const mean = curve.mean ? {x: places(run, array(curve.mean[0])), y: array(curve.mean[1])} : null;
      back.push({...line, mean, width: mean ? 1 : band ? 1.2 : 1.6, opacity: mean ? 0.3 : band ? 0.5 : 1, dots: steps.length <= 40});
      if (mean) front.push({...line, ...mean, mean: null, tip: false, width: band ? 1.1 : 1.8, opacity: band ? 0.6 : 1});
    }
  });
  return [...back, ...front];
}

/** The axis' ends, over all runs. */
function measure() {
  let last = 0;
  for (const run of report.runs) for (const [name, curve] of Object.entries(run.curves)) {
    if (name !== "elapsed_seconds") last = Math.max(last, places(run, report.numbers[curve.raw[0]].slice(-1))[0] ?? 0);
  }
  [view.first, view.last] = [0, last || 1];
  const share = Number($("range").value);
  if (!Number.isNaN(share)) [view.from, view.to] = share ? [share * view.last, view.last] : [null, null];
}

view.changed = () => { measure(); for (const chart of view.charts) chart.draw(); };
view.zoom = (from, to) => {
  if (from !== null && !(to - from > (view.last - view.first) * 1e-9)) return; // no axis is that short
  [view.from, view.to] = [from, to];
  $("range").value = from === null ? "0" : "zoom";
  view.changed();
};

function charts() {
  const pressed = new Map(view.charts.map((chart) => [chart.spec.id, chart]));
  view.charts = [];
  const make = (spec) => {
    const chart = new Chart(spec), before = pressed.get(spec.id);
    if (before) for (const button of chart.tools.children) {
      const field = button.textContent === "log" ? "log" : "all";
      chart[field] = before[field];
      button.setAttribute("aria-pressed", chart[field]);
    }
    return chart.node;
  };
  const of = (metric) => make({id: metric.name, title: metric.title, unit: metric.unit, spiky: metric.spiky, lines: () => linesOf(metric.name)});
  $("charts").replaceChildren(...report.metrics.filter((metric) => !metric.more).map(of));
  const others = report.metrics.filter((metric) => metric.more);
  const title = `${others.length} more metric${others.length > 1 ? "s" : ""}`;
  $("more").replaceChildren(...(others.length ? [folded("more", title, [el("div", {class: "charts"}, ...others.map(of))])] : []));
  $("health").replaceChildren(...(report.health ? health(make) : []));
}

function health(make) {
  const choice = el("select", {"aria-label": "Layer"}, el("option", {value: ""}, "mean over layers"), ...report.health.layers.map((name) => el("option", {value: name}, `layer ${Number(name)}`)));
  if (!report.health.layers.includes(layer)) layer = "";
  choice.value = layer;
  choice.addEventListener("input", () => { layer = choice.value; view.changed(); });
  const of = (quantity, level) => make({
    id: `code/${level === null ? "" : `level${level}/`}${quantity.name}`, title: level === null ? quantity.title : `Level ${level}`, unit: "", height: 150,
    lines: () => linesOf(`code/${layer ? `layer${layer}/` : ""}${level === null ? "" : `level${level}/`}${quantity.name}`),
  });
  const drawn = (quantities) => {
    const whole = quantities.filter((quantity) => !quantity.levels.length);
    return [...quantities.filter((quantity) => quantity.levels.length).map((quantity) => el("div", {}, el("h3", {}, quantity.title), el("div", {class: "levels"}, ...quantity.levels.map((level) => of(quantity, level))))),
      whole.length ? el("div", {class: "levels"}, ...whole.map((quantity) => of(quantity, null))) : null];
  };
  const {quantities} = report.health;
  return [el("h2", {}, "Health of the sparse codes"), el("div", {class: "controls"}, el("label", {}, "Layer ", choice)),
    ...drawn(quantities.filter((quantity) => !quantity.more)),
    folded("health", "Statistics of the scores", drawn(quantities.filter((quantity) => quantity.more)))].filter(Boolean);
}

/** Charts behind a click; open again where the part of the page was open before. */
function folded(part, title, nodes) {
  const made = nodes.some(Boolean) ? el("details", {}, el("summary", {}, title), ...nodes.filter(Boolean)) : null;
  if (made) {
    made.open = Boolean($(part).querySelector("details")?.open);
    made.addEventListener("toggle", view.changed);
  }
  return made;
}

// ------------------------------------------------------------------ tables

/** A text that may be broken after its points and underscores. */
const breakable = (text) => text.split(/(?<=[._])/).flatMap((part, i) => i ? [el("wbr"), part] : [part]);
const cells = (row) => row.cells.map(([text, kind], i) => el("td", {class: kind || undefined, title: text.length > 30 ? text : undefined}, ...(i ? [text] : breakable(text))));

/** A table; `groups` are those whose colours its columns after the first have. */
function table({columns, rows}, groups = []) {
  const numeric = columns.map((_, i) => rows.length > 0 && rows.every((row) => row.cells[i][1].startsWith("number")));
  return el("div", {class: "wide"}, el("table", {},
    el("tr", {}, ...columns.map((name, i) => el("th", {class: numeric[i] ? "number" : undefined}, groups[i - 1] === undefined ? null : swatch(colorOf(groups[i - 1])), name))),
    ...rows.map((row) => el("tr", {}, ...cells(row)))));
}

/** The scores, whose first column shows and hides curves. */
function scores() {
  const made = table(report.scores), lines = [...made.querySelectorAll("tr")].slice(1);
  report.scores.rows.forEach((entry, i) => {
    const group = report.groups[entry.group], several = group.runs.length > 1, whole = entry.run === undefined;
    const names = (whole ? group.runs : [entry.run]).map((run) => report.runs[run].name);
    const box = el("input", {type: "checkbox"}), off = names.every((name) => hidden.has(name)), first = lines[i].firstChild;
    box.checked = !off;
    box.addEventListener("change", () => {
      for (const name of names) box.checked ? hidden.delete(name) : hidden.add(name);
      scores();
      view.changed();
    });
    first.replaceChildren(el("label", {style: `--color: var(${colorOf(entry.group).color})`}, box, " ", swatch(colorOf(entry.group)), ...first.childNodes));
    lines[i].className = [whole ? "group" : several ? "member" : "", off ? "off" : ""].join(" ").trim();
  });
  $("scores").replaceChildren(el("h2", {}, "Runs"), made, ...report.notes.map((note) => el("div", {class: "note small"}, note)));
}

function tables() {
  const {differences, configuration, exports, evaluations, environment} = report;
  const groups = [...report.groups.keys()];
  const same = report.runs.length === 1 ? null : el("p", {class: "soft small"}, "Every field is the same in all runs.");
  const whole = el("details", {}, el("summary", {}, "All fields"));
  whole.addEventListener("toggle", () => { if (whole.childElementCount === 1) whole.append(table(configuration, groups)); });
  $("config").replaceChildren(el("h2", {}, report.runs.length === 1 ? "Configuration" : "What the configurations differ in"),
    ...[differences.rows.length ? table(differences, groups) : same, whole].filter(Boolean));
  $("export").replaceChildren(...(exports.length ? [el("h2", {}, "Exports"), ...exports.flatMap((one) => [el("p", {class: "small"}, one.title), table(one)])] : []));
  $("evaluation").replaceChildren(...(evaluations.rows.length ? [el("h2", {}, "Evaluations"), table(evaluations)] : []));
  $("environment").replaceChildren(...(environment ? [el("h2", {}, "Environment"), table(environment, report.runs.map((_, i) => report.groups.findIndex((group) => group.runs.includes(i))))] : []));
}

// ------------------------------------------------------------------ the page

function show() {
  document.title = $("title").textContent = report.title;
  $("written").textContent = report.live ? `as of ${report.written}` : `written ${report.written}`;
  $("singles-label").hidden = !report.groups.some((group) => group.runs.length > 1);
  $("axis").querySelector("[value=time]").hidden = !report.runs.every((run) => run.curves.elapsed_seconds);
  $("axis").querySelector("[value=tokens]").hidden = !report.runs.every((run) => run.batch_tokens);
  scores();
  charts();
  tables();
  view.changed();
}

/** Asks the server for what has changed since. */
async function refresh() {
  try {
    const answer = await fetch(`data.json?since=${report.live}`);
    if (answer.status === 200) { report = await answer.json(); show(); }
    $("live").textContent = answer.ok ? "· live" : `· not read: ${await answer.text()}`;
    $("live").className = answer.ok ? "" : "lost";
  } catch {
    $("live").textContent = "· the command that serves this page has ended";
    $("live").className = "lost";
  }
}

$("axis").addEventListener("input", () => { view.axis = $("axis").value; view.cursor = null; view.zoom(null, null); });
$("range").addEventListener("input", view.changed);
$("singles").addEventListener("input", view.changed);
show();
let width = $("charts").clientWidth;
new ResizeObserver(() => { if ($("charts").clientWidth !== width) { width = $("charts").clientWidth; view.changed(); } }).observe($("charts"));
if (report.live) setInterval(refresh, 3000);
