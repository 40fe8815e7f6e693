"""Sparse VideoGen (arXiv:2502.01776): every head attends near tokens in space, or the same place over time.

Which of the two is decided in the call, per batch entry and head, on a few sampled queries. Both run the same
band; temporal heads run it with all frames of one place side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from tilewright.compiler import Exactness, Example, PassLog, Program, Stage, Tensor, graph_pass, ops
from tilewright.compiler.bands import band_width
from tilewright.passes.attention._band_layout import band_layout, band_masks, classify, text_of
from tilewright.passes.attention._reference import chosen_reference
from tilewright.passes.attention._sites import VideoAttention
from tilewright.passes.attention._sparse_call import (
    Constants,
    insert_function,
    insert_sparse,
    key_mask_inputs,
    with_key_mask,
)
from tilewright.passes.attention._video_pass import VideoAttentionPass

SAMPLED_FROM = 10_000
"""Rows are drawn from this many first video tokens."""


@dataclass(frozen=True)
class _Plan:
    width: int
    sink: int
    rows: torch.Tensor


@graph_pass(
    "spatial-temporal-attention",
    stage=Stage.ATTENTION,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2502.01776",
    owns=("attention.token_order", "attention.layout"),
)
class SpatialTemporalAttention(VideoAttentionPass):
    """Replace video self-attention by a band in one of two token orders, chosen per head in the call.

    rewrite:
        attention(q, k, v, key mask)
     -> block_sparse_attention(q, k, v, band layouts, head_group=class of each head, key mask)[0]
    """

    density: float = 0.3
    """Share of all pairs that is attended; 1 is dense. (The published command line calls it sparsity.)"""
    rows: int = 64
    """Sampled queries that decide a head's class."""
    sink: bool = False
    """Also attend the first frame's worth of slots, as the published Wan script does."""
    seed: int = 0
    """Of the sampled rows."""

    def validate(self) -> None:
        super().validate()
        if not 0.0 < self.density <= 1.0:
            raise self.option_error("density", "expected more than 0 and at most 1")
        if self.rows < 1:
            raise self.option_error("rows", "expected 1 or more")

    def apply(self, program: Program, log: PassLog) -> None:
        self.sparsify(program, log)

    def plan(self, program: Program, site: VideoAttention) -> _Plan | str:
        if site.keys.kind == "columns" and not site.keys.keeps_video:
            return "its key mask may hide video tokens: blocks of a band have no room for it"
        frame, width = site.grid[1] * site.grid[2], site.tokens
        if self.density < 1.0:
            width = band_width(self.density, tokens=site.tokens, text=site.text, frame=frame)
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(min(site.video, SAMPLED_FROM), (self.rows,), generator=generator) + site.start
        return _Plan(width, frame if self.sink else 0, rows)

    def rewrite(
        self, program: Program, site: VideoAttention, plan: _Plan, constants: Constants
    ) -> tuple[fx.Node, list[fx.Node], str]:
        where = site.grid, site.start, site.tokens
        masks = band_masks(*where, plan.width, plan.sink, plan.rows)
        inputs = [site.query, site.key, site.value]
        inputs += [constants.node(plan.rows, site.query), constants.node(masks, site.query)]
        decide = partial(classify, scale=site.scale, kind=site.keys.kind)
        (group,), made = insert_function(program, site, decide, inputs + key_mask_inputs(site))
        layout = band_layout(*where, site.heads, plan.width, plan.sink)
        layout = with_key_mask(layout, site, text_of(site.start, site.video, site.tokens))
        out, _, called = insert_sparse(program, site, layout, constants, {"head_group": group})
        return out, made + called, f"density {layout.density():.4f}"

    def reference(self, program: Program) -> None:
        """Both dense attentions under written-out masks; a head takes the one that errs less on the rows."""

        def choose(site: VideoAttention) -> tuple[torch.Tensor, torch.Tensor] | None:
            plan = self.plan(program, site)
            if isinstance(plan, str):
                return None
            return band_masks(site.grid, site.start, site.tokens, plan.width, plan.sink), plan.rows

        chosen_reference(program, choose)

    def exact_limit(self) -> SpatialTemporalAttention:
        return replace(self, density=1.0)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        grid = {"video_grid": (4, 5, 6)}
        video, joint = (Tensor(2, 3, 120, 8),) * 3, (Tensor(2, 3, 125, 8),) * 3
        keys = Tensor(2, 1, 1, 125, dtype=torch.bool)

        def plain(q, k, v):
            return ops.attention(q, k, v)

        def masked(q, k, v, m):
            return ops.attention(q, k, v, m)

        yield {}, Example(plain, video, facts=grid)
        yield {"sink": True, "density": 0.2}, Example(plain, video, facts=grid)
        yield {}, Example(plain, joint, facts={**grid, "text_segment": (0, 5)})
        yield {"sink": True}, Example(plain, joint, facts={**grid, "text_segment": (120, 5)})
        hidden = {**grid, "text_segment": (120, 5)}
        yield {}, Example(masked, (*joint, keys), facts=hidden, refusal="may hide video tokens")
        yield {}, Example(plain, video, refusal="fact 'video_grid' is absent")
