"""Ops that act on all channels of a value alike: what a rotation of the channels passes through.

The channels are the last axis. `op(x R) = op(x) R` for every matrix R holds for sums, moves along the other
axes, averages over them, one scale per token, and for attention in its values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from tilewright.compiler.dataflow import op_name, passes_through, tensor_of
from tilewright.compiler.schema import arguments

SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk"})
_ALONG_DIM = frozenset(
    {"slice", "select", "index_select", "cat", "stack", "flip", "roll", "repeat_interleave"}
)
_REDUCTIONS = frozenset({"mean", "sum"})
_LAST_STAYS = frozenset({"expand", "unsqueeze", "squeeze", "reshape", "view", "flatten", "repeat"})


def same_basis(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands whose channels a node treats alike: rotating them rotates its result the same way.

    Empty for every other node. The channels are the last axis, whose size does not change.
    """
    source = passes_through(node)
    if source is not None:
        return (source,)
    name, result = op_name(node), tensor_of(node)
    if name == "getitem" and isinstance(node.args[0], fx.Node) and op_name(node.args[0]) in SPLITS:
        return split_source(node.args[0])
    if result is None or result.dim() == 0:
        return ()
    given = arguments(node)
    if name in ("add", "sub"):
        return _all_wide((given.get("self"), given.get("other")), result)
    if name in ("mul", "div"):
        return _scaled(given, name, result)
    if name == "neg":
        return _all_wide((given["self"],), result)
    if name == "attention":
        alone = [n for name, n in given.items() if name != "v"].count(given["v"]) == 0
        return _all_wide((given["v"],), result) if alone else ()
    if name == "kv_update":
        return (given["cache"], given["new"]) if _not_last([given["dim"]], result.dim()) else ()
    return _moved(node, name, given, result)


def _moved(node: fx.Node, name: str, given: dict[str, Any], result: torch.Tensor) -> tuple[fx.Node, ...]:
    """Operands of an op that moves whole channel vectors about, or averages over them."""
    operands = given.get("tensors", given.get("self"))
    sources = tuple(operands) if isinstance(operands, list | tuple) else (operands,)
    before = tensor_of(sources[0]) if sources else None
    if before is None or before.dim() == 0 or not all(isinstance(s, fx.Node) for s in sources):
        return ()
    if name in _LAST_STAYS:
        return _all_wide(sources, result) if channels(before) == channels(result) else ()
    if name in _ALONG_DIM or name in _REDUCTIONS:
        dims = given.get("dim", given.get("dims"))
        listed = list(dims) if isinstance(dims, list | tuple) else [dims]
        rank = result.dim() if name == "stack" else before.dim()
        fixed = [d for d in listed if isinstance(d, int)]
        kept = bool(fixed) and len(fixed) == len(listed) and _not_last(fixed, rank)
        return _all_wide(sources, result) if kept else ()
    if name == "permute":
        return sources if _last_axis_kept(given["dims"], before.dim()) else ()
    if name == "transpose":
        return sources if _not_last([given["dim0"], given["dim1"]], before.dim()) else ()
    if name == "index":
        return sources if len(given["indices"]) < before.dim() else ()
    return ()


def split_source(split: fx.Node) -> tuple[fx.Node, ...]:
    """The operand of a split along another axis than the channels, in a tuple; empty for any other."""
    given = arguments(split)
    before = tensor_of(given["self"])
    if before is None or not _not_last([given["dim"]], before.dim()):
        return ()
    return (given["self"],)


def _scaled(given: dict[str, Any], name: str, result: torch.Tensor) -> tuple[fx.Node, ...]:
    """x * s or x / s where s is one number for all channels of a token."""
    pairs = [(given["self"], given["other"])]
    if name == "mul":
        pairs.append((given["other"], given["self"]))
    for x, scale in pairs:
        value = tensor_of(scale)
        alike = isinstance(scale, int | float) or (
            value is not None and (value.dim() == 0 or channels(value) == 1)
        )
        if alike and isinstance(x, fx.Node) and channels(result) != 1:
            return _all_wide((x,), result)
    return ()


def _all_wide(operands: Iterable[Any], result: torch.Tensor) -> tuple[fx.Node, ...]:
    """The operands if every one is a tensor with the result's number of channels, else nothing."""
    found = tuple(operands)
    for operand in found:
        value = tensor_of(operand)
        if value is None or value.dim() == 0 or channels(value) != channels(result):
            return ()
    return found


def channels(value: torch.Tensor) -> int:
    """Size of the last axis; -1 when it is symbolic."""
    size = value.shape[-1]
    return size if isinstance(size, int) else -1


def _not_last(dims: Iterable[int], rank: int) -> bool:
    return all(d % rank != rank - 1 for d in dims)


def _last_axis_kept(dims: list[int], rank: int) -> bool:
    return dims[-1] % rank == rank - 1
