"""Tokens that a mask gathers: finding them in a graph, and attending them with static lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tilewright.compiler import Program, ops
from tilewright.compiler.dataflow import op_name, tensor_of
from tilewright.compiler.regions import inline
from tilewright.compiler.rewrite import trace, traced_outputs

_VIEWS = ("reshape", "view", "squeeze", "unsqueeze", "flatten")


@dataclass(frozen=True)
class Gathered:
    """cat([whole, text[:, :, nonzero(mask)]], 2), or the gathered part alone or in front (whole is None)."""

    text: fx.Node
    mask: fx.Node
    whole: fx.Node | None


def _view_source(node: fx.Node) -> fx.Node:
    while op_name(node) in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _by_mask(node: object) -> tuple[fx.Node, fx.Node] | None:
    """(text, mask) of index(text, [None, None, nonzero(mask)]) with a mask of one axis."""
    if not isinstance(node, fx.Node) or op_name(node) != "index":
        return None
    text, at = node.args
    if (
        not isinstance(text, fx.Node)
        or not isinstance(at, (list, tuple))
        or len(at) != 3
        or at[:2] != [None, None]
    ):
        return None
    found = _view_source(at[2]) if isinstance(at[2], fx.Node) else None
    if found is None or op_name(found) != "nonzero" or tensor_of(at[2]).dim() != 1:  # type: ignore[union-attr]
        return None
    mask: Any = found.args[0]
    value, source = tensor_of(mask), tensor_of(text)
    if value is None or source is None or value.dim() != 1 or source.dim() != 4:
        return None
    return (text, mask) if value.shape[0] == source.shape[2] and isinstance(value.shape[0], int) else None


def gathered(node: fx.Node) -> Gathered | None:
    """How an operand of an attention gathers tokens by a mask; None when it does not."""
    parts: Any = node.args[0] if op_name(node) == "cat" else [node]
    picked = [_by_mask(p) for p in parts]
    found = next((p for p in picked if p is not None), None)
    if found is None:
        return None
    behind = len(parts) == 2 and picked[0] is None and node.args[1:] in ((2,), (-2,))
    whole = parts[0] if behind else None
    return Gathered(*found, whole)


def entries_of(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """The tensor whose entries along its first axis the nodes are, all of them in order; None for others.

    The only mask of a batch of one stands for itself, without that axis.
    """
    alone = tensor_of(nodes[0])
    if len(nodes) == 1 and alone is not None and (alone.dim() == 1 or alone.shape[0] == 1):
        return nodes[0]
    base: Any = None
    for place, node in enumerate(nodes):
        value = tensor_of(node)
        source = _view_source(node) if value is not None and value.dim() == 1 else node
        found, *at = source.args if op_name(source) in ("slice", "select") else (None,)
        held = tensor_of(found)
        if (
            value is None
            or held is None
            or at != [0, place, place + 1][: len(at)]
            or base not in (None, found)
        ):
            return None
        entry = value.shape if value.dim() == 1 else value.shape[1:]
        if tuple(held.shape) != (len(nodes), *entry) or value.numel() != held[0].numel():
            return None
        base = found
    return base  # type: ignore[no-any-return]


def attend_kept(values: Sequence[torch.Tensor], scale: float | None, softcap: float) -> torch.Tensor:
    """Attention of whole tokens and of the text tokens that a mask keeps, moved in front of the others.

    values: q, k, v [B, H, N, D]; text_q, text_k, text_v [B, H, L, D]; mask [B, L] or [L] for B = 1; sinks, or
    none. Returns [B, H, N + L, D], 0 behind the kept tokens. What lies in tokens that are left out is not
    read: it may be NaN.
    """
    *tensors, mask = values[:7]
    sinks = values[7] if len(values) > 7 else None
    tokens, length = tensors[0].shape[2], tensors[3].shape[2]
    kept = mask.reshape(-1, length) != 0
    order = torch.argsort(kept, dim=1, descending=True, stable=True)
    limit = kept.sum(1) + tokens
    positions = torch.arange(tokens + length, device=mask.device)
    there = torch.ones(len(limit), tokens + length, dtype=torch.bool, device=mask.device)
    there = there.masked_fill(positions >= limit[:, None], False)
    rows = there[:, None, :, None]
    joined = []
    for whole, text in zip(tensors[:3], tensors[3:], strict=True):
        moved = text.gather(2, order[:, None, :, None].expand(text.shape))
        joined.append(torch.cat([whole, torch.where(rows[:, :, tokens:], moved, 0.0)], 2))
    out = ops.attention(*joined, there[:, None, None, :], scale, False, softcap, sinks)
    return torch.where(rows, out, 0.0)


def replaced(
    program: Program, result: fx.Node, function: Callable[..., torch.Tensor], inputs: list[fx.Node]
) -> list[fx.Node]:
    """Let what a function makes of its inputs be used in a node's place; returns the calls inserted."""
    module = trace(lambda *v: (function(*v),), [n.meta["val"] for n in inputs])
    new = inline(program, module, inputs, before=result, like=result, origin="match-ragged-attention")
    (out,) = traced_outputs(module)
    result.replace_all_uses_with(new[out])
    return [n for old, n in new.items() if old.op == "call_function"]
