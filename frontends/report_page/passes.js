"use strict";
// Summary cards, and the passes in order with what they applied, refused and changed.
function bars(rows) {
  const most = Math.max(...rows.map((r) => r.value), 0) || 1;
  return el("div", {class: "bars"}, rows.map((r) => {
    const picture = svg("svg", {viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true"},
      svg("rect", {class: r.class || "fill", x: 0, y: 0, width: (100 * r.value) / most, height: 4, rx: 1}));
    return [el("span", {class: "soft wrap"}, r.label), el("span", {class: "track"}, picture), el("span", {class: "num"}, r.text)];
  }));
}

function card(label, value, tone, ...rest) {
  return el("div", {class: "card"}, el("div", {class: "label"}, label), el("div", {class: `value ${tone}`}, value), ...rest);
}

function savedCard(label, before, after, show) {
  const text = change(before, after);
  const tone = after < before ? "good" : after > before ? "bad" : "";
  return card(label, text || show(after), tone, bars([
    {label: "before", value: before, text: show(before), class: "fill-old"},
    {label: "after", value: after, text: show(after), class: after > before ? "fill-bad" : "fill"},
  ]));
}

function summary() {
  const [before, after] = data.totals;
  const applied = data.passes.reduce((sum, p) => sum + p.applied.length, 0);
  const changed = data.passes.filter((p) => p.applied.length).length;
  const saved = data.costed ? [
    savedCard(`Predicted time${data.device ? ` on ${data.device}` : ""}`, before.roofline_ms, after.roofline_ms, (v) => duration(v / 1e3)),
    savedCard("Memory traffic", before.bytes, after.bytes, (v) => number(v, "B")),
    savedCard("Launches", before.launches, after.launches, (v) => number(v)),
    savedCard("Arithmetic", before.flops, after.flops, (v) => number(v, "flop")),
  ] : [];
  const phases = Object.entries(data.seconds);
  const total = phases.reduce((sum, [, v]) => sum + v, 0);
  const passSeconds = data.passes.reduce((sum, p) => sum + p.seconds, 0);
  const errors = Object.entries(data.errors);
  const cost = [];
  if (phases.length) cost.push(card("Compile time", duration(total), "", bars(phases.map(([label, value]) => ({label, value, text: duration(value)})))));
  cost.push(card("Passes", duration(passSeconds), "", el("p", {class: "small soft"}, `${plural(applied, "rewrite")} by ${changed} of ${plural(data.passes.length, "pass").replace("passs", "passes")}`)));
  if (errors.length) cost.push(card("Error against float64", small(Math.max(...errors.filter(([n]) => !n.startsWith("eager")).map(([, v]) => v), 0)), "", bars(errors.map(([label, value]) => ({label, value, text: small(value), class: label.startsWith("eager") ? "fill-old" : "fill"})))));
  if (data.breaks.length) cost.push(card("Graph breaks", String(data.breaks.length), "bad", el("p", {class: "small soft"}, "the model was captured in parts")));
  const notes = ["Before is the program in normal form, ahead of the pipeline. Predicted: each node reads its inputs once and writes its result once; fusion by Inductor is not counted."];
  const sizes = Object.entries(data.sizes);
  if (sizes.length) notes.push(`Numbers at ${sizes.map(([k, v]) => `${k} = ${v}`).join(", ")}.`);
  if (after.unknown) notes.push(`${plural(after.unknown, "node")} without a known size left out.`);
  return section("summary", "Summary",
    saved.length ? [el("h3", null, "What it saved"), el("div", {class: "cards"}, saved), el("p", {class: "soft small"}, notes.join(" "))] : null,
    el("h3", null, "What it cost"), el("div", {class: "cards"}, cost));
}

function appliedItem(entry) {
  const [rule, node, inserted, removed, source, module, error, note] = entry;
  const item = el("li", {class: "applied"});
  const check = error !== null ? `replayed: ${small(error)} relative RMS` : texts[note] ? `not replayed: ${texts[note]}` : "not replayed";
  add(item, [
    el("code", null, node), texts[rule] ? [" ", el("span", {class: "badge"}, texts[rule])] : null,
    texts[module] ? [" ", el("span", {class: "soft small"}, texts[module])] : null, " \u00b7 ", sourceButton(source, item),
    el("div", {class: "small soft"}, removed.length || inserted.length ? `${removed.join(", ") || "nothing"} \u2192 ${inserted.join(", ") || "nothing"} \u00b7 ${check}` : check),
  ]);
  return item;
}

function refusedGroups(refused) {
  const groups = new Map();
  for (const entry of refused) {
    const key = `${entry[0]}/${entry[7]}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(entry);
  }
  const sorted = [...groups.values()].map((g) => g.sort((a, b) => b[4] - a[4]));
  return sorted.sort((a, b) => b[0][4] - a[0][4] || b.length - a.length);
}

function refusedItem(entry, shown) {
  const [, node, reason, blame, depth, source, module] = entry;
  const item = el("li");
  const own = texts[reason] === shown ? "" : `${texts[reason]}; `;
  const about = blame && blame !== node ? `the reason is about ${blame}; ` : "";
  add(item, [el("code", null, node), texts[module] ? [" ", el("span", {class: "soft small"}, texts[module])] : null, " \u00b7 ", sourceButton(source, item),
    el("div", {class: "small soft"}, `${own}${about}${plural(depth, "pattern call")} matched before this`)]);
  return item;
}

function refusedGroup(group) {
  const item = el("li", {class: "refused"});
  const [rule, , reason] = group[0];
  const places = lazy(el("details", null, el("summary", {class: "small soft"}, `${plural(group.length, "node")}; nearest miss ${group[0][1]} (${group[0][4]} matched)`)),
    () => paged(group, (entry) => refusedItem(entry, texts[reason]), 12));
  return add(item, [el("span", {class: "count warn"}, `${group.length} \u00d7 `), texts[reason], texts[rule] ? [" ", el("span", {class: "badge"}, texts[rule])] : null, places]);
}

function diffView(diff) {
  const kinds = {"-": "line del", "+": "line add", "~": "line wire", "@": "line gap", " ": "line"};
  const lines = diff.rows.map(([kind, text]) => el("span", {class: kinds[kind]}, kind === "@" ? `  \u22ef ${text} lines unchanged` : `${kind} ${text}`));
  const rest = diff.left_out ? el("p", {class: "soft small"}, `${plural(diff.left_out, "more changed line")} not in this file; the JSON report has both graphs.`) : null;
  return el("div", null, el("p", {class: "soft small"}, "\u2212 removed, + inserted, ~ reads another value; node numbers alone are no difference"), el("pre", {class: "code", tabindex: "0"}, lines), rest);
}

function passBody(p) {
  const body = el("div", {class: "body"});
  const facts = [p.stage.toLowerCase(), p.exactness, `nodes ${p.nodes[0]} \u2192 ${p.nodes[1]}`, p.paper].filter(Boolean);
  add(body, [el("p", {class: "soft small wrap"}, facts.join(" \u00b7 "))]);
  if (p.skipped) add(body, [el("p", null, `Skipped: ${p.skipped}`)]);
  for (const note of p.notes) add(body, [el("p", {class: "small"}, note)]);
  if (p.applied.length) add(body, [el("h3", null, `Applied at ${plural(p.applied.length, "place")}`), paged(p.applied, appliedItem, 8)]);
  if (p.refused.length) add(body, [el("h3", null, "Refused, nearest miss first"), paged(refusedGroups(p.refused), refusedGroup, 20)]);
  if (p.diff && p.diff.rows.length) {
    const [removed, inserted, rewired] = p.diff.counts;
    const label = `Graph difference: ${removed} removed, ${inserted} inserted, ${rewired} read another value`;
    add(body, [el("h3", null, label), lazy(el("details", null, el("summary", {class: "small"}, "Show the difference")), () => diffView(p.diff))]);
  } else if (p.diff) add(body, [el("p", {class: "soft small"}, "The graph is the same before and after.")]);
  return body;
}

function passes() {
  const items = data.passes.map((p, i) => {
    const details = el("details", {class: "pass"}, el("summary", null,
      el("span", {class: "soft"}, `${i + 1}`), el("span", {class: "name"}, p.text),
      el("span", {class: p.applied.length ? "count good" : "count soft"}, `${p.applied.length} applied`),
      el("span", {class: p.refused.length ? "count warn" : "count soft"}, `${p.refused.length} refused`),
      p.skipped ? el("span", {class: "badge gone"}, "skipped") : null,
      el("span", {class: "push"}, `${duration(p.seconds)}`)));
    return lazy(details, () => passBody(p));
  });
  const first = data.passes.findIndex((p) => p.applied.length);
  if (first >= 0 && items.length <= 4) items[first].open = true;
  return section("passes", "Passes in order", items.length ? items : el("p", {class: "empty"}, "The pipeline is empty."));
}
