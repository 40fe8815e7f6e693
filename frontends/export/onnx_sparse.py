"""Block-sparse attention in ONNX: a function of standard operators over gathered windows.

Every block of queries meets the keys of its own list, gathered side by side and padded to the longest list,
in one Attention over (heads x blocks). What is computed and read shrinks with the density of the layout, in
any runtime. The function has a name of its own in the `tilewright` domain, so that a runtime with a native
kernel of that name takes that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import AttributeProto, FunctionProto, NodeProto, helper
from torch import Tensor, fx

from tilewright.compiler.block_layout import Kind, Predicate, index_predicate, unflatten
from tilewright.frontends.export.onnx_graph import OPSET, TILEWRIGHT, OnnxGraph, Unsupported, shape_of
from tilewright.frontends.export.onnx_pointwise import Arguments, Converter

PLAIN, MASKED = "BlockSparseAttention", "MaskedBlockSparseAttention"


@dataclass(frozen=True)
class Windows:
    """One group of heads as gathers: nQ blocks of at most R queries, each with at most L keys."""

    queries: Tensor
    """int64 [nQ R]: the token of each query place; places that are empty name token 0."""
    keys: Tensor
    """int64 [nQ L]: the token of each key place."""
    inverse: Tensor
    """int64 [S]: the place of each query token."""
    mask: Tensor
    """bool [nQ, 1, R, L]: which pairs count."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(nQ, R, L)."""
        return self.mask.shape[0], self.mask.shape[2], self.mask.shape[3]


def windows(layout: dict[str, Tensor | None], rules: list[Predicate], group: int, tokens: int) -> Windows:
    """The gathers of one group of a static layout. Unsupported for queries without a key or a place."""

    mine = {n: v[group if v.shape[0] > 1 else 0].long() for n, v in layout.items() if v is not None}
    row_ptr, col, q_off, k_off = (mine[n] for n in ("row_ptr", "col", "q_off", "k_off"))
    flag, src_q, src_k = (mine.get(n) for n in ("flag", "src_q", "src_k"))
    rows = []
    for r in range(len(q_off) - 1):
        i = torch.arange(int(q_off[r]), int(q_off[r + 1]))
        entries = range(int(row_ptr[r]), int(row_ptr[r + 1]))
        blocks = [torch.arange(int(k_off[col[e]]), int(k_off[col[e] + 1])) for e in entries]
        kinds = [0 if flag is None else int(flag[e]) for e in entries]
        allowed = [
            torch.ones(len(i), len(j), dtype=torch.bool) if p == 0 else index_predicate(rules[p - 1], i, j)
            for p, j in zip(kinds, blocks, strict=True)
        ]
        empty = torch.zeros(len(i), 0, dtype=torch.bool)
        rows.append((i, torch.cat([*blocks, i[:0]]), torch.cat([empty, *allowed], 1)))
    if any(len(i) and not bool(kept.any(1).all()) for i, _, kept in rows):
        raise Unsupported("a layout with queries that attend to nothing")
    high, wide = max(len(i) for i, _, _ in rows), max(len(j) for _, j, _ in rows)
    queries = torch.zeros(len(rows), high, dtype=torch.int64)
    keys = torch.zeros(len(rows), wide, dtype=torch.int64)
    mask = torch.zeros(len(rows), 1, high, wide, dtype=torch.bool)
    inverse = torch.full((tokens,), -1)
    for r, (i, j, kept) in enumerate(rows):
        place_q, place_k = (i if src_q is None else src_q[i]), (j if src_k is None else src_k[j])
        queries[r, : len(i)], keys[r, : len(j)] = place_q, place_k
        mask[r, 0, : len(i), : len(j)] = kept
        mask[r, 0, len(i) :] = True  # places without a query: anything but an empty softmax
        inverse[place_q] = r * high + torch.arange(len(i))
    if bool((inverse < 0).any()):
        raise Unsupported("a layout that leaves queries out")
    return Windows(queries.flatten(), keys.flatten(), inverse, mask)


_STATIC = ("row_ptr", "col", "q_off", "k_off", "head_group", "flag", "src_q", "src_k")
_OF_THE_CALL = ("k_valid", "q_valid", "limit", "mask")


def _block_sparse_attention(g: OnnxGraph, node: fx.Node, a: Arguments) -> list[str]:
    if any(user.args[1] == 1 and user.users for user in node.users):
        raise Unsupported("its log-sum-exp is read")
    given = [name for name in (*_STATIC, *_OF_THE_CALL) if a[name] is not None]
    online = [name for name in given if name in _OF_THE_CALL or not g.is_held(a[name])]
    if online:
        raise Unsupported(f"a layout whose {', '.join(online)} only the call knows")
    rules = unflatten(a["predicates"] or [])
    if any(rule.kind in (Kind.USER, Kind.PAD_SELF) for rule in rules):
        raise Unsupported("a layout with predicates that read data")
    q, k, v = (shape_of(a[n]) for n in "qkv")
    if not all(isinstance(n, int) for n in (*q[1:], *k[1:], *v[1:])):
        raise Unsupported("lengths that only the call knows")
    layout = {name: None if a[name] is None else g.tensor(a[name]) for name in _STATIC}
    heads = layout["head_group"]
    assert heads is not None, "required"
    if heads.shape[0] > 1 and bool((heads != heads[:1]).any()):
        raise Unsupported("a layout that differs within a batch")
    groups: dict[int, list[int]] = {}
    for head, group in enumerate(heads[0].tolist()):
        groups.setdefault(group, []).append(head)
    if len(groups) > 1 and q[1] != k[1]:
        raise Unsupported("groups of heads over shared keys")
    scale = q[3] ** -0.5 if a["scale"] is None else a["scale"]
    names, found = [g.name(a[n]) for n in "qkv"], list[str]()
    for group, members in sorted(groups.items()):
        some = names
        if len(groups) > 1:
            which = g.constant(members, torch.int64)
            some = [g.shared("heads", "Gather", [name, which], axis=1) for name in names]
        key = (group, q[2], *[id(layout[n]) for n in _STATIC])
        if key not in g.tables:
            g.tables[key] = windows(layout, rules, group, q[2])
        table = g.tables[key]
        found.append(_call(g, some, table, len(members), q, k, v, float(scale)))
    if len(found) == 1:
        return found
    order = [head for _, members in sorted(groups.items()) for head in members]
    back = g.constant(sorted(range(len(order)), key=order.__getitem__), torch.int64)
    return [g.node("Gather", [g.node("Concat", found, axis=1), back], axis=1)]


def _call(
    g: OnnxGraph, names: list[str], table: Windows, heads: int, q: Any, k: Any, v: Any, scale: float
) -> str:
    """One call of the function for one group of `heads` heads."""
    blocks, rows, keys = table.sizes
    shared = q[1] != k[1]
    inputs = [*names, *[g.constant(t, torch.int64) for t in (table.queries, table.keys, table.inverse)]]
    masked = shared or not bool(table.mask.all())
    if masked:
        if not isinstance(q[0], int):
            raise Unsupported("a ragged layout over a batch that only the call knows")
        inputs.append(g.constant(table.mask.repeat(q[0], 1, 1, 1), torch.bool))
        kv = k[1] if shared else heads
        sizes = {"q_shape": [0, heads, blocks, rows, q[3]], "k_shape": [0, kv, blocks, keys, k[3]]}
        sizes |= {"v_shape": [0, kv, blocks, keys, v[3]]}
        sizes |= {"q_flat": [-1, heads, rows, q[3]], "k_flat": [-1, kv, keys, k[3]]}
        sizes |= {"v_flat": [-1, kv, keys, v[3]], "split": [-1, blocks, heads, rows, v[3]]}
        sizes |= {"whole": [-1, heads, blocks * rows, v[3]]}
    else:
        sizes = {"q_shape": [0, heads * blocks, rows, q[3]], "k_shape": [0, heads * blocks, keys, k[3]]}
        sizes |= {"v_shape": [0, heads * blocks, keys, v[3]], "whole": [0, heads, blocks * rows, v[3]]}
    name = MASKED if masked else PLAIN
    g.functions.setdefault(name, _masked_function() if masked else _plain_function())
    attributes: dict[str, Any] = {**sizes, "scale": scale}
    return g.node(name, inputs, domain=TILEWRIGHT, **attributes)


def _ints(attribute: str) -> NodeProto:
    """An int64 vector from an attribute of the function."""
    node = helper.make_node("Constant", [], [attribute])
    node.attribute.add(name="value_ints", ref_attr_name=attribute, type=AttributeProto.INTS)
    return node


def _attention(inputs: Sequence[str], output: str) -> NodeProto:
    node = helper.make_node("Attention", list(inputs), [output])
    node.attribute.add(name="scale", ref_attr_name="scale", type=AttributeProto.FLOAT)
    return node


def _function(name: str, inputs: list[str], attributes: list[str], nodes: list[NodeProto]) -> FunctionProto:
    body = [*[_ints(a) for a in attributes], *nodes]
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(TILEWRIGHT, name, inputs, ["out"], body, imports, [*attributes, "scale"])


_TENSORS = [("q", "queries"), ("k", "keys"), ("v", "keys")]


def _plain_function() -> FunctionProto:
    """Whole windows, as many key heads as query heads: blocks become heads, nothing is transposed."""
    make, nodes = helper.make_node, []
    for x, places in _TENSORS:
        nodes.append(make("Gather", [x, places], [f"{x}_rows"], axis=2))
        nodes.append(make("Reshape", [f"{x}_rows", f"{x}_shape"], [f"{x}_blocks"]))
    nodes.append(_attention(["q_blocks", "k_blocks", "v_blocks"], "o_blocks"))
    nodes.append(make("Reshape", ["o_blocks", "whole"], ["o_rows"]))
    nodes.append(make("Gather", ["o_rows", "inverse"], ["out"], axis=2))
    inputs = ["q", "k", "v", "queries", "keys", "inverse"]
    return _function(PLAIN, inputs, ["q_shape", "k_shape", "v_shape", "whole"], nodes)


def _masked_function() -> FunctionProto:
    """Ragged windows, or key heads that several query heads share: blocks become the batch."""
    make, nodes, order = helper.make_node, [], [0, 2, 1, 3, 4]
    for x, places in _TENSORS:
        nodes.append(make("Gather", [x, places], [f"{x}_rows"], axis=2))
        nodes.append(make("Reshape", [f"{x}_rows", f"{x}_shape"], [f"{x}_split"]))
        nodes.append(make("Transpose", [f"{x}_split"], [f"{x}_turned"], perm=order))
        nodes.append(make("Reshape", [f"{x}_turned", f"{x}_flat"], [f"{x}_blocks"]))
    nodes.append(_attention(["q_blocks", "k_blocks", "v_blocks", "mask"], "o_blocks"))
    nodes.append(make("Reshape", ["o_blocks", "split"], ["o_split"]))
    nodes.append(make("Transpose", ["o_split"], ["o_turned"], perm=order))
    nodes.append(make("Reshape", ["o_turned", "whole"], ["o_rows"]))
    nodes.append(make("Gather", ["o_rows", "inverse"], ["out"], axis=2))
    inputs = ["q", "k", "v", "queries", "keys", "inverse", "mask"]
    sizes = ["q_shape", "k_shape", "v_shape", "q_flat", "k_flat", "v_flat", "split", "whole"]
    return _function(MASKED, inputs, sizes, nodes)


SPARSE: dict[str, Converter] = {"tilewright::block_sparse_attention": _block_sparse_attention}
