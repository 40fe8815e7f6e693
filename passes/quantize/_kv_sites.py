"""Where keys and values enter a cache, and their rounding as a formula."""

from __future__ import annotations

import torch
from torch import fx

from tilewright.compiler import Program, ops
from tilewright.compiler.channel_ops import same_basis
from tilewright.compiler.hadamard import sylvester_matrix
from tilewright.compiler.schema import arguments


def kv_sites(program: Program) -> list[tuple[fx.Node, str]]:
    """(update, "") of every cache update whose result an attention reads as k or v, in the order of the
    program's attentions; (attention, why not) where k or v comes from none."""
    sites: list[tuple[fx.Node, str]] = []
    seen: set[fx.Node] = set()
    for attention in [n for n in program.graph.nodes if n.target is ops.attention]:
        for name in ("k", "v"):
            found = _updates(arguments(attention)[name])
            if not found:
                sites.append(
                    (
                        attention,
                        f"its {name} comes from no cache that the program is given and updates (as a "
                        "StaticCache in past_key_values is, after early_initialization or its first call)",
                    )
                )
            sites += [(update, "") for update in found if update not in seen]
            seen.update(found)
    return sites


def _updates(value: fx.Node) -> list[fx.Node]:
    """The cache updates that a value comes from through moves alone."""
    pending, seen, found = [value], {value}, list[fx.Node]()
    while pending:
        node = pending.pop()
        if node.target is ops.kv_update:
            found.append(node)
            continue
        fresh = [n for n in same_basis(node) if n not in seen]
        seen.update(fresh)
        pending += fresh
    return found


def rounded_by_formula(new: torch.Tensor, bits: int, group: int, rotate: bool) -> torch.Tensor:
    """[..., D] rounded, `group` channels together: s = (max - min) / levels over a range that holds zero, z =
    round(-min / s), x ~ s (clamp(round(x / s) + z) - z); behind a product with Sylvester's matrix."""
    size = new.shape[-1]
    x = new.to(torch.float32)
    matrix = sylvester_matrix(size).to(x) / size**0.5 if rotate else None
    if matrix is not None:
        x = x @ matrix
    parts = x.unflatten(-1, (-1, group or size))
    low, high = parts.amin(-1, True).clamp(max=0.0), parts.amax(-1, True).clamp(min=0.0)
    levels = 2**bits - 1
    step = (high - low) / levels
    step = torch.where(step > 0, step, 1.0)
    zero = torch.round(-low / step)
    rounded = (step * ((torch.round(parts / step) + zero).clamp(0, levels) - zero)).flatten(-2)
    return (rounded if matrix is None else rounded @ matrix.T).to(new.dtype)
