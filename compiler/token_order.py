"""How a reordering of tokens travels through a graph: on which axis of each value, and what is in its way.

Ops that treat tokens alike commute with a permutation of them. `operands_for` is the one table of rules: it
says which operands must be permuted for an op's result to come out permuted. The other direction,
`result_for`, is read off the same table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.dataflow import is_pointwise, op_name, tensor_of
from tilewright.compiler.schema import arguments


@dataclass(frozen=True)
class Moved:
    """A permutation of a run of tokens, as far as the rules need it."""

    count: int
    """Length of the run."""
    adapts: frozenset[fx.Node] = frozenset()
    """Block-sparse attentions whose index maps the caller rewrites for the new order."""


@dataclass(frozen=True)
class Placed:
    """A value's tokens start .. start + count - 1 along `axis` are permuted.

    A value that is a tuple of parts has the place in the tensor that was cut.
    """

    axis: int
    start: int


Wanted = list[tuple[fx.Node, Placed]]
"""Operands and how they must be permuted; operands that are not named must not be."""
INVARIANT = None
"""The result does not depend on the order of the tokens."""

_SAME = frozenset(
    {"clone", "contiguous", "to", "_to_copy", "alias", "detach", "dropout", "type_as", "lift_fresh"}
)
_BROADCAST = frozenset({"gated_mlp", "where", "masked_fill"})
_ROWS = frozenset(
    {"linear", "linear_multi", "quantized_linear", "quantized_linear_multi", "hadamard"}
    | {"rms_norm", "add_rms_norm", "layer_norm"}
)
"""Ops that treat every row of their first operand alike; of the others only `residual` is read by row."""
_CUTS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split"})
_FILLS = frozenset({"ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "new_zeros", "new_ones"})


def operands_for(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    """What the operands of a call must be for its result to be permuted, or why they cannot be."""
    name = op_name(node)
    if name in _FILLS:
        return []
    rule = _RULES.get(name)
    if rule is None and name in _BROADCAST | {"rope"} or is_pointwise(node):
        rule = _broadcast
    if rule is None:
        return f"{name or node.op} {node.name} places tokens itself"
    return rule(node, want, moved)


def result_for(node: fx.Node, operand: fx.Node, given: Placed, moved: Moved) -> Placed | None | str:
    """How a call's result is permuted when one operand is: a place, INVARIANT, or why it is in no order."""
    free = _ignores(node, operand, given, moved)
    if free is not None:
        return (
            INVARIANT if free else f"{op_name(node)} {node.name} reads some of the tokens by their position"
        )
    value = _value(node)
    if value is None:
        return f"{op_name(node) or node.op} {node.name} places tokens itself"
    for place in _candidates(node, value, given):
        wanted = operands_for(node, place, moved)
        if isinstance(wanted, list) and (operand, given) in wanted:
            return place
    return f"{op_name(node) or node.op} {node.name} mixes tokens by their position"


def _candidates(node: fx.Node, value: torch.Tensor, given: Placed) -> list[Placed]:
    """Places that the result may have: any axis; joins and cuts also move the start."""
    starts = {given.start}
    name = op_name(node)
    if name == "cat":
        lengths = [_size(p, given.axis) for p in _many(node, 0)]
        starts |= {given.start + sum(lengths[:i]) for i in range(len(lengths))}
    elif name == "slice":
        starts.add(given.start - _span(node)[1])
    elif name == "slice_scatter":
        starts.add(given.start + _span(node)[1])
    elif name == "getitem" and _cut_of(node) is not None:
        starts.add(given.start - _cut_start(node))
    return [Placed(axis, start) for axis in range(value.dim()) for start in sorted(starts)]


def _ignores(node: fx.Node, operand: fx.Node, given: Placed, moved: Moved) -> bool | None:
    """True when the result depends on no permuted token by position, False when on some, None elsewhere."""
    name = op_name(node)
    if name in ("sum", "mean", "amax", "amin") and given.axis in _reduced(node, operand):
        return True
    if name == "slice" and _span(node)[0] == given.axis:
        _, first, end, step = _span(node)
        if step == 1 and first <= given.start and given.start + moved.count <= end:
            return None
        return end <= given.start or first >= given.start + moved.count
    if name == "slice_scatter" and node.args[0] is operand and _span(node)[0] == given.axis:
        _, first, end, step = _span(node)
        if step == 1 and first <= given.start and given.start + moved.count <= end:
            return True
    if name == "getitem" and (axis := _cut_of(node)) is not None and axis == given.axis:
        first, value = _cut_start(node), tensor_of(node)
        assert value is not None, "a part is a tensor"
        end = first + int(value.shape[axis])
        if first <= given.start and given.start + moved.count <= end:
            return None
        return end <= given.start or first >= given.start + moved.count
    if name == "select" and _axis(node, 1, operand) == given.axis:
        index = int(arguments(node)["index"])
        return not given.start <= index < given.start + moved.count
    return None


def _same(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    return [(_operand(node), want)]


def _rows(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    source, given = _operand(node), arguments(node)
    if want.axis >= _rank(source) - len(given.get("normalized_shape", [0])):
        return f"{op_name(node)} {node.name} works along that axis"
    return [(source, want)] + [(given[n], want) for n in ("residual",) if n in given]


def _broadcast(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    out = tensor_of(node)
    if out is None or (op_name(node) == "rope" and want.axis == out.dim() - 1):
        return f"{op_name(node)} {node.name} works along that axis"
    wanted: Wanted = []
    for source in dict.fromkeys(node.all_input_nodes):
        value = tensor_of(source)
        axis = want.axis - (out.dim() - value.dim()) if value is not None else -1
        if value is not None and axis >= 0 and value.shape[axis] != 1:
            wanted.append((source, Placed(axis, want.start)))
    return wanted


def _softmax(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    if _axis(node, 1) == want.axis:
        return f"softmax {node.name} works along that axis"
    return [(_operand(node), want)]


def _permute(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    dims = [int(d) % _rank(_operand(node)) for d in _many(node, 1)]
    return [(_operand(node), Placed(dims[want.axis], want.start))]


def _transpose(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    rank = _rank(_operand(node))
    a, b = (0, 1) if op_name(node) == "t" else (int(str(d)) % rank for d in node.args[1:3])
    return [(_operand(node), Placed({a: b, b: a}.get(want.axis, want.axis), want.start))]


def _reshape(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    """The axis keeps its length and what lies before it; also squeeze, unsqueeze, flatten and unflatten."""
    out, source = tensor_of(node), tensor_of(_operand(node))
    if out is None or source is None:
        return f"{op_name(node)} {node.name} gives no tensor"
    before = math.prod(out.shape[: want.axis])
    for axis, size in enumerate(source.shape):
        if size == out.shape[want.axis] and math.prod(source.shape[:axis]) == before:
            return [(_operand(node), Placed(axis, want.start))]
    return f"{op_name(node)} {node.name} joins or cuts the axis of tokens"


def _expand(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    source, out = tensor_of(_operand(node)), tensor_of(node)
    if source is None or out is None:
        return f"{op_name(node)} {node.name} gives no tensor"
    axis = want.axis - (out.dim() - source.dim())
    if axis < 0 or source.shape[axis] == 1:
        return []
    if source.shape[axis] != out.shape[want.axis]:
        return f"{op_name(node)} {node.name} repeats the axis of tokens"
    return [(_operand(node), Placed(axis, want.start))]


def _cat(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    parts = _many(node, 0)
    if _axis(node, 1, parts[0], default=0) != want.axis:
        return [(part, want) for part in dict.fromkeys(parts)]
    first = 0
    for part in parts:
        size = _size(part, want.axis)
        if first <= want.start and want.start + moved.count <= first + size:
            return [(part, Placed(want.axis, want.start - first))]
        first += size
    return f"cat {node.name} joins several runs of tokens"


def _stack(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    parts = _many(node, 0)
    axis = int(arguments(node)["dim"]) % (_rank(parts[0]) + 1)
    if axis == want.axis:
        return f"stack {node.name} makes that axis"
    return [(part, Placed(want.axis - (want.axis > axis), want.start)) for part in dict.fromkeys(parts)]


def _slice(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    axis, first, _, step = _span(node)
    if axis != want.axis:
        return [(_operand(node), want)]
    if step != 1:
        return f"slice {node.name} takes every {step}th token"
    return [(_operand(node), Placed(axis, want.start + first))]


def _slice_scatter(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    given = arguments(node)
    axis, first, end, step = _span(node)
    if axis != want.axis:
        return [(given["self"], want), (given["src"], want)]
    if step == 1 and first <= want.start and want.start + moved.count <= end:
        return [(given["src"], Placed(axis, want.start - first))]
    if end <= want.start or first >= want.start + moved.count:
        return [(given["self"], want)]
    return f"slice_scatter {node.name} writes some of the tokens by their position"


def _select(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    axis = _axis(node, 1)
    return [(_operand(node), Placed(want.axis + (want.axis >= axis), want.start))]


def _getitem(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    source = _operand(node)
    if _cut_of(node) == want.axis:
        return [(source, Placed(want.axis, want.start + _cut_start(node)))]
    return [(source, want)]


def _along(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    """repeat_interleave and index_select along another axis."""
    dim = arguments(node).get("dim")
    if dim is None or int(dim) % _rank(_operand(node)) == want.axis:
        return f"{op_name(node)} {node.name} works along that axis"
    return [(_operand(node), want)]


def _reduce(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    source = _operand(node)
    axes = _reduced(node, source)
    kept = [a for a in range(_rank(source)) if a not in axes or arguments(node).get("keepdim")]
    return [(source, Placed(kept[want.axis], want.start))]


def _attention(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    """Queries in an order give results in that order; keys and values of as many tokens take the same."""
    given = arguments(node)
    out = tensor_of(given["q"])
    if out is None or want.axis != out.dim() - 2:
        return f"{op_name(node)} {node.name} works along that axis"
    wanted = [(given["q"], want)]
    if _size(given["k"], -2) == _size(given["q"], -2):
        wanted += [(given["k"], want), (given["v"], want)]
    mask = given.get("mask")
    if isinstance(mask, fx.Node) and node.target is ops.attention:
        rows, columns = _size(mask, -2) != 1, _size(mask, -1) != 1
        if rows and (columns and len(wanted) > 1):
            return f"attention {node.name} has a mask of queries by keys"
        if given["causal"]:
            return f"attention {node.name} is causal"
        axis = _rank(mask) - (2 if rows else 1)
        if rows or (columns and len(wanted) > 1):
            wanted.append((mask, Placed(axis, want.start)))
    return list(dict.fromkeys(wanted))


def _block_sparse(node: fx.Node, want: Placed, moved: Moved) -> Wanted | str:
    """Its layout names tokens by position: only the caller that adapts it may ask."""
    given = arguments(node)
    if node not in moved.adapts or want.axis != 2:
        return f"{op_name(node)} {node.name} has a layout in another token order"
    return list(dict.fromkeys([(given["q"], want), (given["k"], want), (given["v"], want)]))


_RULES: dict[str, Callable[[fx.Node, Placed, Moved], Wanted | str]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_ROWS, _rows),
    **dict.fromkeys(_CUTS, _same),
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("transpose", "t"), _transpose),
    **dict.fromkeys(("expand", "repeat"), _expand),
    **dict.fromkeys(("repeat_interleave", "index_select"), _along),
    **dict.fromkeys(("sum", "mean", "amax", "amin"), _reduce),
    "permute": _permute,
    "cat": _cat,
    "stack": _stack,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "select": _select,
    "getitem": _getitem,
    "attention": _attention,
    "block_sparse_attention": _block_sparse,
}


def _operand(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node), "the rules are for calls whose first operand is a value"
    return source


def _many(node: fx.Node, place: int) -> list[Any]:
    values: Any = node.args[place]
    return list(values)


def _rank(node: fx.Node) -> int:
    value = tensor_of(node)
    assert value is not None, "only tensors are asked for their rank"
    return value.dim()


def _size(node: fx.Node, axis: int) -> int:
    value = tensor_of(node)
    assert value is not None, "only tensors are asked for their sizes"
    return int(value.shape[axis])


def _axis(node: fx.Node, place: int, like: fx.Node | None = None, default: int | None = None) -> int:
    """The axis argument of a call, counted from the front."""
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", default)
    return int(str(given)) % _rank(like or _operand(node))


def _span(node: fx.Node) -> tuple[int, int, int, int]:
    """(axis, first, end, step) of a slice or slice_scatter, ends counted from the front."""
    given = arguments(node)
    source = _operand(node)
    axis = int(given["dim"]) % _rank(source)
    size = _size(source, axis)
    first, end, _ = slice(given["start"], given["end"]).indices(size)
    return axis, first, end, int(given["step"])


def _reduced(node: fx.Node, source: fx.Node) -> set[int]:
    dims = arguments(node).get("dim")
    if dims is None or dims == []:
        return set(range(_rank(source)))
    return {int(d) % _rank(source) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _cut_of(node: fx.Node) -> int | None:
    """The axis along which the tuple that a getitem reads was cut, None for other tuples."""
    source = _operand(node)
    if op_name(source) not in _CUTS:
        return None
    return int(arguments(source).get("dim") or 0) % _rank(_operand(source))


def _cut_start(node: fx.Node) -> int:
    """Where the part that a getitem takes begins on the axis of the cut."""
    parts, axis = _operand(node).meta["val"], _cut_of(node)
    assert axis is not None, "asked for cuts only"
    index = node.args[1]
    assert isinstance(index, int), "a part is named by its number"
    return sum(int(p.shape[axis]) for p in parts[:index])


def _value(node: fx.Node) -> torch.Tensor | None:
    """The tensor whose axes a place is about: of a cut what was cut, of another tuple its first part."""
    if op_name(node) in _CUTS:
        return tensor_of(_operand(node))
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None
