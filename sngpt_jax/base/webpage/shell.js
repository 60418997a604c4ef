const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG_TAGS = new Set(["svg", "g", "rect", "line", "path", "circle", "text", "title"]);

/** A value by a key from data, which may be the name of something that every object inherits. */
const own = (object, key) => Object.hasOwn(object, key) ? object[key] : undefined;

/** An element with attributes and children; text goes in as text, never as markup. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElementNS(`http://www.w3.org/${SVG_TAGS.has(tag) ? "2000/svg" : "1999/xhtml"}`, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) name === "style" ? node.style.cssText = value : node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const integer = (x) => x.toLocaleString("en-US");
const percent = (x) => x >= 0.9995 ? "100 %" : `${(100 * x).toPrecision(x < 0.001 ? 1 : x < 0.1 ? 2 : 3)} %`;
/** A table's row; numbers are written with commas, cells that are made already are taken as they are. */
const row = (tag, ...cells) => el("tr", {}, ...cells.map((cell) => typeof cell === "number" ? el(tag, {class: "number"}, integer(cell))
  : cell instanceof Node && /^t[dh]$/i.test(cell.tagName) ? cell : el(tag, {}, cell)));
const number = (text, tag = "td") => el(tag, {class: "number"}, text);

// ------------------------------------------------------------------ light and dark

const THEMES = {"": "Auto", light: "Light", dark: "Dark"};

/** "": as the system says. Kept for this browser's next visit, where it keeps anything for a page. */
function setTheme(theme, keep = true) {
  document.documentElement.style.colorScheme = theme;
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = THEMES[theme];
  $("theme").title = `Colours: ${THEMES[theme].toLowerCase()}; click to change`;
  try { if (keep) localStorage.setItem("sngpt_jax.theme", theme); } catch { /* not kept, then */ }
}

{
  let kept = "";
  try { kept = localStorage.getItem("sngpt_jax.theme") ?? ""; } catch { /* none is kept */ }
  setTheme(Object.hasOwn(THEMES, kept) ? kept : "", false);
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
  });
}
