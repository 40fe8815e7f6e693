"use strict";
// The graph by module: boxes are modules, a click opens one in place; leaves are nodes. Layers follow the data flow.
const BOX = {w: 216, h: 44}, LEAF = {w: 186, h: 38}, GAP = {x: 14, y: 20}, PAD = 14, HEAD = 26, LANE = 46;
const WRAP = 4, CHUNK = 48;

function makeTree(side) {
  const root = {path: "", label: "program", groups: new Map(), leaves: []};
  for (const row of rows) {
    if (!row[side]) continue;
    let at = root;
    for (const part of row.module ? row.module.split(".") : []) {
      if (!at.groups.has(part)) at.groups.set(part, {path: at.path ? `${at.path}.${part}` : part, label: part, groups: new Map(), leaves: []});
      at = at.groups.get(part);
    }
    at.leaves.push({leaf: true, row, path: `\u0000${row.i}`, first: row.i, us: row[side][US] || 0, count: 1, fresh: row.state === (side === "after" ? "new" : "gone") ? 1 : 0});
  }
  return finish(root);
}

// Children in program order; a chain of single modules becomes one box, a long row of children is cut into parts.
function finish(group) {
  const children = [...group.groups.values()].map(finish);
  for (const child of children) {
    while (child.children.length === 1 && !child.children[0].leaf) {
      const only = child.children[0];
      Object.assign(child, {path: only.path, label: `${child.label}.${only.label}`, children: only.children});
    }
  }
  const all = [...children, ...group.leaves].sort((a, b) => a.first - b.first);
  group.children = all.length > CHUNK * 1.5 ? parts(group.path, all) : all;
  return summed(group);
}

function parts(path, children) {
  const made = [];
  for (let i = 0; i < children.length; i += CHUNK) {
    const some = children.slice(i, i + CHUNK), name = (item) => (item.leaf ? item.row.name : item.label);
    made.push(summed({path: `${path}\u0001${i}`, label: `${name(some[0])} \u2026 ${name(some[some.length - 1])}`, children: some}));
  }
  return made;
}

function summed(group) {
  Object.assign(group, {us: 0, count: 0, fresh: 0, first: Infinity, open: false});
  for (const c of group.children) { group.us += c.us; group.count += c.count; group.fresh += c.fresh; group.first = Math.min(group.first, c.first); }
  return group;
}

// Data flow between the children of every group, from the inputs of its nodes.
function connect(root, side) {
  const chain = new Map();
  (function walk(group, above) {
    group.edges = new Map();
    for (const c of group.children) {
      const here = [...above, [group, c]];
      if (c.leaf) chain.set(c.row.i, here); else walk(c, here);
    }
  })(root, []);
  for (const [i, to] of chain) {
    for (const input of rows[i][side][INPUTS]) {
      const from = chain.get(input);
      if (!from || input === i) continue;
      let k = 0;
      while (from[k][1] === to[k][1]) k += 1;
      const [group, target] = to[k], source = from[k][1];
      if (!group.edges.has(target)) group.edges.set(target, new Set());
      group.edges.get(target).add(source);
    }
  }
}

// Size and places of a group's children: [{item, x, y, w, h}], layer by layer.
function layout(group) {
  const level = new Map(), place = new Map(), layers = [];
  for (const item of group.children) {
    let at = 0;
    for (const source of group.edges.get(item) || []) if (source.first < item.first) at = Math.max(at, level.get(source) + 1);
    level.set(item, at);
    (layers[at] = layers[at] || []).push(item);
  }
  let y = PAD, width = 0;
  const lines = [];
  for (const layer of layers) {
    for (let i = 0; i < layer.length; i += WRAP) {
      const line = layer.slice(i, i + WRAP).map((item) => {
        const inner = !item.leaf && item.open ? layout(item) : null;
        const size = inner ? {w: Math.max(inner.w, BOX.w), h: inner.h + HEAD} : item.leaf ? LEAF : BOX;
        return {item, inner, w: size.w, h: size.h};
      });
      const w = line.reduce((sum, box) => sum + box.w + GAP.x, -GAP.x);
      const h = Math.max(...line.map((box) => box.h));
      lines.push({line, w, y});
      width = Math.max(width, w);
      y += h + GAP.y;
    }
  }
  for (const {line, w, y: top} of lines) {
    let x = PAD + (width - w) / 2;
    for (const box of line) { place.set(box.item, {...box, x, y: top}); x += box.w + GAP.x; }
  }
  return {place, level, w: width + 2 * PAD + LANE, h: y - GAP.y + PAD};
}

function cut(text, width) {
  const most = Math.floor(width / 7.3);
  const shown = clean(text);
  return shown.length > most ? `${shown.slice(0, most - 1)}\u2026` : shown;
}

function drawEdges(group, made, into) {
  const fan = new Map();
  for (const sources of group.edges.values()) for (const s of sources) fan.set(s, (fan.get(s) || 0) + 1);
  for (const [target, sources] of group.edges) {
    const b = made.place.get(target);
    for (const source of sources) {
      const a = made.place.get(source), apart = made.level.get(target) - made.level.get(source);
      if (apart === 1) {
        const [x1, y1, x2, y2] = [a.x + a.w / 2, a.y + a.h, b.x + b.w / 2, b.y];
        const mid = (y1 + y2) / 2;
        into.append(svg("path", {class: "edge", d: `M${x1},${y1} C${x1},${mid} ${x2},${mid} ${x2},${y2 - 4}`}));
        into.append(svg("path", {class: "head", d: `M${x2 - 3.5},${y2 - 6} L${x2 + 3.5},${y2 - 6} L${x2},${y2} Z`}));
      } else if (fan.get(source) <= 6) {
        const [x1, y1, x2, y2] = [a.x + a.w, a.y + a.h / 2, b.x + b.w, b.y + b.h / 2];
        const out = Math.max(x1, x2) + Math.min(LANE + PAD - 6, 16 + 5 * Math.abs(apart));
        into.append(svg("path", {class: "edge", d: `M${x1},${y1} C${out},${y1} ${out},${y2} ${x2 + 5},${y2}`}));
        into.append(svg("path", {class: "head", d: `M${x2 + 6},${y2 - 3.5} L${x2 + 6},${y2 + 3.5} L${x2},${y2} Z`}));
      }
    }
  }
  return fan;
}

function drawGroup(group, made, into, view) {
  const fan = drawEdges(group, made, into);
  for (const [item, box] of made.place) {
    const open = Boolean(box.inner);
    const name = item.leaf ? item.row.name : item.label;
    const times = item.us ? ` \u00b7 ${duration(item.us / 1e6)}` : "";
    const users = fan.get(item) > 6 ? ` \u00b7 feeds ${fan.get(item)}` : "";
    const op = item.leaf ? shortOp(texts[item.row[view.side][OP]]) : plural(item.count, "node");
    const marks = item.fresh && !item.leaf ? ` \u00b7 ${item.fresh} ${view.side === "after" ? "new" : "removed"}` : "";
    const label = `${name}, ${op}${times}${marks}`;
    const g = svg("g", {
      class: `${item.leaf ? "leaf" : open ? "bar" : "group"}${item.fresh && !open ? " fresh" : ""}`, transform: `translate(${box.x},${box.y})`,
      role: "button", tabindex: "0", "aria-label": label,
    }, svg("title", null, item.leaf ? label : `${item.path}: ${label}`));
    if (!item.leaf) g.setAttribute("aria-expanded", String(open));
    const shape = svg("rect", {width: box.w, height: open ? HEAD - 4 : box.h, rx: 7});
    if (open) into.append(svg("g", {class: `open${item.fresh ? " fresh" : ""}`, transform: `translate(${box.x},${box.y})`}, svg("rect", {width: box.w, height: box.h, rx: 9})));
    g.append(shape);
    if (!open && item.us) g.append(svg("rect", {class: "heat", x: 4, y: 6, width: 4, height: box.h - 12, rx: 2, opacity: Math.max(0.12, Math.sqrt(item.us / view.most)).toFixed(2)}));
    g.append(svg("text", {x: 14, y: open ? 17 : 17}, cut(open ? `${name} \u25b4` : name, box.w - 24)));
    if (!open) g.append(svg("text", {class: "sub", x: 14, y: item.leaf ? 31 : 34}, cut(`${op}${times}${marks}${users}`, (box.w - 20) * 1.15)));
    g.addEventListener("click", () => view.press(item));
    g.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); view.press(item); } });
    view.marks.set(item.path, g);
    into.append(g);
    if (open) {
      const inside = svg("g", {transform: `translate(${box.x + (box.w - box.inner.w) / 2},${box.y + HEAD})`});
      drawGroup(item, box.inner, inside, view);
      into.append(inside);
    }
  }
}

// Opens what holds most of the program, as long as the picture stays small.
function openFirst(root) {
  root.open = true;
  let visible = root.children.length;
  for (;;) {
    const closed = [];
    (function walk(g) { for (const c of g.children) if (!c.leaf) { if (c.open) walk(c); else closed.push(c); } })(root);
    const next = closed.sort((a, b) => b.count - a.count)[0];
    if (!next || next.count < root.count / 2 || visible + next.children.length > 70) return;
    next.open = true;
    visible += next.children.length;
  }
}

function graph() {
  if (!rows.length) return section("graph", "Graph", el("p", {class: "empty"}, "No graph was recorded."));
  const holder = el("div", {class: "graph", role: "group", "aria-label": "Modules and their data flow"});
  const detail = el("div", {"aria-live": "polite"});
  const which = el("select", {"aria-label": "Which program"}, el("option", {value: "after"}, "after the passes"), el("option", {value: "before"}, "before the passes"));
  const close = el("button", {class: "plain", type: "button"}, "Close all");
  const trees = new Map();
  const view = {side: "after", marks: new Map(), most: 1, press: null};
  function tree() {
    if (!trees.has(view.side)) { const made = makeTree(view.side); connect(made, view.side); openFirst(made); trees.set(view.side, made); }
    return trees.get(view.side);
  }
  function draw(focus) {
    const root = tree(), made = layout(root);
    view.most = Math.max(...root.children.map(function top(c) { return c.leaf || !c.open ? c.us : Math.max(...c.children.map(top)); }), 1e-9);
    view.marks.clear();
    const [x, y] = [holder.scrollLeft, holder.scrollTop];
    const picture = svg("svg", {width: made.w, height: made.h, viewBox: `0 0 ${made.w} ${made.h}`});
    drawGroup(root, made, picture, view);
    holder.replaceChildren(picture);
    holder.scrollTo(x, y);
    if (focus && view.marks.has(focus)) view.marks.get(focus).focus({preventScroll: true});
  }
  view.press = (item) => {
    if (item.leaf) { detail.replaceChildren(el("div", {class: "box"}, el("h3", null, item.row.name), nodeDetail(item.row))); return; }
    item.open = !item.open;
    draw(item.path);
  };
  close.addEventListener("click", () => { (function walk(g) { for (const c of g.children) if (!c.leaf) { c.open = false; walk(c); } })(tree()); draw(); });
  which.addEventListener("change", () => { view.side = which.value; detail.replaceChildren(); draw(); });
  if (!rows.some((row) => row.after)) { view.side = "before"; which.value = "before"; }
  draw();
  return section("graph", "Graph", el("p", {class: "soft small"}, "Boxes are modules; a click, Enter or Space opens one. The bar on the left is its share of the predicted time, a green border holds what passes inserted."),
    el("div", {class: "bar-row"}, which, close), holder, detail);
}
