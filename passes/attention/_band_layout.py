"""The layout of bands: near keys in frame-major order, or near keys in token-major order; text everything."""

from __future__ import annotations

import functools
import itertools

import torch

from tilewright.compiler.block_layout import BlockLayout, Predicate
from tilewright.compiler.digit_perm import DigitPerm, token_major
from tilewright.compiler.tiles import Triple
from tilewright.passes.attention._sparse_call import kept_keys, widened
from tilewright.passes.attention._tile_layout import BLOCK, slot_order

SPATIAL, TEMPORAL = 0, 1
"""Groups of the layout, and classes of heads."""


def orders(grid: Triple) -> list[torch.Tensor]:
    """The video's token at each slot, by class of head."""
    video = grid[0] * grid[1] * grid[2]
    return [DigitPerm.identity(video).table(), token_major(grid).table()]


def _sizes(start: int, video: int, tokens: int) -> tuple[list[int], torch.Tensor]:
    """(block sizes, bool [blocks]: text)."""

    def runs(length: int) -> list[int]:
        return [min(BLOCK, length - at) for at in range(0, length, BLOCK)]

    parts = [runs(start), runs(video), runs(tokens - start - video)]
    return [*itertools.chain(*parts)], torch.tensor([i != 1 for i, p in enumerate(parts) for _ in p])


def text_of(start: int, video: int, tokens: int) -> torch.Tensor:
    """bool [blocks]: which blocks hold text."""
    return _sizes(start, video, tokens)[1]


@functools.lru_cache(maxsize=32)
def band_layout(grid: Triple, start: int, tokens: int, heads: int, width: int, sink: int) -> BlockLayout:
    """Two groups, spatial and temporal: slots at most `width` apart, and the first `sink` slots of the video.

    All heads are in group 0 until a classification says otherwise.
    """
    video = grid[0] * grid[1] * grid[2]
    sizes, text = _sizes(start, video, tokens)
    borders = torch.tensor([*itertools.accumulate(sizes, initial=0)])
    first, last = borders[:-1], borders[1:] - 1
    ahead, behind = first[:, None] - last[None], first[None] - last[:, None]
    furthest = torch.maximum(last[:, None] - first[None], last[None] - first[:, None])
    dense = text[:, None] | text[None]
    some = dense | ((ahead <= width) & (behind <= width)) | (first < start + sink)[None]
    whole = dense | (furthest <= width) | (last < start + sink)[None]
    rule = Predicate.band(width, sink=start + sink if sink else 0)
    offsets = borders.tolist()
    layout = BlockLayout.from_block_mask(
        some.expand(2, -1, -1),
        offsets,
        offsets,
        heads,
        head_group=torch.zeros(1, heads, dtype=torch.int32),
        flag=(~whole).int().expand(2, -1, -1),
        predicates=(rule,),
    )
    source = torch.stack([slot_order(o, start, tokens) for o in orders(grid)]).to(torch.int32)
    return layout.with_(src_q=source, src_k=source)


def band_masks(
    grid: Triple, start: int, tokens: int, width: int, sink: int, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """bool [2, rows, tokens] by the definition, in token order; all tokens are rows when none are given."""
    rows = torch.arange(tokens) if rows is None else rows
    kept = []
    for order in orders(grid):
        slot = torch.full((tokens,), -1)
        slot[start : start + len(order)] = torch.argsort(order)
        near = (slot[rows][:, None] - slot[None]).abs() <= width
        text = (slot[rows] < 0)[:, None] | (slot < 0)[None]
        kept.append(near | text | (slot < sink)[None])
    return torch.stack(kept)


def classify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    masks: torch.Tensor,
    *keys: torch.Tensor,
    scale: float | None,
    kind: str,
) -> tuple[torch.Tensor]:
    """int32 [B, H]: TEMPORAL where that band errs less on the sampled rows than the spatial one.

    q, k, v [B, H, N, D], rows int64 [m], masks bool [2, m, N], keys as `kept_keys` takes them.
    """
    k, v = widened(k), widened(v)
    picked = widened(q.index_select(2, rows))
    scores = picked @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if keys:
        scores = scores.masked_fill(~kept_keys(kind, keys[0], k.shape[2]), float("-inf"))
    full = torch.softmax(scores, -1) @ v
    errors = []
    for band in range(2):
        near = torch.softmax(scores.masked_fill(~masks[band], float("-inf")), -1) @ v
        errors.append((near - full).square().mean((-1, -2)))
    return ((errors[TEMPORAL] < errors[1 - TEMPORAL]).to(torch.int32),)
