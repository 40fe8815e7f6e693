"""Online layouts: score blocks, select the heaviest per row, make lists of them. Plain tensor ops."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.compiler.block_layout import BlockLayout, rows_from_block_mask
from tilewright.compiler.tiles import Tiling, Triple, tile_grid
from tilewright.passes.attention._sites import VideoAttention
from tilewright.passes.attention._tile_layout import slot_order

TOKEN_ORDER: Triple = (0, 0, 0)
"""The tile of blocks that are cut from tokens in their own order."""


@dataclass(frozen=True)
class Blocks:
    """How the tokens are cut: video blocks of one size (the last may be short), text in blocks of its own."""

    sizes: tuple[int, ...]
    text: tuple[bool, ...]
    tiling: Tiling | None = None
    """The tiles that video tokens stand in before they are cut; None: their own order."""

    @staticmethod
    def of(site: VideoAttention, block: int, tile: Triple = TOKEN_ORDER) -> Blocks:
        """Blocks of a site's tokens, tile by tile; OptionError for a tile larger than the grid."""

        def runs(length: int) -> list[int]:
            return [min(block, length - at) for at in range(0, length, block)]

        parts = [runs(site.start), runs(site.video), runs(site.tokens - site.start - site.video)]
        text = tuple(i != 1 for i, p in enumerate(parts) for _ in p)
        tiling = None if tile == TOKEN_ORDER else tile_grid(site.grid, tile)
        return Blocks(tuple(itertools.chain(*parts)), text, tiling)

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def video(self) -> slice:
        """The video's blocks."""
        first = self.text.index(False)
        return slice(first, first + self.text.count(False))

    def borders(self) -> list[int]:
        return [*itertools.accumulate(self.sizes, initial=0)]

    def order(self) -> tuple[Tensor, ...]:
        """int64 [tokens]: the token in each slot; empty where that is the token itself."""
        if self.tiling is None:
            return ()
        borders = self.borders()
        return (slot_order(self.tiling.table(), borders[self.video.start], borders[-1]),)

    def dense(self, heads: int) -> BlockLayout:
        """The layout of all blocks."""
        whole = torch.ones(self.count, self.count, dtype=torch.bool)
        layout = BlockLayout.from_block_mask(whole, self.borders(), self.borders(), heads)
        if self.tiling is None:
            return layout
        source = self.order()[0].to(torch.int32)[None]
        return layout.with_(src_q=source, src_k=source)


def kept_per_row(blocks: int, sparsity: float) -> int:
    """Key blocks that a row keeps at a sparsity; at least one."""
    return max(1, round((1.0 - sparsity) * blocks))


def rank_of(scores: Tensor) -> Tensor:
    """int64: place of each score in its row, the largest first; equal ones in order."""
    return torch.argsort(torch.argsort(scores, dim=-1, descending=True, stable=True), dim=-1)


def select_heaviest(mass: Tensor, sparsity: float, threshold: float, adaptive: bool) -> Tensor:
    """bool [B, H, nQ, nK]: the same number of blocks in every row of a head, those with the most mass.

    adaptive: the n heads that keep the largest share of their mass get sparsity (1 + s) / 2, the n that keep
    the smallest (3 s - 1) / 2, where n counts the heads that keep more than `threshold`, at most half of
    them; the mean stays s (AdaSpa, arXiv:2502.21079).
    """
    heads, blocks = mass.shape[1], mass.shape[3]
    rank = rank_of(mass)
    base = kept_per_row(blocks, sparsity)
    if not adaptive or sparsity == 0.0:
        return rank < base
    kept = torch.where(rank < base, mass, torch.zeros_like(mass)).sum((-1, -2))
    recall = kept / mass.sum((-1, -2))
    n = (recall > threshold).sum(1, keepdim=True).clamp(max=heads // 2)
    order = rank_of(recall)
    tiers = [kept_per_row(blocks, s) for s in ((1 + sparsity) / 2, sparsity, (3 * sparsity - 1) / 2)]
    most = torch.full_like(order, tiers[1])
    most = torch.where(order < n, torch.full_like(order, tiers[0]), most)
    most = torch.where(order >= heads - n, torch.full_like(order, tiers[2]), most)
    return rank < most[:, :, None, None]


def with_text_blocks(chosen: Tensor, text: Tensor) -> Tensor:
    """bool [B, H, n, n] over all blocks from the selection over the video's: text attends and is attended.

    text: bool [n].
    """
    before = int(text.shape[0] - chosen.shape[-1])
    if before == 0:
        return chosen
    first = torch.cumsum(~text, 0).clamp(min=1) - 1
    spread = chosen.index_select(2, first).index_select(3, first)
    return spread | text[:, None] | text[None]


def lists(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row_ptr int32 [B H, n + 1], col int32 [B H, n n], head_group int32 [B, H]) of a mask [B, H, n, n]."""
    batch, heads = mask.shape[:2]
    row_ptr, col, _ = rows_from_block_mask(mask.flatten(0, 1))
    groups = torch.arange(batch * heads, dtype=torch.int32, device=mask.device)
    return row_ptr, col, groups.reshape(batch, heads)
