"""Sliding tile attention (arXiv:2502.04507): video tokens attend a window of whole tiles of the grid.

Windows move in tiles, so every block of a kernel is computed whole or not at all. Text attends and is
attended by everything.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from tilewright.compiler import Exactness, Example, PassLog, Program, Stage, Tensor, graph_pass, ops
from tilewright.compiler.tiles import Nondivisible, Tiling, Triple, check_window, tile_grid, window_density
from tilewright.passes.attention._reference import masked_reference
from tilewright.passes.attention._sites import VideoAttention
from tilewright.passes.attention._sparse_call import Constants, insert_sparse, with_key_mask
from tilewright.passes.attention._tile_layout import reference_mask, text_blocks, tile_layout
from tilewright.passes.attention._video_pass import VideoAttentionPass
from tilewright.passes.attention._window_table import mismatch, read_table, table_rows


@dataclass(frozen=True)
class _Plan:
    tiling: Tiling
    windows: tuple[Triple, ...]
    """One per head."""


@graph_pass(
    "sliding-tile-attention",
    stage=Stage.ATTENTION,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2502.04507",
    owns=("attention.token_order", "attention.layout"),
)
class SlidingTileAttention(VideoAttentionPass):
    """Replace video self-attention by block-sparse attention over tile windows.

    rewrite:
        attention(q, k, v, key mask)
     -> block_sparse_attention(q, k, v, layout of the windows, key mask)[0]
    """

    tile: tuple[int, int, int] = (6, 8, 8)
    """Tokens of a tile along T, Y, X."""
    window: tuple[int, int, int] = (3, 3, 3)
    """Tiles of a window along T, Y, X: odd, or all of the axis; 0 means all."""
    table: str = ""
    """A JSON file with a window per step, layer and head, instead of `window`."""
    step: int = 0
    """The table's row."""
    nondivisible: Nondivisible = "error"
    """Where the tile does not divide the grid: error, dense, ceil (short tiles at the end), balanced."""

    def validate(self) -> None:
        super().validate()
        if any(n < 1 for n in self.tile):
            raise self.option_error("tile", "expected three whole numbers from 1")
        if any(w < 0 for w in self.window):
            raise self.option_error("window", "expected three whole numbers, odd or 0 for the whole axis")
        if self.step < 0:
            raise self.option_error("step", "steps are counted from 0")

    def steps(self) -> Mapping[int, Hashable]:
        return table_rows(self.table) if self.table else {}

    def apply(self, program: Program, log: PassLog) -> None:
        self.sparsify(program, log)

    def plan(self, program: Program, site: VideoAttention) -> _Plan | str:
        tiling = tile_grid(site.grid, self.tile, self.nondivisible)
        if tiling is None:
            return f"the tile {self.tile} does not divide the grid {site.grid}, and nondivisible = dense"
        windows = self._windows(program, site, tiling)
        if isinstance(windows, str):
            return windows
        for window in set(windows):
            problem = check_window(window, tiling.counts)
            if problem is not None:
                raise self.option_error("table" if self.table else "window", f"{window}: {problem}")
        return _Plan(tiling, windows)

    def _windows(self, program: Program, site: VideoAttention, tiling: Tiling) -> tuple[Triple, ...] | str:
        if not self.table:
            t, y, x = (w or n for w, n in zip(self.window, tiling.counts, strict=True))
            return ((t, y, x),) * site.heads
        table = read_table(self.table, self.step)
        here = {"grid": list(site.grid), "tile": list(self.tile), "heads": site.heads}
        return mismatch(table, program, here) or table.heads(site.where, site.heads)

    def rewrite(
        self, program: Program, site: VideoAttention, plan: _Plan, constants: Constants
    ) -> tuple[fx.Node, list[fx.Node], str]:
        layout = tile_layout(plan.tiling, site.start, site.tokens, plan.windows)
        text = text_blocks(plan.tiling, site.start, site.tokens)
        out, _, made = insert_sparse(program, site, with_key_mask(layout, site, text), constants)
        density = sum(window_density(plan.tiling, w) for w in plan.windows) / len(plan.windows)
        return out, made, f"video density {float(density):.4f}, all {layout.density():.4f}"

    def reference(self, program: Program) -> None:
        """Dense attention under the mask of the window rule, written out pair by pair."""

        def mask(site: VideoAttention) -> torch.Tensor | None:
            plan = self.plan(program, site)
            if isinstance(plan, str):
                return None
            return reference_mask(plan.tiling, site.start, site.tokens, plan.windows)

        masked_reference(program, mask)

    def exact_limit(self) -> SlidingTileAttention:
        return replace(self, window=(0, 0, 0), table="")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        grid = {"video_grid": (4, 4, 6)}
        small, ragged = {"tile": (2, 2, 2), "window": (1, 1, 3)}, {"tile": (3, 3, 4), "window": (1, 1, 1)}
        video = (Tensor(2, 3, 96, 8),) * 3
        joint = (Tensor(2, 3, 101, 8),) * 3

        def plain(q, k, v):
            return ops.attention(q, k, v)

        yield small, Example(plain, video, facts=grid)
        yield {**ragged, "nondivisible": "ceil"}, Example(plain, video, facts=grid)
        yield {**ragged, "nondivisible": "balanced"}, Example(plain, video, facts=grid)
        yield small, Example(plain, joint, facts={**grid, "text_segment": (96, 5)})
        yield small, Example(plain, joint, facts={**grid, "text_segment": (0, 5)})
        keys = Tensor(2, 1, 1, 101, dtype=torch.bool)
        masked = Example(
            lambda q, k, v, m: ops.attention(q, k, v, m),
            (*joint, keys),
            facts={**grid, "text_segment": (0, 5)},
        )
        yield small, masked
        yield small, Example(plain, video, refusal="fact 'video_grid' is absent")
        left = {**ragged, "nondivisible": "dense"}
        yield left, Example(plain, video, facts=grid, refusal="does not divide the grid")
        yield (
            {**small, "dense_layers": (0,)},
            Example(plain, video, facts=grid, refusal="left dense by option"),
        )
        cross = Example(
            plain, (video[0], Tensor(2, 3, 7, 8), Tensor(2, 3, 7, 8)), facts=grid, refusal="no self-attention"
        )
        yield small, cross
