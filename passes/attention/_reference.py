"""The obvious program behind an approximate attention pass: dense attention under a mask over all pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from tilewright.compiler import Program, ops
from tilewright.compiler.graph import insert_like
from tilewright.compiler.schema import arguments
from tilewright.passes.attention._sites import VideoAttention, sites
from tilewright.passes.attention._sparse_call import Constants, insert_function


def masked_reference(program: Program, mask: Callable[[VideoAttention], torch.Tensor | None]) -> None:
    """Give every video self-attention the mask [heads, tokens, tokens] (True is kept) beside its own.

    A mask of None leaves the attention as it is.
    """
    constants = Constants(program)
    for node, site in sites(program):
        kept = mask(site) if isinstance(site, VideoAttention) else None
        if kept is not None:
            _restrict(program, node, constants.node(kept, node))


def _restrict(program: Program, node: fx.Node, kept: fx.Node) -> None:
    given = arguments(node)
    if given["mask"] is not None:
        both = torch.ops.aten.bitwise_and.Tensor
        kept = insert_like(program.graph, node, both, (given["mask"], kept), node)
    args = (given["q"], given["k"], given["v"], kept, given["scale"])
    new = insert_like(program.graph, node, ops.attention, args, node)
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)


def chosen_reference(
    program: Program, choose: Callable[[VideoAttention], tuple[torch.Tensor, torch.Tensor] | None]
) -> None:
    """Give each head the one of several masks that changes its sampled rows least.

    choose(site) -> (masks [choices, tokens, tokens], sampled rows), or None to leave the attention.
    """
    constants = Constants(program)
    for node, site in sites(program):
        found = choose(site) if isinstance(site, VideoAttention) else None
        if found is None or not isinstance(site, VideoAttention):
            continue
        masks, rows = found
        kept = [constants.node(m, node) for m in masks]
        given = [arguments(node)[name] for name in ("q", "k", "v")]
        extra = [m for m in [arguments(node)["mask"]] if m is not None]

        def best(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, *rest: torch.Tensor,
            count: int = len(kept), scale: float | None = site.scale,
        ) -> tuple[torch.Tensor]:  # fmt: skip
            own = rest[count:]
            full = ops.attention(q, k, v, own[0] if own else None, scale)
            outs = torch.stack(
                [ops.attention(q, k, v, m & own[0] if own else m, scale) for m in rest[:count]]
            )
            off = (outs - full).index_select(3, rows).square().mean((-1, -2))
            index = off.argmin(0)[None, :, :, None, None].expand(1, *outs.shape[1:])
            return (outs.gather(0, index)[0],)

        inputs = [*given, constants.node(rows, node), *kept, *extra]
        (out,), _ = insert_function(program, site, best, inputs)
        node.replace_all_uses_with(out)
        program.graph.erase_node(node)


Obvious = tuple[Callable[..., tuple[torch.Tensor]], tuple[torch.Tensor, ...]]
"""A plain function of (q, k, v, constants, own mask if any), and those constants."""


def reordered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, *mask: torch.Tensor,
    function: Callable[..., tuple[torch.Tensor]],
) -> tuple[torch.Tensor]:  # fmt: skip
    """A function of (q, k, v, own mask if any) on tokens in an order, its result in theirs."""
    moved = [x.index_select(2, order) for x in (q, k, v)]
    (out,) = function(*moved, *(m.index_select(-1, order) for m in mask))
    return (out.index_select(2, torch.argsort(order)),)


def computed_reference(program: Program, obvious: Callable[[VideoAttention], Obvious | None]) -> None:
    """Put a plain function where each video self-attention stands; None leaves the attention."""
    constants = Constants(program)
    for node, site in sites(program):
        found = obvious(site) if isinstance(site, VideoAttention) else None
        if found is None or not isinstance(site, VideoAttention):
            continue
        function, extra = found
        given = arguments(node)
        inputs = [given["q"], given["k"], given["v"], *(constants.node(t, node) for t in extra)]
        inputs += [given["mask"]] if given["mask"] is not None else []
        (out,), _ = insert_function(program, site, function, inputs)
        node.replace_all_uses_with(out)
        program.graph.erase_node(node)
