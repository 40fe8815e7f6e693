"""The layout of sliding tile attention: query tiles attend the key tiles of their window, text everything."""

from __future__ import annotations

import functools
import itertools

import torch

from tilewright.compiler.block_layout import BlockLayout
from tilewright.compiler.tiles import Tiling, Triple, axis_window, key_tiles

BLOCK = 128
"""Most tokens of one block: a larger tile is several blocks of nearly one size, none across two tiles."""


def cut(length: int, block: int = BLOCK) -> list[int]:
    """Sizes of the blocks of a run of tokens: as equal as multiples of 16 allow, the last takes the rest."""
    count = -(-length // block)
    size = -(-length // (16 * count)) * 16 if count else 0
    whole, rest = divmod(length, size) if size else (0, 0)
    return [size] * whole + [rest] * bool(rest)


@functools.lru_cache(maxsize=32)
def tile_layout(tiling: Tiling, start: int, tokens: int, windows: tuple[Triple, ...]) -> BlockLayout:
    """The layout over `tokens` tokens whose video begins at `start`; a window for each head, in tiles.

    Slots are tokens in tile order; text keeps its place before or after the video, in blocks of its own.
    Heads with one window share a group.
    """
    sizes, tile_of = _blocks(tiling, start, tokens)
    distinct = sorted(set(windows))
    mask = torch.stack([_block_mask(tiling, tile_of, window) for window in distinct])
    borders = [*itertools.accumulate(sizes, initial=0)]
    layout = BlockLayout.from_block_mask(
        mask,
        borders,
        borders,
        len(windows),
        head_group=torch.tensor([[distinct.index(w) for w in windows]], dtype=torch.int32),
    )
    order = slot_order(tiling.table(), start, tokens)
    if torch.equal(order, torch.arange(tokens)):
        return layout
    source = order.to(torch.int32)[None]
    return layout.with_(src_q=source, src_k=source)


def slot_order(video: torch.Tensor, start: int, tokens: int) -> torch.Tensor:
    """int64 [tokens]: the token in each slot when the video's own order is `video`, and text stays."""
    order = torch.arange(tokens)
    order[start : start + len(video)] = video + start
    return order


def _blocks(tiling: Tiling, start: int, tokens: int) -> tuple[list[int], torch.Tensor]:
    """(block sizes in slot order, int64 [blocks]: the tile of each block, -1 for text)."""
    sizes = cut(start) if start else []
    tiles = [-1] * len(sizes)
    for tile, length in enumerate(tiling.lengths):
        parts = cut(length)
        sizes += parts
        tiles += [tile] * len(parts)
    rest = tokens - start - tiling.tokens
    after = cut(rest) if rest else []
    return sizes + after, torch.tensor(tiles + [-1] * len(after))


def text_blocks(tiling: Tiling, start: int, tokens: int) -> torch.Tensor:
    """bool [blocks]: which blocks hold text."""
    return _blocks(tiling, start, tokens)[1] < 0


def _block_mask(tiling: Tiling, tile_of: torch.Tensor, window: Triple) -> torch.Tensor:
    """bool [blocks, blocks]."""
    tiles = len(tiling.lengths)
    near = torch.zeros(tiles + 1, tiles + 1, dtype=torch.bool)
    for query, keys in enumerate(key_tiles(tiling.counts, window)):
        near[query, list(keys)] = True
    near[tiles], near[:, tiles] = True, True
    return near[tile_of][:, tile_of]


def reference_mask(tiling: Tiling, start: int, tokens: int, windows: tuple[Triple, ...]) -> torch.Tensor:
    """bool [heads, tokens, tokens] by the definition, pair of tokens by pair of tokens, in token order."""
    kept = torch.ones(len(windows), tokens, tokens, dtype=torch.bool)
    inside = slice(start, start + tiling.tokens)
    places = torch.arange(tiling.tokens)
    for head, window in enumerate(windows):
        near = torch.ones(tiling.tokens, tiling.tokens, dtype=torch.bool)
        strides = (tiling.grid[1] * tiling.grid[2], tiling.grid[2], 1)
        for sizes, length, stride, wide in zip(tiling.sizes, tiling.grid, strides, window, strict=True):
            tile = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            at = tile[places // stride % length]
            first, end = torch.tensor(axis_window(len(sizes), wide)).unbind(1)
            near &= (at[None] >= first[at][:, None]) & (at[None] < end[at][:, None])
        kept[head, inside, inside] = near
    return kept
