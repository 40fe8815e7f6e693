"""AdaSpa (arXiv:2502.21079): find the heaviest blocks of each head at a few steps, reuse them in between.

The phase of a step is chosen outside the program (`runtime.step_state`), so one model is compiled once per
phase: `search` runs dense and keeps a layout, `cached-search` finds a new one with the normalisers of the
last search, `sparse` uses what is kept. `every` searches in each call and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx

from tilewright.compiler import Exactness, Example, PassLog, Program, Stage, Tensor, graph_pass, ops
from tilewright.compiler.tiles import Triple
from tilewright.passes.attention._block_search import TOKEN_ORDER, Blocks
from tilewright.passes.attention._reference import computed_reference, reordered
from tilewright.passes.attention._search_phases import dense_choice, insert_phase, written_out
from tilewright.passes.attention._sites import VideoAttention
from tilewright.passes.attention._sparse_call import Constants
from tilewright.passes.attention._video_pass import VideoAttentionPass


@graph_pass(
    "adaptive-block-attention",
    stage=Stage.ATTENTION,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2502.21079",
    owns=("attention.layout",),
)
class AdaptiveBlockAttention(VideoAttentionPass):
    """Replace video self-attention by block-sparse attention over the blocks with the most probability.

    rewrite:
        attention(q, k, v, key mask)
     -> block_sparse_attention(q, k, v, heaviest blocks by block_mass, key mask)[0]
    """

    sparsity: float = 0.8
    """Share of the video's key blocks that a row leaves out; 0 is dense."""
    block: int = 64
    """Tokens of a block."""
    tile: Triple = TOKEN_ORDER
    """Video tokens stand in tiles of this size before blocks are cut, so blocks are near in space; 0x0x0
    keeps their own order."""
    threshold: float = 0.8
    """Recall above which a head may be sparser."""
    head_adaptive: bool = True
    """Move blocks from heads that need few to heads that need many."""
    phase: Literal["every", "search", "cached-search", "sparse"] = "every"
    """What the program does; all but `every` keep state between steps."""

    def validate(self) -> None:
        super().validate()
        least = 1 / 3 if self.head_adaptive and self.sparsity else 0.0
        if not least <= self.sparsity < 1.0:
            adaptive = "0, or 1/3 (head_adaptive) " if self.head_adaptive else "0 "
            raise self.option_error("sparsity", f"expected {adaptive}up to less than 1")
        if self.block < 16 or self.block % 16:
            raise self.option_error("block", "expected a multiple of 16")
        if self.tile != TOKEN_ORDER and min(self.tile) < 1:
            raise self.option_error("tile", "expected three whole numbers from 1, or 0x0x0")
        if not 0.0 <= self.threshold <= 1.0:
            raise self.option_error("threshold", "expected 0 to 1")

    def apply(self, program: Program, log: PassLog) -> None:
        self.sparsify(program, log)

    def plan(self, program: Program, site: VideoAttention) -> Blocks | str:
        if site.keys.kind == "columns" and not site.keys.keeps_video:
            return "its key mask may hide video tokens: the mass of their blocks would mislead the search"
        return Blocks.of(site, self.block, self.tile)

    def rewrite(
        self, program: Program, site: VideoAttention, plan: Blocks, constants: Constants
    ) -> tuple[fx.Node, list[fx.Node], str]:
        choose = partial(
            dense_choice, sparsity=self.sparsity, threshold=self.threshold, adaptive=self.head_adaptive
        )
        out, made = insert_phase(program, site, plan, constants, choose, self.phase)
        return out, made, f"{self.phase}, {plan.count} blocks"

    def reference(self, program: Program) -> None:
        """Dense attention under the mask of the blocks that a dense softmax gives the most mass.

        A search step gives the dense result, so there the program is its own reference.
        """

        def obvious(site: VideoAttention) -> Any:
            plan = self.plan(program, site)
            if isinstance(plan, str) or self.phase == "search":
                return None
            how: dict[str, Any] = {
                "sparsity": self.sparsity,
                "threshold": self.threshold,
                "adaptive": self.head_adaptive,
            }
            dense = partial(written_out, plan=plan, scale=site.scale, **how)
            return (partial(reordered, function=dense) if plan.tiling else dense), plan.order()

        computed_reference(program, obvious)

    def exact_limit(self) -> AdaptiveBlockAttention:
        return replace(self, sparsity=0.0)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        grid = {"video_grid": (4, 6, 6)}
        video, joint = (Tensor(2, 4, 144, 8),) * 3, (Tensor(2, 4, 149, 8),) * 3
        keys = Tensor(2, 1, 1, 149, dtype=torch.bool)

        def plain(q, k, v):
            return ops.attention(q, k, v)

        def masked(q, k, v, m):
            return ops.attention(q, k, v, m)

        small = {"block": 16, "sparsity": 0.6}
        yield small, Example(plain, video, facts=grid)
        yield {**small, "threshold": 0.5}, Example(plain, video, facts=grid)
        yield {**small, "head_adaptive": False}, Example(plain, joint, facts={**grid, "text_segment": (0, 5)})
        yield small, Example(plain, joint, facts={**grid, "text_segment": (144, 5)})
        yield {**small, "tile": (2, 3, 4)}, Example(plain, joint, facts={**grid, "text_segment": (0, 5)})
        hidden = {**grid, "text_segment": (144, 5)}
        yield small, Example(masked, (*joint, keys), facts=hidden, refusal="may hide video tokens")
        yield small, Example(plain, video, refusal="fact 'video_grid' is absent")
