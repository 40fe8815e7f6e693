"""Keys of low rank before their rotary embedding, and the means of chunks of keys: what shadow-kv is made of.

Sequences are shifted here so that token 0 lies at 0: a place is a position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.compiler import ops

Turn = Callable[..., Tensor]
"""What computes `rotate_rows`."""


class Shadow(NamedTuple):
    """What stands for the prompts of B sequences."""

    keys: Tensor
    """[B, Hkv, S, D]: the keys, rebuilt from low rank."""
    landmarks: Tensor
    """[B, Hkv, n, D]: the mean key of each chunk."""
    outliers: Tensor
    """bool [B, Hkv, n]: chunks that their mean does not describe; they stay exact."""
    chunks: Tensor
    """int64 [B]: how many chunks may be chosen; what comes after them is local."""


def shifted(pages: Tensor, table: Tensor, begin: Tensor) -> Tensor:
    """[B, Hkv, S, D]: rows of a pool in order, those of each sequence from its token `begin` on."""
    rows = pages[table.clamp(min=0).long()].transpose(1, 2).flatten(2, 3)
    size = rows.shape[2]
    at = (begin[:, None] + torch.arange(size, device=rows.device)).clamp(max=size - 1)
    return rows.gather(2, at[:, None, :, None].expand_as(rows))


def pace_of(theta: float, wide: int, device: torch.device | None = None) -> Tensor:
    """float32 [wide / 2]: the radians of a position, by pair of a head's channels."""
    return (theta ** (torch.arange(0, wide, 2, dtype=torch.float64, device=device) / -wide)).float()


def unrotated(keys: Tensor, pace: Tensor, at: Tensor, turn: Turn = ops.rotate_rows) -> Tensor:
    """[B, S, Hkv D]: keys [B, Hkv, S, D] before their rotary embedding at places int64 [S]; float32 at
    least."""
    exact = keys.float() if keys.dtype in (torch.float16, torch.bfloat16) else keys
    return turn(exact, -at[None, None], pace).transpose(1, 2).flatten(2)


def directions(gram: Tensor, rank: int) -> Tensor:
    """[..., W, rank]: the directions that hold most of rows whose Gram matrix is [..., W, W]."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[..., -rank:]


def low_rank(keys: Tensor, lengths: Tensor, rank: int, theta: float, turn: Turn = ops.rotate_rows) -> Tensor:
    """[B, Hkv, S, D]: the keys of `lengths` tokens by the best `rank` directions over all heads, unrotated.

    By eigenvectors of the (Hkv D)^2 Gram matrix. The keys themselves where that is every direction."""
    batch, heads, size, wide = keys.shape
    if rank >= heads * wide:
        return keys
    pace, at = pace_of(theta, wide, keys.device), torch.arange(size, device=keys.device)
    flat = unrotated(keys, pace, at, turn)
    held = at < lengths[:, None]
    flat = flat * held[:, :, None]
    basis = directions(flat.mT @ flat, rank)
    near = (flat @ basis @ basis.mT).unflatten(2, (heads, wide)).transpose(1, 2)
    return turn(near, at[None, None], pace).to(keys.dtype)


def likeness(keys: Tensor, landmarks: Tensor) -> Tensor:
    """[..., n]: the least cosine of a chunk's mean, [..., n, D], and its keys, of [..., S, D]."""
    chunks = keys.unflatten(-2, (landmarks.shape[-2], -1))
    return functional.cosine_similarity(chunks, landmarks[..., None, :], -1).amin(-1)


def outliers(like: Tensor, chunks: Tensor, count: int) -> Tensor:
    """bool [B, Hkv, n]: of the first `chunks`, the `count` with the keys farthest in angle from the mean."""
    inside = torch.arange(like.shape[2], device=like.device) < chunks[:, None, None]
    return marked(-like, inside.expand_as(like), count)


def chosen(q: Tensor, landmarks: Tensor, allowed: Tensor, count: int, scale: float) -> Tensor:
    """bool [B, Hkv, n]: of the allowed chunks, bool [B, Hkv, n], the `count` with the greatest share of any
    query head of q [B, H, 1, D]."""
    logits = q.squeeze(2).unflatten(1, (landmarks.shape[1], -1)) @ landmarks.mT * scale
    shares = logits.masked_fill(~allowed[:, :, None], float("-inf")).softmax(-1).amax(2)
    return marked(shares, allowed, count)


def marked(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    """bool, as `scores`: the `count` greatest that are allowed."""
    scores = scores.masked_fill(~allowed, float("-inf"))
    best = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(allowed).scatter(-1, best, True) & allowed


def attended(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) over the rows that are kept, bool [B, Hkv, S]."""
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).mT * scale
    logits = logits.masked_fill(~kept.repeat_interleave(group, 1)[:, :, None], float("-inf"))
    return logits.softmax(-1) @ v.repeat_interleave(group, 1), logits.logsumexp(-1)
