"use strict";
// Header, what runs where, errors and facts; then everything is put on the page.
function header() {
  const origin = data.origin ? `captured by ${data.origin}` : "";
  const facts = [origin, data.target, data.training ? "training" : ""].filter(Boolean).join(" \u00b7 ");
  const chips = data.passes.map((p) => el("span", {class: "chip"}, p.text));
  add(document.getElementById("top"), [
    el("h1", null, data.model || "Program"), el("p", {class: "soft"}, facts),
    el("div", {class: "pipeline"}, el("span", {class: "soft small"}, "pipeline"), chips.length ? chips : el("span", {class: "soft small"}, "(empty)")),
  ]);
  if (data.left_alone) add(document.getElementById("top"), [el("p", {class: "left-alone wrap", role: "note"}, `Left as it was: ${data.left_alone}`)]);
  document.title = `${clean(data.model || "Program")} \u2013 Tilewright report`;
}

function code(text) {
  const lines = text.split("\n").map((line, i) => el("span", {class: "line"}, el("span", {class: "no"}, i + 1), line));
  return el("pre", {class: "code", tabindex: "0"}, lines);
}

function kernelGroups() {
  const groups = new Map();
  for (const [node, op, kernel, why, file, text] of data.kernels.rows) {
    const key = `${op}/${kernel}/${why}/${file}/${text}`;
    if (!groups.has(key)) groups.set(key, {op: texts[op], kernel: texts[kernel], why: texts[why], file: texts[file], text, nodes: []});
    groups.get(key).nodes.push(node);
  }
  return [...groups.values()].sort((a, b) => b.nodes.length - a.nodes.length);
}

function kernelItem(group) {
  const summary = el("summary", null, el("span", {class: "name"}, group.op), el("span", {class: group.why ? "badge" : "badge new"}, group.kernel),
    el("span", {class: "count soft"}, plural(group.nodes.length, "node")), group.why ? el("span", {class: "small wrap soft"}, `no generated kernel: ${group.why}`) : null);
  return lazy(el("details", {class: "kernel"}, summary), () => {
    const body = el("div", {class: "body"}, el("p", {class: "small mono wrap"}, group.nodes.slice(0, 60).join(", ") + (group.nodes.length > 60 ? `, and ${group.nodes.length - 60} more` : "")));
    if (group.file) body.append(el("p", {class: "small soft mono wrap"}, group.file));
    if (group.text >= 0) body.append(code(data.kernels.sources[group.text]));
    else if (!group.why) body.append(el("p", {class: "small soft"}, "The source of this kernel is not in the report."));
    return body;
  });
}

function kernels() {
  const places = new Map();
  for (const row of rows) {
    if (!row.after || !row.after[LAUNCHES]) continue;
    const at = places.get(row.where) || {launches: 0, us: 0};
    places.set(row.where, {launches: at.launches + row.after[LAUNCHES], us: at.us + (row.now || 0)});
  }
  const sorted = [...places].sort((a, b) => b[1].us - a[1].us);
  const share = sorted.length ? el("div", {class: "box"}, el("div", {class: "soft small"}, "Predicted time by what runs it"),
    bars(sorted.map(([where, at]) => ({label: where || "not said", value: at.us, text: `${duration(at.us / 1e6)} \u00b7 ${plural(at.launches, "launch").replace("launchs", "launches")}`})))) : null;
  const groups = kernelGroups();
  return section("kernels", "What runs where", share, groups.length ? groups.map(kernelItem) : el("p", {class: "empty"}, "No op was lowered to a generated kernel."));
}

function errors() {
  const found = Object.entries(data.errors);
  const body = found.length ? table([{label: "output"}, {label: "error against float64", num: true}], found.map(([name, value]) => [name, small(value)]))
    : el("p", {class: "empty"}, "The outputs were not compared with a float64 run; ask for it with verify=outputs.");
  return section("errors", "Errors", body);
}

function facts() {
  const known = data.facts.length ? table([{label: "fact"}, {label: "is", class: "wrap"}, {label: "origin"}], data.facts.map((f) => [f.name || "", f.value || "", f.origin || ""])) : el("p", {class: "empty"}, "No facts were recorded.");
  const broken = data.breaks.map(([source, reason]) => { const item = el("li"); return add(item, [reason, " \u00b7 ", sourceButton(source, item)]); });
  const versions = Object.entries(data.versions).map(([name, value]) => [el("dt", null, name), el("dd", null, value)]);
  return section("facts", "Facts", known, broken.length ? [el("h3", null, "Graph breaks"), el("ul", {class: "rows"}, broken)] : null,
    versions.length ? [el("h3", null, "Versions"), el("dl", {class: "pairs"}, versions)] : null);
}

header();
const sections = [["summary", "Summary", summary], ["passes", "Passes", passes], ["kernels", "Kernels", kernels], ["nodes", "Nodes", nodes], ["graph", "Graph", graph], ["errors", "Errors", errors], ["facts", "Facts", facts]];
document.getElementById("nav").append(el("ul", null, sections.map(([id, title]) => el("li", null, el("a", {href: `#${id}`}, title)))));
add(document.getElementById("main"), sections.map(([, , make]) => make()));
add(document.getElementById("foot"), ["One file, no network: everything on this page was written into it when the program was compiled."]);
window.addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details.pass")) { d.fill(); d.open = true; } });
document.documentElement.dataset.ready = "1";
