"""The obvious program behind an approximate attention pass: dense attention under a mask over all pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from tilewright.compiler import Program, ops
from tilewright.compiler.graph import insert_like
from tilewright.compiler.schema import arguments
from tilewright.passes.attention._sites import VideoAttention, sites
from tilewright.passes.attention._sparse_call import Constants


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
