"use strict";
// Every node before and after, sortable and filtered, a page at a time.
const PAGE = 25;
const OP = 0, FLOPS = 1, READ = 2, WRITTEN = 3, LAUNCHES = 4, US = 5, WHERE = 6, FLOPS_N = 7, BYTES_N = 8, NOTE = 9, INPUTS = 10;

function rowOf(raw, i) {
  const [name, op, module, source, before, after, removedBy, insertedBy] = raw;
  const side = after || before;
  const show = {name, op: texts[op], module: texts[module], where: after ? texts[after[WHERE]] : "removed"};
  const pass = after ? insertedBy : removedBy;
  return {
    ...show, i, source, before, after, pass: pass >= 0 ? data.passes[pass].name : "",
    flops: side[FLOPS_N], bytes: side[BYTES_N], old: before ? before[US] : null, now: after ? after[US] : null,
    state: after ? (before ? "" : "new") : "gone",
    key: `${name}\n${texts[op]}\n${texts[module]}\n${show.where}\n${pass >= 0 ? data.passes[pass].name : ""}`.toLowerCase(),
  };
}

const rows = data.nodes.map(rowOf);
const COLUMNS = [
  {id: "name", label: "node"}, {id: "op", label: "op"}, {id: "module", label: "module"}, {id: "where", label: "runs on"},
  {id: "flops", label: "flop", num: true}, {id: "bytes", label: "bytes", num: true},
  {id: "old", label: "\u00b5s before", num: true}, {id: "now", label: "\u00b5s after", num: true}, {id: "pass", label: "pass"},
];

function sideText(name, side) {
  if (!side) return null;
  const formula = (index) => texts[side[index]];
  const us = side[US] === null ? "unknown" : duration(side[US] / 1e6);
  return [el("dt", null, name), el("dd", {class: "mono"}, `${formula(OP)} \u00b7 flop ${formula(FLOPS)} \u00b7 reads ${formula(READ)} B \u00b7 writes ${formula(WRITTEN)} B \u00b7 ${plural(side[LAUNCHES], "launch").replace("launchs", "launches")} \u00b7 ${us}${formula(NOTE) ? ` \u00b7 ${formula(NOTE)}` : ""}`)];
}

function nodeDetail(row) {
  const inputs = (row.after || row.before)[INPUTS].map((i) => rows[i].name);
  const body = el("div", null, el("dl", {class: "pairs"},
    sideText("before", row.before), sideText("after", row.after),
    row.module ? [el("dt", null, "module"), el("dd", {class: "mono"}, row.module)] : null,
    inputs.length ? [el("dt", null, "reads"), el("dd", {class: "mono"}, inputs.join(", "))] : null,
    row.pass ? [el("dt", null, row.after ? "inserted by" : "removed by"), el("dd", {class: "mono"}, row.pass)] : null));
  if (texts[row.source]) body.append(sourceText(row.source));
  return body;
}

function drawRow(row) {
  const line = el("tr", {class: row.state});
  const open = el("button", {class: "link", type: "button", "aria-expanded": "false"}, row.name);
  let shown = null;
  open.addEventListener("click", () => {
    if (shown) { shown.remove(); shown = null; } else { shown = el("tr", {class: "detail"}, el("td", {colspan: COLUMNS.length}, nodeDetail(row))); line.after(shown); }
    open.setAttribute("aria-expanded", String(shown !== null));
  });
  const us = (side, value) => (side ? (value === null ? "unknown" : small(value)) : "\u2013");
  return add(line, [
    el("td", {class: "name"}, open, row.state ? [" ", el("span", {class: `badge ${row.state}`}, row.state === "new" ? "new" : "removed")] : null),
    el("td", {class: "mono wrap"}, shortOp(row.op)), el("td", {class: "mono wrap"}, row.module), el("td", {class: "mono"}, row.where),
    el("td", {class: "num"}, number(row.flops)), el("td", {class: "num"}, number(row.bytes)),
    el("td", {class: "num"}, us(row.before, row.old)), el("td", {class: "num"}, us(row.after, row.now)), el("td", {class: "mono"}, row.pass),
  ]);
}

function nodes() {
  if (!rows.length) return section("nodes", "Nodes", el("p", {class: "empty"}, "No costs were taken."));
  const state = {sort: "now", down: true, filter: "", limit: PAGE};
  const body = el("tbody"), heads = new Map(), count = el("span", {class: "soft small", role: "status"});
  const more = el("button", {class: "plain", type: "button"});
  const search = el("input", {type: "search", placeholder: "Filter by node, op, module, kernel or pass", "aria-label": "Filter the nodes"});
  const which = el("select", {"aria-label": "Which nodes"}, [["all", "all nodes"], ["new", "new"], ["gone", "removed"], ["run", "that run something"]].map(([value, label]) => el("option", {value}, label)));
  const matches = (row) => (which.value === "all" || (which.value === "run" ? row.after && row.after[LAUNCHES] > 0 : row.state === which.value)) && state.filter.split(/\s+/).every((word) => row.key.includes(word));
  const compare = (a, b) => {
    const [x, y] = [a[state.sort], b[state.sort]];
    if (x === y) return a.i - b.i;
    if (x === null || x === undefined || x === "") return 1;
    if (y === null || y === undefined || y === "") return -1;
    return (x < y ? -1 : 1) * (state.down ? -1 : 1);
  };
  function draw() {
    const found = rows.filter(matches);
    if (state.sort !== "order") found.sort(compare);
    body.replaceChildren(...found.slice(0, state.limit).map(drawRow));
    count.textContent = `${found.length} of ${rows.length} nodes`;
    more.hidden = found.length <= state.limit;
    more.textContent = `Show ${Math.min(PAGE * 10, found.length - state.limit)} more`;
    for (const [id, head] of heads) head.setAttribute("aria-sort", id === state.sort ? (state.down ? "descending" : "ascending") : "none");
  }
  const head = COLUMNS.map((column) => {
    const button = el("button", {type: "button"}, column.label);
    button.addEventListener("click", () => {
      if (state.sort !== column.id) { state.sort = column.id; state.down = Boolean(column.num); }
      else if (state.down === Boolean(column.num)) state.down = !state.down;
      else { state.sort = "order"; }
      draw();
    });
    const cell = el("th", {scope: "col", class: column.num ? "num" : null, "aria-sort": "none"}, button);
    heads.set(column.id, cell);
    return cell;
  });
  let timer = 0;
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => { state.filter = search.value.trim().toLowerCase(); state.limit = PAGE; draw(); }, 80); });
  which.addEventListener("change", () => { state.limit = PAGE; draw(); });
  more.addEventListener("click", () => { state.limit += PAGE * 10; draw(); });
  draw();
  return section("nodes", "Nodes",
    el("p", {class: "soft small"}, "Time is the roofline prediction; a click on a node shows its formulas, inputs and source line, a third click on a column head restores program order."),
    el("div", {class: "bar-row"}, search, which, count),
    el("div", {class: "scroll box"}, el("table", null, el("thead", null, el("tr", null, head)), body)), more);
}
