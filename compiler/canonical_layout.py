"""Rules that give data movement one spelling: reshape, permute, expand, slice, dims, sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilewright.compiler.canonical_context import END, Canonical, Rule
from tilewright.compiler.graph import (
    arg,
    is_op,
    normalized_args,
    rank,
    same,
    set_positional,
    shape,
    static_shape,
    tensor_val,
    val,
)
from tilewright.compiler.storage_alias import PERMUTE, base_name, permutation, storage_key

aten = torch.ops.aten

_DIM_ARGS = ("dim", "dims", "dim0", "dim1", "dim2")
_DIM_OPS = frozenset(
    {"mean", "sum", "amax", "amin", "prod", "argmax", "argmin", "max", "min", "any", "all", "std"}
    | {"var", "var_mean", "norm", "logsumexp", "softmax", "log_softmax", "_softmax", "_log_softmax"}
    | {"cumsum", "cumprod", "cat", "stack", "unsqueeze", "squeeze", "select", "slice", "index_select"}
    | {"gather", "scatter", "scatter_add", "index_copy", "index_add", "index_fill", "slice_scatter"}
    | {"select_scatter", "unbind", "chunk", "split", "split_with_sizes", "topk", "sort", "argsort"}
    | {"flip", "roll", "diff", "repeat_interleave", "diagonal", "glu", "narrow", "tensor_split"}
)


def reshape_form(c: Canonical, node: fx.Node) -> bool:
    """Every op that only regroups dimensions becomes `reshape` with explicit sizes.

    `reshape` rather than `view`: as a value the two are the same, and `view` would forbid later passes to
    change the strides of what it reads. At most one size is -1: the only dynamic one.
    """
    if node.target is aten.view.dtype or tensor_val(node) is None or not isinstance(node.args[0], fx.Node):
        return False
    asked = (
        arg(node, "shape" if node.target is aten.reshape.default else "size") if _lists_sizes(node) else None
    )
    sizes = explicit_sizes(node, asked)
    if sizes is None:
        return False
    if node.target is aten.reshape.default:
        return not same(sizes, asked) and c.update(node, "reshape-sizes", (node.args[0], sizes))
    return c.swap(node, aten.reshape.default, (node.args[0], sizes), "reshape-form", same_memory=True)


def _lists_sizes(node: fx.Node) -> bool:
    return node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def explicit_sizes(node: fx.Node, asked: Any) -> list[Any] | None:
    """A node's sizes as arguments: ints, -1 for a single dynamic size, else what was asked for."""
    sizes = list(shape(node) or ())
    dynamic = [i for i, s in enumerate(sizes) if type(s) is not int]
    if len(dynamic) == 1 and 0 not in [s for s in sizes if type(s) is int]:
        return [-1 if i in dynamic else s for i, s in enumerate(sizes)]
    if not dynamic:
        return sizes
    if asked is None or len(asked) != len(sizes):
        return None
    return [asked[i] if i in dynamic else s for i, s in enumerate(sizes)]


def merge_reshapes(c: Canonical, node: fx.Node) -> bool:
    """`reshape(reshape(x, a), b)` is `reshape(x, b)` when that leaves the same memory layout."""
    inner = node.args[0]
    if not is_op(inner, aten.reshape.default) or any(not isinstance(s, int) for s in node.args[1]):  # type: ignore[union-attr]
        return False
    return c.swap(node, aten.reshape.default, (inner.args[0], node.args[1]), "merge-reshape")  # type: ignore[union-attr]


def reshape_of_contiguous(c: Canonical, node: fx.Node) -> bool:
    """`reshape` copies where it must: a `contiguous` or `clone` before it goes if the layout stays."""
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or not is_op(inner, aten.contiguous.default, aten.clone.default):
        return False
    source, form = inner.args[0], normalized_args(inner)["memory_format"]
    plain = form is None or form in (torch.contiguous_format, torch.preserve_format)
    if not plain or not isinstance(source, fx.Node):
        return False
    args = (source, node.args[1])
    own_memory = storage_key(c.value_of(node, aten.reshape.default, args, {})) != storage_key(val(source))
    if not own_memory and not c.may_drop_copy(inner, source):
        return False
    return c.swap(node, aten.reshape.default, args, "reshape-of-contiguous")


def permute_form(c: Canonical, node: fx.Node) -> bool:
    """Transposes, axis swaps and moves become `permute` with positive dims."""
    order = permutation(node)
    if order is None:
        return False
    if node.target is aten.permute.default:
        wanted = list(order)
        return not same(node.args[1], wanted) and c.update(node, "permute-dims", (node.args[0], wanted))
    return c.swap(node, aten.permute.default, (node.args[0], list(order)), "permute-form", same_memory=True)


def merge_permutes(c: Canonical, node: fx.Node) -> bool:
    """`permute(permute(x, a), b)` is one `permute`."""
    inner = node.args[0]
    if not is_op(inner, aten.permute.default):
        return False
    first, second = inner.args[1], node.args[1]  # type: ignore[union-attr]
    order = [first[d] for d in second]  # type: ignore[index,union-attr]
    return c.swap(node, aten.permute.default, (inner.args[0], order), "merge-permute")  # type: ignore[union-attr]


def positive_dims(c: Canonical, node: fx.Node) -> bool:
    """Dimension arguments count from the front."""
    source: Any = node.args[0] if node.args else None
    name = base_name(node.target)
    n = rank(node) if name in ("cat", "stack", "unsqueeze") else rank(source)
    if not n or name not in _DIM_OPS:
        return False
    given = normalized_args(node)
    changed = False
    positional = list(node.args)
    for i, argument in enumerate(given):
        value = given[argument]
        if argument not in _DIM_ARGS or i >= len(positional):
            continue
        new = [d % n for d in value] if _ints(value) else value % n if type(value) is int else value
        changed = changed or not same(new, value)
        positional[i] = new
    default = given.get("dim")
    if not changed and type(default) is int and default < 0 and "dim" not in node.kwargs:
        return _spell_default_dim(c, node, given, default % n)
    return changed and c.update(node, "positive-dims", positional)


def _spell_default_dim(c: Canonical, node: fx.Node, given: dict[str, Any], dim: int) -> bool:
    """A negative default dim (`diff`, `sort`, `topk`) is written out, with the defaults before it."""
    names = [a.name for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]
    if "dim" not in names or len(node.args) > names.index("dim"):
        return False
    head = [given[n] for n in names[: names.index("dim")]]
    return c.update(node, "positive-dims", [*head, dim])


def _ints(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(v) is int for v in value)


def slice_form(c: Canonical, node: fx.Node) -> bool:
    """Slices have explicit bounds: the size where it is known, the largest integer where it is dynamic."""
    given = normalized_args(node)
    size = (shape(given["self"]) or ())[given["dim"]] if rank(given["self"]) else None
    if size is None:
        return False
    start, end = given["start"], given["end"]
    start = 0 if start is None else start
    end = END if end is None else end
    if type(size) is int:
        start, end = (_clamp(v, size) for v in (start, end))
    first = node.args[: list(given).index("dim")]
    wanted = (*first, given["dim"], start, end, *([given["step"]] if given["step"] != 1 else []))
    return not same(wanted, node.args) and c.update(node, "slice-bounds", wanted)


def _clamp(value: Any, size: int) -> Any:
    if type(value) is not int:
        return value
    return min(max(value + size if value < 0 else value, 0), size)


def select_form(c: Canonical, node: fx.Node) -> bool:
    """Selections count their index from the front where the size is known."""
    given = normalized_args(node)
    sizes = static_shape(given["self"])
    if sizes is None or type(given["index"]) is not int or given["index"] >= 0:
        return False
    wanted = [*node.args[:-1], given["index"] + sizes[given["dim"]]]
    return c.update(node, "select-index", wanted)


def expand_form(c: Canonical, node: fx.Node) -> bool:
    """`expand` names every known size, -1 for dynamic sizes it keeps; `expand_as` becomes `expand`."""
    source = node.args[0]
    sizes, old = shape(node), shape(source)
    if sizes is None or old is None or node.kwargs:
        return False
    asked = node.args[1] if node.target is aten.expand.default else None
    lead = len(sizes) - len(old)
    wanted: list[Any] = []
    for i, size in enumerate(sizes):
        if type(size) is int:
            wanted.append(size)
        elif i >= lead and str(old[i - lead]) == str(size):
            wanted.append(-1)
        elif asked is not None:
            wanted.append(asked[i])  # type: ignore[index]
        else:
            return False
    if node.target is aten.expand.default:
        return not same(wanted, asked) and c.update(node, "expand-sizes", (source, wanted))
    return c.swap(node, aten.expand.default, (source, wanted), "expand-form")


def split_form(c: Canonical, node: fx.Node) -> bool:
    """`split` by a list of sizes becomes `split_with_sizes`, `split` into as many equal parts `chunk`."""
    given = normalized_args(node)
    pieces = val(node)
    if node.target in (aten.split.sizes, aten.split.default):
        node.target = aten.split_with_sizes.default
    elif node.target is aten.split.Tensor and isinstance(pieces, list | tuple) and pieces:
        sizes, step = static_shape(given["self"]), given["split_size"]
        if sizes is None or type(step) is not int or -(-sizes[given["dim"]] // len(pieces)) != step:
            return False
        node.target = aten.chunk.default
        node.args = (given["self"], len(pieces), given["dim"])
        set_positional(node)
    else:
        return False
    c.counts["split-form"] += 1
    return True


def narrow_form(c: Canonical, node: fx.Node) -> bool:
    """`narrow` becomes `slice`."""
    given = normalized_args(node)
    start, length = given["start"], given["length"]
    sizes = static_shape(given["self"])
    if (
        node.target is not aten.narrow.default
        or type(start) is not int
        or type(length) is not int
        or sizes is None
    ):
        return False
    dim = given["dim"] % len(sizes)
    start = start + sizes[dim] if start < 0 else start
    return c.swap(node, aten.slice.Tensor, (given["self"], dim, start, start + length), "slice-form")


def interleave(c: Canonical, node: fx.Node) -> bool:
    """Strided writes that cover a whole value (`out[..., 0::2] = a; out[..., 1::2] = b`) are one stack."""
    given = normalized_args(node)
    dim, step, sizes = given["dim"], given["step"], static_shape(node)
    if sizes is None or type(step) is not int or step < 2 or sizes[dim] % step:
        return False
    pieces: dict[int, Any] = {}
    at: Any = node
    while is_op(at, aten.slice_scatter.default) and len(pieces) < step:
        here = normalized_args(at)
        start = here["start"]
        ends = here["end"] if type(here["end"]) is int else -1
        whole = type(start) is int and 0 <= start < step and ends >= sizes[dim] - step + start + 1
        if here["dim"] % len(sizes) != dim or here["step"] != step or not whole:
            return False
        pieces.setdefault(start, here["src"])
        at = here["self"]
    if len(pieces) != step:
        return False
    inner = [sizes[i] if i != dim else sizes[dim] // step for i in range(len(sizes))]
    parts = [pieces[i] for i in range(step)]
    if any(static_shape(p) != tuple(inner) or tensor_val(p).dtype != tensor_val(node).dtype for p in parts):  # type: ignore[union-attr]
        return False
    return c.swap_chain(
        node, [(aten.stack.default, (parts, dim + 1)), (aten.reshape.default, (list(sizes),))], "interleave"
    )


_REGROUP = "view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias ravel"

RULES: dict[str, tuple[Rule, ...]] = {
    **{n: (reshape_form,) for n in _REGROUP.split()},
    **{n: (permute_form,) for n in PERMUTE},
    "reshape": (reshape_form, merge_reshapes, reshape_of_contiguous),
    "permute": (permute_form, merge_permutes),
    "slice": (slice_form,),
    "slice_scatter": (slice_form, interleave),
    "select": (select_form,),
    "expand": (expand_form,),
    "expand_as": (expand_form,),
    "split": (split_form,),
    "narrow": (narrow_form,),
}
"""Rules by the base name of the op they look at; `positive_dims` comes before them."""
