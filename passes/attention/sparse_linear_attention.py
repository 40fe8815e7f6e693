"""Sparse-linear attention (SLA, arXiv:2509.24006): exact attention on few blocks, linear on the rest.

The projection of the linear branch is trained; three published variants differ in what that branch sees, and
their projections are not exchangeable. Without one (`variant=none`) this is training-free top-k attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import Exactness, Example, PassLog, Program, Stage, graph_pass, ops
from tilewright.compiler import Tensor as Drawn
from tilewright.compiler.tiles import Triple
from tilewright.passes.attention._block_search import TOKEN_ORDER, Blocks
from tilewright.passes.attention._linear_branch import (
    Feature,
    Variant,
    found_lists,
    read_projection,
    with_linear_branch,
    written_out,
)
from tilewright.passes.attention._reference import computed_reference, reordered
from tilewright.passes.attention._search_phases import insert_found
from tilewright.passes.attention._sites import VideoAttention
from tilewright.passes.attention._sparse_call import Constants, insert_function
from tilewright.passes.attention._video_pass import VideoAttentionPass


@graph_pass(
    "sparse-linear-attention",
    stage=Stage.ATTENTION,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2509.24006",
    owns=("attention.layout", "attention.correction"),
    trains=True,
)
class SparseLinearAttention(VideoAttentionPass):
    """Replace video self-attention by attention to the blocks of the largest pooled scores.

    rewrite:
        attention(q, k, v, key mask)
     -> block_sparse_attention(q, k, v, critical blocks, key mask)[0] + linear(linear attention, proj)
    """

    topk: float = 0.05
    """Share of the video's key blocks that are critical; 1 is dense."""
    skip: float = 0.1
    """Share that even the linear branch skips, for variant=paper."""
    block: int = 64
    """Tokens of a block."""
    tile: Triple = TOKEN_ORDER
    """Tiles that video tokens stand in before blocks are cut; 0x0x0 keeps their own order."""
    feature: Feature = "softmax"
    """Feature map of the linear branch."""
    variant: Variant = "none"
    """What the linear branch sees; none leaves it out."""
    proj: str = ""
    """A safetensors file with the trained projections."""

    def validate(self) -> None:
        super().validate()
        if not 0.0 < self.topk <= 1.0:
            raise self.option_error("topk", "expected more than 0 and at most 1")
        if not 0.0 <= self.skip <= 1.0:
            raise self.option_error("skip", "expected 0 to 1")
        if self.block < 16 or self.block % 16:
            raise self.option_error("block", "expected a multiple of 16")
        if self.tile != TOKEN_ORDER and min(self.tile) < 1:
            raise self.option_error("tile", "expected three whole numbers from 1, or 0x0x0")
        if self.proj and self.tile != TOKEN_ORDER:
            raise self.option_error("tile", "a projection is trained for blocks of tokens in their own order")
        if (self.variant == "none") != (self.proj == ""):
            raise self.option_error(
                "variant", "the linear branch goes with a trained projection: give both or none"
            )

    def apply(self, program: Program, log: PassLog) -> None:
        self.sparsify(program, log)

    def plan(self, program: Program, site: VideoAttention) -> Blocks | str:
        if self.proj and program.training:
            return "gradients are wanted, and the projection is a constant here"
        return Blocks.of(site, self.block, self.tile)

    def rewrite(
        self, program: Program, site: VideoAttention, plan: Blocks, constants: Constants
    ) -> tuple[fx.Node, list[fx.Node], str]:
        look = partial(found_lists, plan=plan, block=self.block, topk=self.topk)
        out, made = insert_found(program, site, plan, constants, look)
        if self.variant != "none":
            parts = [constants.node(t, site.query) for t in self._projection(site)]
            add = partial(with_linear_branch, plan=plan, **self._branch(), topk=self.topk, skip=self.skip)
            (out,), more = insert_function(
                program, site, add, [out, site.query, site.key, site.value, *parts]
            )
            made += more
        return out, made, f"variant {self.variant}, {plan.count} blocks"

    def _branch(self) -> dict[str, Any]:
        return {"block": self.block, "feature": self.feature, "variant": self.variant}

    def _projection(self, site: VideoAttention) -> tuple[Tensor, Tensor]:
        size = int(site.value.meta["val"].shape[-1])
        return read_projection(self.proj, site.where, size, self.variant, self.feature)

    def reference(self, program: Program) -> None:
        """Dense attention under the mask of the critical blocks, plus the branch over the marginal ones."""

        def obvious(site: VideoAttention) -> Any:
            plan = self.plan(program, site)
            if isinstance(plan, str):
                return None
            proj = self._projection(site) if self.variant != "none" else ()
            how = {**self._branch(), "topk": self.topk, "skip": self.skip, "scale": site.scale}
            dense = partial(written_out, start=site.start, video=site.video, **how)
            return (partial(reordered, function=dense) if plan.tiling else dense), (*plan.order(), *proj)

        computed_reference(program, obvious)

    def exact_limit(self) -> SparseLinearAttention:
        return replace(self, topk=1.0, variant="none", proj="")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        grid = {"video_grid": (4, 5, 6)}
        video, joint = (Drawn(2, 3, 120, 8),) * 3, (Drawn(2, 3, 125, 8),) * 3
        keys = Drawn(2, 1, 1, 125, dtype=torch.bool)
        small = {"block": 16, "topk": 0.3}

        def plain(q, k, v):
            return ops.attention(q, k, v)

        yield small, Example(plain, video, facts=grid)
        yield small, Example(plain, joint, facts={**grid, "text_segment": (0, 5)})
        tiled = {**small, "tile": (2, 3, 4)}
        masked = Example(
            lambda q, k, v, m: ops.attention(q, k, v, m),
            (*joint, keys),
            facts={**grid, "text_segment": (120, 5)},
        )
        yield small, masked
        yield tiled, masked
        yield small, Example(plain, video, refusal="fact 'video_grid' is absent")
