"""Rules that drop what does nothing: casts to the same dtype, eval dropout, copies nobody can tell apart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from tilewright.compiler.canonical_context import Canonical, Rule, same_kind, same_layout
from tilewright.compiler.graph import arg, is_op, is_random, normalized_args, shape, static_shape, tensor_val
from tilewright.compiler.storage_alias import base_name

aten = torch.ops.aten


def drop_detach(c: Canonical, node: fx.Node) -> bool:
    """`detach`, `alias`, `lift_fresh` are their argument; in training `detach` is not."""
    if c.training and base_name(node.target) == "detach":
        return False
    return c.replace(node, node.args[0], "drop-alias")  # type: ignore[arg-type]


def drop_dropout(c: Canonical, node: fx.Node) -> bool:
    """Dropout with probability 0 or outside training returns its argument."""
    if is_random(normalized_args(node)):
        return False
    return c.replace(node, node.args[0], "drop-dropout")  # type: ignore[arg-type]


def cast(c: Canonical, node: fx.Node) -> bool:
    """Casts that change nothing go; others become `to.dtype(x, dtype)` or `to.device(x, device, dtype)`."""
    source = node.args[0]
    old, new = tensor_val(source), tensor_val(node)
    if old is None or new is None or not isinstance(source, fx.Node):
        return False
    given = normalized_args(node)
    copies = given.get("copy", base_name(node.target) == "_to_copy") is True
    if same_layout(source, node) and old.layout == new.layout:
        return (not copies or c.may_drop_copy(node, source)) and c.replace(node, source, "drop-cast")
    same_data = old.dtype == new.dtype and old.device == new.device
    special = given.get("memory_format") not in (None, torch.preserve_format)
    if same_data or special or given.get("non_blocking") or given.get("pin_memory"):
        return False
    if old.device == new.device and node.target is not aten.to.dtype:
        return c.swap(node, aten.to.dtype, (source, new.dtype), "cast-form")
    if old.device != new.device and node.target is not aten.to.device:
        return c.swap(node, aten.to.device, (source, new.device, new.dtype), "cast-form")
    return False


def drop_contiguous(c: Canonical, node: fx.Node) -> bool:
    """`contiguous` returns a value that already has that layout, and is a `clone` into it otherwise."""
    source = node.args[0]
    value = tensor_val(source)
    if value is None or not isinstance(source, fx.Node):
        return False
    wanted = arg(node, "memory_format")
    if value.is_contiguous(memory_format=wanted):
        return c.replace(node, source, "drop-contiguous")
    return c.swap(node, aten.clone.default, (source,), "contiguous-form", {"memory_format": wanted})


_SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default)


def _as_good(source: fx.Node, copy: fx.Node) -> bool:
    """Whether a value may stand for its copy: same layout, or the copy is only scattered elsewhere."""
    scattered = all(is_op(u, *_SCATTERS) and u.args[0] is not copy for u in copy.users)
    return same_layout(source, copy) or (scattered and same_kind(source, copy))


def drop_copy(c: Canonical, node: fx.Node) -> bool:
    """A copy with the layout of its source that nobody writes to, returns or writes back is its source."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not _as_good(source, node):
        return False
    return c.may_drop_copy(node, source) and c.replace(node, source, "drop-copy")


def drop_overwrite(c: Canonical, node: fx.Node) -> bool:
    """The functional `copy(x, y)` is a copy of y where y has the dtype, sizes and layout of the result."""
    source = node.args[1]
    if not isinstance(source, fx.Node) or not _as_good(source, node):
        return False
    return c.may_drop_copy(node, source) and c.replace(node, source, "drop-copy")


def drop_same_shape(c: Canonical, node: fx.Node) -> bool:
    """View ops to the shape the value already has, permutations of nothing, slices of everything."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not same_kind(source, node):
        return False
    name = base_name(node.target)
    if name == "permute" and not _keeps_order(node):
        return False
    if name in ("flip", "roll") or not (same_layout(source, node) or name == "reshape"):
        return False
    return c.replace(node, source, f"drop-{name}")


def _keeps_order(node: fx.Node) -> bool:
    dims = arg(node, "dims")
    return [d % len(dims) for d in dims] == list(range(len(dims)))


def drop_neutral(c: Canonical, node: fx.Node) -> bool:
    """`x * 1`, `x / 1`, `x - 0`, and `x + 0` of integers (-0.0 + 0 is 0.0), where dtype and shape stay."""
    source, other = node.args[0], node.args[1]
    if (
        not isinstance(source, fx.Node)
        and isinstance(other, fx.Node)
        and base_name(node.target) in ("mul", "add")
    ):
        source, other = other, source
    name = base_name(node.target)
    neutral = 1 if name in ("mul", "div") else 0
    if not isinstance(source, fx.Node) or isinstance(other, bool) or not isinstance(other, int | float):
        return False
    value = tensor_val(source)
    if other != neutral or value is None or not same_layout(source, node) or node.kwargs.get("rounding_mode"):
        return False
    if name == "add" and value.dtype.is_floating_point or value.dtype.is_complex:
        return False
    if name == "sub" and math.copysign(1.0, other) < 0:
        return False
    return c.may_drop_copy(node, source) and c.replace(node, source, f"drop-{name}")


def drop_check(c: Canonical, node: fx.Node) -> bool:
    """Checks of facts that the capture already fixed (dtype, device, ranges of dynamic sizes)."""
    return not node.users and c.erase(node, "drop-check")


def drop_repeat(c: Canonical, node: fx.Node) -> bool:
    """`repeat` of every dimension once is a copy."""
    repeats = [r for r in arg(node, "repeats") if not (type(r) is int and r == 1)]
    return not repeats and shape(node) is not None and drop_copy(c, node)


def cat_empty(c: Canonical, node: fx.Node) -> bool:
    """`cat` ignores one-dimensional empty tensors (an empty cache), and of one tensor it is a copy."""
    tensors: Any = node.args[0]
    if not isinstance(tensors, list | tuple):
        return False
    kept = [t for t in tensors if static_shape(t) != (0,)]
    if not kept:
        return False
    if len(kept) > 1:
        same = len(kept) == len(tensors)
        return not same and c.swap(node, aten.cat.default, (kept, *node.args[1:]), "cat-empty")
    if same_layout(kept[0], node) and c.may_drop_copy(node, kept[0]):
        return c.replace(node, kept[0], "cat-empty")
    plain = {"memory_format": torch.contiguous_format}
    return c.swap(node, aten.clone.default, (kept[0],), "cat-empty") or c.swap(
        node, aten.clone.default, (kept[0],), "cat-empty", plain
    )


def drop_cudnn(c: Canonical, node: fx.Node) -> bool:
    """`layer_norm` and `group_norm` ignore their last argument; export and Dynamo give different values."""
    names = [n for n in ("cudnn_enable", "cudnn_enabled") if n in normalized_args(node)]
    given = normalized_args(node)
    if not names or given[names[0]] is True or node.kwargs:
        return False
    return c.update(node, "drop-cudnn", node.args[: list(given).index(names[0])])


_SAME_SHAPE = "reshape permute slice expand squeeze narrow flatten unflatten view"

RULES: dict[str, tuple[Rule, ...]] = {
    **{n: (drop_detach,) for n in ("detach", "alias", "lift_fresh")},
    **{n: (drop_dropout,) for n in ("dropout", "feature_dropout", "alpha_dropout")},
    **{n: (cast,) for n in ("to", "_to_copy", "type_as")},
    **{n: (drop_copy,) for n in ("clone", "lift_fresh_copy")},
    **{n: (drop_neutral,) for n in ("mul", "add", "sub", "div")},
    **{n: (drop_check,) for n in ("_assert_tensor_metadata", "_assert_scalar")},
    **{n: (drop_same_shape,) for n in _SAME_SHAPE.split()},
    "copy": (drop_overwrite,),
    "contiguous": (drop_contiguous,),
    "layer_norm": (drop_cudnn,),
    "group_norm": (drop_cudnn,),
    "repeat": (drop_repeat,),
    "cat": (cat_empty,),
}
"""Rules by the base name of the op they look at."""
