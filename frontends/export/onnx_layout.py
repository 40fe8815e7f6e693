"""ATen shapes, slices, gathers and constructors as standard ONNX operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilewright.frontends.export.onnx_graph import (
    OnnxGraph,
    Unsupported,
    dtype_of,
    rank_of,
    shape_of,
)
from tilewright.frontends.export.onnx_pointwise import Arguments, Converter

_END = 1 << 62
"""Anything at least this large means "to the end" in a slice."""


def _sizes(g: OnnxGraph, node: fx.Node, asked: list[Any]) -> str:
    """The int64 vector of a result's sizes; static where the result's shape is known."""
    known = shape_of(node)
    return g.ints([k if isinstance(k, int) else a for k, a in zip(known, asked, strict=True)])


def _reshape(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    asked = list(a.get("shape") or a.get("size") or [])
    known = shape_of(node)
    unknown = [i for i, k in enumerate(known) if not isinstance(k, int)]
    if len(unknown) == 1 and 0 not in known:
        target = g.constant([k if isinstance(k, int) else -1 for k in known], torch.int64)
    else:
        target = _sizes(g, node, asked)
    return g.node("Reshape", [g.name(a["self"]), target], allowzero=int(0 in known))


def _reshape_to_known(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    """flatten, unflatten, view_as: the result's shape with at most one size unknown."""
    known = shape_of(node)
    if sum(not isinstance(k, int) for k in known) > 1:
        raise Unsupported("a shape with two sizes that only the call knows")
    target = [k if isinstance(k, int) else -1 for k in known]
    return g.node("Reshape", [g.name(a["self"]), g.constant(target, torch.int64)], allowzero=int(0 in known))


def _unsqueeze(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    axis = a["dim"] if a["dim"] >= 0 else a["dim"] + rank_of(node)
    return g.node("Unsqueeze", [g.name(a["self"]), g.constant([axis], torch.int64)])


def _squeeze(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    given = shape_of(a["self"])
    asked = a.get("dim")
    axes = range(len(given)) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = [i % len(given) for i in axes if isinstance(given[i], int) and given[i] == 1]
    if not gone:
        return g.name(a["self"])
    return g.node("Squeeze", [g.name(a["self"]), g.constant(gone, torch.int64)])


def _permute(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    rank = rank_of(node)
    return g.node("Transpose", [g.name(a["self"])], perm=[d % rank for d in a["dims"]])


def _transpose(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    rank = rank_of(node)
    order = list(range(rank))
    one, two = (a["dim0"] % rank, a["dim1"] % rank) if "dim0" in a else (rank - 2, rank - 1)
    order[one], order[two] = order[two], order[one]
    return g.node("Transpose", [g.name(a["self"])], perm=order)


def _expand(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    known = shape_of(node)
    asked = [1 if isinstance(s, int) and s == -1 else s for s in a["size"]]
    if all(isinstance(k, int) for k in known):
        asked = known
    return g.node("Expand", [g.name(a["self"]), g.ints(asked)])


def _repeat(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    counts, source = list(a["repeats"]), g.name(a["self"])
    extra = len(counts) - rank_of(a["self"])
    if extra:
        axes = g.constant(list(range(extra)), torch.int64)
        source = g.node("Unsqueeze", [source, axes])
    return g.node("Tile", [source, g.ints(counts)])


def _slice(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    start = 0 if a.get("start") is None else a["start"]
    end = a.get("end")
    end = (1 << 63) - 1 if end is None or (isinstance(end, int) and end >= _END) else end
    inputs = [g.ints([start]), g.ints([end]), g.constant([a["dim"]], torch.int64), g.ints([a["step"]])]
    return g.node("Slice", [g.name(a["self"]), *inputs])


def _narrow(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    if not (isinstance(a["start"], int) and isinstance(a["length"], int) and a["start"] >= 0):
        raise Unsupported("narrow with a start or length that only the call knows")
    return _slice(g, node, {**a, "end": a["start"] + a["length"], "step": 1})


def _diff(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    """Neighbours subtracted `n` times, after `prepend` and before `append`; of bools, where they differ."""
    axis, dtype = a["dim"] % rank_of(node), dtype_of(a["self"])
    parts = [g.name(part) for part in (a.get("prepend"), a["self"], a.get("append")) if part is not None]
    found = parts[0] if len(parts) == 1 else g.node("Concat", parts, axis=axis)
    zero, one, last, end = (g.constant([n], torch.int64) for n in (0, 1, -1, _END))
    along = g.constant([axis], torch.int64)
    for _ in range(a.get("n", 1)):
        later = g.node("Slice", [found, one, end, along])
        earlier = g.node("Slice", [found, zero, last, along])
        found = g.node("Xor" if dtype == torch.bool else "Sub", [later, earlier])
    return found


def _select(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("Gather", [g.name(a["self"]), g.operand(a["index"], torch.int64)], axis=a["dim"])


def _concat(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype, rank = dtype_of(node), rank_of(node)
    parts = [t for t in a["tensors"] if not (rank_of(t) == 1 and shape_of(t)[0] == 0 and rank > 1)]
    names = [g.operand(t, dtype) for t in parts]
    return names[0] if len(names) == 1 else g.node("Concat", names, axis=a["dim"])


def _stack(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    axis, dtype = a["dim"] % rank_of(node), dtype_of(node)
    where = g.constant([axis], torch.int64)
    parts = [g.shared(axis, "Unsqueeze", [g.operand(t, dtype), where]) for t in a["tensors"]]
    return g.node("Concat", parts, axis=axis)


def _pieces(g: OnnxGraph, node: fx.Node, a: Arguments) -> list[str]:
    """chunk, split, split_with_sizes: sizes as the results have them."""
    axis = a["dim"]
    sizes = [value.shape[axis] for value in node.meta["val"]]
    if len(sizes) == 1:
        return [g.name(a["self"])]
    if not all(isinstance(s, int) for s in sizes):
        raise Unsupported("a split whose sizes only the call knows")
    source = [g.name(a["self"]), g.constant([int(s) for s in sizes], torch.int64)]
    return g.node_many("Split", source, len(sizes), axis=axis)


def _unbind(g: OnnxGraph, node: fx.Node, a: Arguments) -> list[str]:
    count, where = len(node.meta["val"]), g.constant([a["dim"]], torch.int64)
    if count == 1:
        return [g.node("Squeeze", [g.name(a["self"]), where])]
    parts = g.node_many("Split", [g.name(a["self"])], count, axis=a["dim"], num_outputs=count)
    return [g.node("Squeeze", [part, where]) for part in parts]


def _getitem(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    source, index = node.args
    assert isinstance(source, fx.Node)
    found = g.values[source]
    if not isinstance(found, list):
        raise Unsupported("an index into a tensor")
    return str(found[index])  # type: ignore[index]


def _size(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    axis = a["dim"] % rank_of(a["self"])
    known = shape_of(a["self"])[axis]
    if isinstance(known, int):
        return g.constant(known, torch.int64)
    found = g.node("Shape", [g.name(a["self"])], start=axis, end=axis + 1)
    return g.node("Squeeze", [found])


def _arange(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype = dtype_of(node)
    bounds = [a.get("start") or 0, a["end"], 1 if a.get("step") is None else a["step"]]
    return g.node("Range", [g.operand(b, dtype) for b in bounds])


def _filled(value: float | None) -> Converter:
    """full, zeros, ones and their `_like` forms; `value` None: the argument says."""

    def convert(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
        dtype, known = dtype_of(node), shape_of(node)
        fill = a["fill_value"] if value is None else value
        if isinstance(fill, fx.Node):
            raise Unsupported("full with a value that only the call knows")
        if all(isinstance(k, int) for k in known):
            return g.node("Expand", [g.constant(fill, dtype), g.constant(known, torch.int64)])
        if "size" in a:
            return g.node("Expand", [g.constant(fill, dtype), _sizes(g, node, list(a["size"]))])
        return g.node("Expand", [g.constant(fill, dtype), g.node("Shape", [g.name(a["self"])])])

    return convert


def _scalar_tensor(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.operand(a["s"], dtype_of(node))


def _gather(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("GatherElements", [g.name(a["self"]), g.name(a["index"])], axis=a["dim"])


def _index_select(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("Gather", [g.name(a["self"]), g.name(a["index"])], axis=a["dim"])


def _index(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    """x[i, j, ...]: indices on the leading axes, or one index on any axis."""
    indices = list(a["indices"])
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if any(dtype_of(i) == torch.bool for _, i in given):
        raise Unsupported("an index by a boolean tensor, whose result has no known size")
    source = g.name(a["self"])
    if len(given) == 1:
        axis, index = given[0]
        return g.node("Gather", [source, g.operand(index, torch.int64)], axis=axis)
    if [axis for axis, _ in given] != list(range(len(given))):
        raise Unsupported("indices that are not on the leading axes")
    total = g.operand(given[0][1], torch.int64)
    for _, index in given[1:]:  # the common shape: adding zeros broadcasts
        zero = g.node("Mul", [g.operand(index, torch.int64), g.constant(0, torch.int64)])
        total = g.node("Add", [total, zero])
    shape, last = g.node("Shape", [total]), g.constant([-1], torch.int64)
    parts = [
        g.node("Unsqueeze", [g.node("Expand", [g.operand(i, torch.int64), shape]), last]) for _, i in given
    ]
    return g.node("GatherND", [source, g.node("Concat", parts, axis=-1)])


def _index_copy(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    """Writing rows at positions of one axis: ScatterND on that axis brought to the front."""
    rank, axis = rank_of(node), a["dim"] % rank_of(node)
    order = [axis, *[d for d in range(rank) if d != axis]]
    back = sorted(range(rank), key=lambda d: order[d])
    target = g.node("Transpose", [g.name(a["self"])], perm=order)
    rows = g.node("Transpose", [g.name(a["source"])], perm=order)
    where = g.node("Unsqueeze", [g.operand(a["index"], torch.int64), g.constant([-1], torch.int64)])
    return g.node("Transpose", [g.node("ScatterND", [target, where, rows])], perm=back)


def _triangle(upper: bool) -> Converter:
    def convert(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
        inputs = [g.name(a["self"]), g.operand(a["diagonal"], torch.int64)]
        if dtype_of(node) != torch.bool:
            return g.node("Trilu", inputs, upper=int(upper))
        whole = g.node("Trilu", [g.cast(inputs[0], torch.bool, torch.int64), inputs[1]], upper=int(upper))
        return g.cast(whole, torch.int64, torch.bool)

    return convert


def _pad(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    rank, pairs = rank_of(node), list(a["pad"])
    before, after = [0] * rank, [0] * rank
    for i in range(len(pairs) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pairs[2 * i], pairs[2 * i + 1]
    if a.get("mode", "constant") != "constant":
        raise Unsupported(f"padding mode {a['mode']!r}")
    fill = g.constant(a.get("value") or 0, dtype_of(node))
    return g.node("Pad", [g.name(a["self"]), g.ints([*before, *after]), fill])


LAYOUT: dict[str, Converter] = {
    "getitem": _getitem,
    "aten::getitem": _getitem,
    "aten::reshape": _reshape,
    "aten::view": _reshape,
    "aten::_unsafe_view": _reshape,
    "aten::flatten": _reshape_to_known,
    "aten::unflatten": _reshape_to_known,
    "aten::unsqueeze": _unsqueeze,
    "aten::squeeze": _squeeze,
    "aten::permute": _permute,
    "aten::transpose": _transpose,
    "aten::t": _transpose,
    "aten::expand": _expand,
    "aten::repeat": _repeat,
    "aten::slice": _slice,
    "aten::narrow": _narrow,
    "aten::diff": _diff,
    "aten::select": _select,
    "aten::cat": _concat,
    "aten::concat": _concat,
    "aten::stack": _stack,
    "aten::chunk": _pieces,
    "aten::split": _pieces,
    "aten::split_with_sizes": _pieces,
    "aten::unbind": _unbind,
    "aten::sym_size": _size,
    "aten::arange": _arange,
    "aten::full": _filled(None),
    "aten::full_like": _filled(None),
    "aten::new_full": _filled(None),
    "aten::zeros": _filled(0),
    "aten::zeros_like": _filled(0),
    "aten::new_zeros": _filled(0),
    "aten::ones": _filled(1),
    "aten::ones_like": _filled(1),
    "aten::new_ones": _filled(1),
    "aten::scalar_tensor": _scalar_tensor,
    "aten::gather": _gather,
    "aten::index_select": _index_select,
    "aten::index": _index,
    "aten::index_copy": _index_copy,
    "aten::tril": _triangle(False),
    "aten::triu": _triangle(True),
    "aten::pad": _pad,
    "aten::constant_pad_nd": _pad,
}
"""By schema name."""
