const study = data;
const LISTED = 300;  // features drawn in the list at a time

const color = (level) => `--level: var(--c${level % 8})`;
const key = (f) => `L${f.layer}/${f.level}/${f.id}`;
const byKey = new Map(study.features.map((f) => [key(f), f]));
/** Line breaks and tabs as signs, so that a context stays on one line. */
const oneLine = (text) => text.replace(/\r?\n|\r/g, "⏎").replace(/\t/g, "⇥").replace(/[\p{C}\u2028\u2029]/gu, "·");
/** A token with its whitespace visible, long runs by their length; tokens without text by their number. */
const visible = (token) => token.text === "" ? `⟨${token.id}⟩` : oneLine(token.text).replace(/ {4,}/g, (run) => `␣×${run.length}`).replace(/ /g, "␣");
const chip = (token) => el("span", {class: "token", title: `token ${token.id}`}, visible(token));
const bar = (share, width = 7) => el("span", {class: "bar", style: `width: ${(width * share).toFixed(3)}rem`});

// ------------------------------------------------------------------ header

function header() {
  document.title = `Features of ${study.run}`;
  $("title").textContent = document.title;
  $("about").textContent = `step ${integer(study.step)} · ${study.weights} weights · ${integer(study.tokens)} validation tokens of ${study.data}`;
  const worst = Math.max(...study.losses.map((l) => Math.abs(l.loss - study.losses.at(-1).loss)), 1e-9);
  const rows = study.losses.map((kept, level) => {
    const above = kept.loss - study.losses.at(-1).loss;
    const last = level === study.losses.length - 1;
    return row("td", level === 0 ? "0" : `0–${level}`, kept.active_features, number(kept.loss.toFixed(4)), number(kept.bpb.toFixed(4)),
      el("td", {style: `${color(level)}; white-space: nowrap`, title: "nats a token above the loss with all levels"}, last ? "" : bar(Math.abs(above) / worst, 6), " ", el("span", {class: "soft small"}, last ? "" : `${above < 0 ? "−" : "+"}${Math.abs(above).toFixed(4)}`)));
  });
  $("losses").append(row("th", "Levels kept", number("features a token", "th"), number("loss, nats", "th"), number("bits a byte", "th"), "above all levels"), ...rows);
}

// ------------------------------------------------------------------ list

function matches(f, query) {  // 0: not at all, otherwise the better the larger
  if (!query) return 1;
  if (/^L?\d+\/\d+\/\d+$/i.test(query)) return key(f).toLowerCase() === `l${query.toLowerCase().replace(/^l/, "")}` ? 1 : 0;
  if (/^\d+$/.test(query) && f.id === Number(query)) return 2;
  const wanted = query.toLowerCase();
  return Math.max(0, ...f.tokens.map((token) => {
    token.spellings ??= [visible(token).toLowerCase(), token.text.trim().toLowerCase()];
    return token.spellings.includes(wanted) ? 1 + token.share : token.spellings.some((text) => text.includes(wanted)) ? token.share : 0;
  }));
}

const ORDERS = {most: (a, b) => b.count - a.count, least: (a, b) => a.count - b.count, strong: (a, b) => b.max_activation - a.max_activation};
let shown = LISTED;

function list() {
  const query = $("query").value.trim(), layer = $("layer").value, level = $("level").value;
  const found = study.features
    .filter((f) => (layer === "" || f.layer === Number(layer)) && (level === "" || f.level === Number(level)))
    .map((f) => [matches(f, query), f]).filter(([match]) => match > 0)
    .sort(([a, f], [b, g]) => (query ? b - a : 0) || ORDERS[$("order").value](f, g));
  $("count").textContent = `${integer(found.length)} of ${integer(study.features.length)} features`;
  const more = el("a", {href: location.hash || "#"}, el("span", {class: "soft small"}, `${integer(found.length - shown)} more …`));
  more.addEventListener("click", (event) => { event.preventDefault(); shown += LISTED; list(); });
  $("found").replaceChildren(...found.slice(0, shown).map(([, f]) => el("a", {href: `#${key(f)}`, style: color(f.level), "aria-current": location.hash === `#${key(f)}` ? "true" : undefined},
    el("span", {class: "name"}, String(f.id)),
    el("span", {class: "soft small"}, `layer ${f.layer}, level ${f.level}`),
    el("span", {class: "soft small", title: "tokens on which it fired"}, integer(f.count)),
    el("span", {class: "tokens"}, ...f.tokens.slice(0, 6).map(chip)))), found.length > shown ? more : null);
}
function restart() { shown = LISTED; $("found").scrollTop = 0; list(); }

// ------------------------------------------------------------------ overview

const BINS = Math.max(...study.layers.flatMap((layer) => layer.levels.map((cell) => cell.histogram.length)));

/** Bar i > 0 counts the features that fired 2^(i-1) to 2^i - 1 times; bar 0 those that never did. */
function histogram(bins) {
  const most = Math.max(...bins, 1), step = 100 / BINS;
  const drawing = el("svg", {viewBox: "0 0 100 42", preserveAspectRatio: "none", role: "img", "aria-label": "features by how often they fired"});
  bins.forEach((count, i) => {
    const height = count ? Math.max(38 * count / most, .8) : 0, low = 2 ** (i - 1), high = 2 ** i - 1;
    const label = `${integer(count)} ${count === 1 ? "feature" : "features"} fired ${i === 0 ? "never" : low === high ? "once" : `${integer(low)} to ${integer(high)} times`}`;
    drawing.append(el("rect", {x: i * step + .3, y: 40 - height, width: step - .6, height, class: i ? undefined : "none"}, el("title", {}, label)));
  });
  drawing.append(el("line", {x1: 0, x2: 100, y1: 40.5, y2: 40.5}));
  return drawing;
}

/** The least number of firings of every third bar. */
function axis() {
  const bars = Array.from({length: BINS}, (_, i) => i).filter((i) => i % 3 === 0);
  const short = (i) => i === 0 ? "0" : i > 10 ? `${2 ** (i - 11)}k` : String(2 ** (i - 1));
  return el("div", {class: "axis soft small"}, ...bars.map((i) => el("span", {style: `left: ${100 * (i + .5) / BINS}%`}, short(i))));
}

function overview() {
  const grid = el("table", {class: "grid", style: "width: 100%"});
  grid.append(row("th", "Layer", ...study.levels.map((level, i) => el("th", {}, `Level ${i}: ${level.k} of ${integer(level.features)}`))));
  for (const layer of study.layers) grid.append(row("td", String(layer.layer), ...layer.levels.map((cell, level) => {
    const link = el("a", {href: "#", style: color(level), title: "list the studied features of this layer and level"}, histogram(cell.histogram),
      el("span", {class: "small"}, `${integer(cell.fired)} of ${integer(cell.reachable)} fired`),
      el("span", {class: "small soft"}, ` · ${percent(cell.dead)} dead`));
    link.addEventListener("click", (event) => { event.preventDefault(); $("layer").value = layer.layer; $("level").value = level; $("query").value = ""; restart(); });
    return el("td", {}, link);
  })));
  grid.append(row("td", el("span", {class: "soft small"}, "times"), ...study.levels.map(axis)));
  return [el("div", {class: "card"}, el("h2", {}, "How often features fire"),
    el("p", {class: "soft small"}, `Features by how often they fired over ${integer(study.tokens)} tokens, in steps that double; grey: never. To fire is to be among the k that a token selects. Dead: fired less than a tenth of the level’s average. Click a cell to list its features.`), grid)];
}

// ------------------------------------------------------------------ one feature

function relations(f, title, note, level, relatives) {
  const table = el("table", {class: "relation", style: color(level)});
  table.append(row("th", "feature", "most on", number("tokens", "th"), "P(child | parent)", number("P(parent | child)", "th")));
  for (const r of relatives) {
    const other = byKey.get(`L${f.layer}/${level}/${r.id}`);
    table.append(row("td",
      other ? el("a", {class: "name link", href: `#${key(other)}`}, String(r.id)) : el("span", {class: "soft", title: "not among the features studied"}, String(r.id)),
      other ? el("span", {}, ...other.tokens.slice(0, 2).flatMap((token) => [chip(token), " "])) : "",
      r.count, el("td", {}, bar(r.given_parent, 4), " ", el("span", {class: "small"}, percent(r.given_parent))), number(percent(r.given_child))));
  }
  return el("div", {class: "card"}, el("h3", {}, title), relatives.length ? table : el("div", {class: "soft small"}, "none fired together"), el("div", {class: "soft small", style: "margin-top: .5rem"}, note));
}

function feature(f) {
  const fact = (value, label) => el("div", {}, el("b", {}, value), el("span", {class: "soft small"}, label));
  const contexts = f.contexts.map((c) => {
    const strength = f.max_activation > 0 ? Math.round(12 + 58 * Math.max(c.activation, 0) / f.max_activation) : 12;
    return el("div", {class: "context", title: `token ${integer(c.position)} of the validation stream`},
      el("span", {class: "text before"}, el("span", {}, oneLine(c.before))),
      el("mark", {class: "text", style: `background: color-mix(in srgb, var(--level) ${strength}%, transparent)`}, visible({text: c.token, id: c.token_id})),
      el("span", {class: "text"}, oneLine(c.after)),
      el("span", {class: "number soft small", style: "text-align: right"}, c.activation.toFixed(2)));
  });
  const tokens = el("table");
  tokens.append(row("th", "token", number("times", "th"), "share of its firings", el("th", {class: "number", title: "the token’s share here, over its share of the text"}, "against chance")),
    ...f.tokens.map((token) => row("td", chip(token), token.count, el("td", {}, bar(token.share), " ", el("span", {class: "small"}, percent(token.share))), number(`×${token.lift >= 100 ? integer(Math.round(token.lift)) : token.lift.toPrecision(2)}`))));
  const last = f.level === study.levels.length - 1;
  return [
    el("div", {class: "card"}, el("h2", {}, el("span", {class: "name"}, `Feature ${f.id}`), ` of layer ${f.layer}, level ${f.level}`),
      el("div", {class: "facts"}, fact(integer(f.count), "tokens on which it fired"), fact(percent(f.count / study.tokens), "of all tokens"),
        fact(f.mean_activation.toFixed(2), "mean activation"), fact(f.max_activation.toFixed(2), "largest activation"))),
    el("div", {class: "card"}, el("h3", {}, "Where it is strongest"), el("div", {}, ...contexts)),
    el("div", {class: "columns"},
      el("div", {class: "card"}, el("h3", {}, "Tokens that it fires on"), tokens),
      f.level ? relations(f, `Parents, level ${f.level - 1}`, "Of the features of the level above that can select it: those that fired on the same tokens.", f.level - 1, f.parents) : null,
      last ? null : relations(f, `Children, level ${f.level + 1}`, "Of the features of the level below that it can select: those that fired on the same tokens.", f.level + 1, f.children)),
  ];
}

// ------------------------------------------------------------------ what is shown

function show() {
  const f = byKey.get(location.hash.slice(1));
  const missing = !f && location.hash.length > 1;
  $("view").style.cssText = f ? color(f.level) : "";
  $("view").replaceChildren(...(missing ? [el("div", {class: "card"}, `${location.hash.slice(1)} is not among the features studied.`)] : []), ...(f ? feature(f) : overview()));
  for (const link of $("found").children) link.getAttribute("href") === location.hash && f ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  window.scrollTo(0, 0);
}

header();
$("layer").append(el("option", {value: ""}, "All layers"), ...study.layers.map((l) => el("option", {value: l.layer}, `Layer ${l.layer}`)));
$("level").append(el("option", {value: ""}, "All levels"), ...study.levels.map((_, i) => el("option", {value: i}, `Level ${i}`)));
for (const id of ["query", "layer", "level", "order"]) $(id).addEventListener("input", restart);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) { event.preventDefault(); $("query").focus(); }
});
window.addEventListener("hashchange", show);
list();
show();
