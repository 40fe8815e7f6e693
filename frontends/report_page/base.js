"use strict";
// Text reaches the page through text nodes only. Names come from models, so characters that steer the display
// are written as escapes.
const data = JSON.parse(document.getElementById("data").textContent);
const texts = data.texts;
const SVG = "http://www.w3.org/2000/svg";
const STEERING = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

function escaped(char) {
  const code = char.codePointAt(0).toString(16);
  return code.length <= 2 ? "\\x" + code.padStart(2, "0") : "\\u" + (code.length <= 4 ? code.padStart(4, "0") : `{${code}}`);
}

function clean(text) {
  return String(text).replace(STEERING, escaped);
}

function add(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === "") continue;
    node.append(child instanceof Node ? child : document.createTextNode(clean(child)));
  }
  return node;
}

// el("td", {class: "num"}, "text", otherElement): attributes come from this script, never from data but `title`.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined) node.setAttribute(name, clean(value));
  }
  return add(node, children);
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, clean(value));
  return add(node, children);
}

function number(value, unit) {
  if (value === null || value === undefined) return "unknown";
  if (typeof value !== "number") return String(value);
  const prefixes = ["", "k", "M", "G", "T", "P", "E"];
  let step = 0;
  while (Math.abs(value) >= 999.5 && step < prefixes.length - 1) { value /= 1000; step += 1; }
  const digits = step === 0 && Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)));
  return `${digits} ${prefixes[step]}${unit || ""}`.trim();
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "unknown";
  if (typeof seconds !== "number") return String(seconds);
  if (seconds === 0) return "0 s";
  for (const [scale, unit] of [[1, "s"], [1e3, "ms"]]) {
    if (Math.abs(seconds) * scale >= 1) return `${Number((seconds * scale).toPrecision(3))} ${unit}`;
  }
  return `${Number((seconds * 1e6).toPrecision(3))} \u00b5s`;
}

function small(value) {
  return typeof value === "number" ? String(Number(value.toPrecision(3))) : String(value);
}

function change(before, after) {
  if (before === after) return "unchanged";
  if (!(before > 0)) return "";
  const percent = Number(((after / before - 1) * 100).toPrecision(3));
  return `${percent > 0 ? "+" : "\u2212"}${Math.abs(percent)} %`;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

function section(id, title, ...children) {
  const heading = el("h2", {id: `${id}-title`}, title);
  return el("section", {id, "aria-labelledby": `${id}-title`}, heading, ...children);
}

function table(columns, rows, caption) {
  const head = el("tr", null, columns.map((c) => el("th", {scope: "col", class: c.num ? "num" : null}, c.label)));
  const body = rows.map((row) => el("tr", null, row.map((cell, i) => el("td", {class: columns[i].class || (columns[i].num ? "num" : null)}, cell))));
  const inner = el("table", null, caption ? el("caption", null, caption) : null, el("thead", null, head), el("tbody", null, body));
  return el("div", {class: "scroll"}, inner);
}

function shortSource(source) {
  const parts = source.split(/[\\/]/);
  return parts.length <= 3 ? source : parts.slice(-3).join("/");
}

function shortOp(op) {
  return op.replace(/^aten\./, "").replace(/\.default$/, "");
}

function sourceText(index) {
  const place = texts[index];
  const at = Number(place.slice(place.lastIndexOf(":") + 1));
  const kept = data.sources[String(index)];
  const title = el("p", {class: "soft small wrap mono"}, place);
  if (!kept) return el("div", {class: "source"}, title, el("p", {class: "soft small"}, "The text of this line is not in the report."));
  const lines = kept[1].map((text, i) => el("span", {class: kept[0] + i === at ? "line hit" : "line"}, el("span", {class: "no"}, kept[0] + i), text));
  return el("div", {class: "source"}, title, el("pre", {class: "code"}, lines));
}

// A button that shows and hides the user's source lines in `holder`.
function sourceButton(index, holder) {
  if (!texts[index]) return el("span", {class: "soft"}, "no source line recorded");
  const button = el("button", {class: "link source-line", type: "button", "aria-expanded": "false", title: "Show the line of the model"}, shortSource(texts[index]));
  let shown = null;
  button.addEventListener("click", () => {
    if (shown) { shown.remove(); shown = null; } else { shown = sourceText(index); (holder || button.parentElement).append(shown); }
    button.setAttribute("aria-expanded", String(shown !== null));
  });
  return button;
}

// Content that is made when it is first looked at.
function lazy(details, make) {
  const fill = () => { if (!details.dataset.filled) { details.dataset.filled = "1"; details.append(make()); } };
  details.addEventListener("toggle", () => { if (details.open) fill(); });
  details.fill = fill;
  return details;
}

// A list that shows `step` items, then ten times as many at a time.
function paged(items, draw, step) {
  const list = el("ul", {class: "rows"});
  const more = el("button", {class: "plain", type: "button"});
  let at = 0;
  const next = (size) => {
    for (const item of items.slice(at, at + size)) list.append(draw(item));
    at = Math.min(items.length, at + size);
    more.textContent = `Show ${Math.min(step * 10, items.length - at)} more of ${items.length - at}`;
    more.hidden = at >= items.length;
  };
  more.addEventListener("click", () => next(step * 10));
  next(step);
  return el("div", null, list, more);
}
