"""Keys of low rank before their rotary embedding, and the means of chunks of keys: what shadow-kv is made of.

Sequences are shifted here so that token 0 lies at 0: a place is a position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


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


def rotated(keys: Tensor, theta: float, sign: int) -> Tensor:
    """Rotary embedding (halves) of [..., S, D] at places 0..S-1; sign = -1 takes it back."""
    size, wide = keys.shape[-2:]
    pace = torch.arange(0, wide, 2, dtype=torch.float64, device=keys.device) / -wide
    angle = torch.arange(size, dtype=torch.float64, device=keys.device)[:, None] * theta**pace
    cos, sin = (f(angle).repeat(1, 2).to(keys.dtype) for f in (torch.cos, torch.sin))
    low, high = keys.chunk(2, -1)
    return keys * cos + sign * torch.cat([-high, low], -1) * sin


def low_rank(keys: Tensor, lengths: Tensor, rank: int, theta: float) -> Tensor:
    """[B, Hkv, S, D]: the keys of `lengths` tokens by the best `rank` directions over all heads, unrotated.

    By eigenvectors of the (Hkv D)^2 Gram matrix. The keys themselves where that is every direction."""
    batch, heads, size, wide = keys.shape
    if rank >= heads * wide:
        return keys
    exact = keys.float() if keys.dtype in (torch.float16, torch.bfloat16) else keys
    flat = rotated(exact, theta, -1).transpose(1, 2).flatten(2)
    held = torch.arange(size, device=keys.device) < lengths[:, None]
    flat = flat * held[:, :, None]
    basis = torch.linalg.eigh(flat.mT @ flat).eigenvectors[:, :, -rank:]
    near = (flat @ basis @ basis.mT).unflatten(2, (heads, wide)).transpose(1, 2)
    return rotated(near, theta, 1).to(keys.dtype)


def outliers(keys: Tensor, landmarks: Tensor, chunks: Tensor, count: int) -> Tensor:
    """bool [B, Hkv, n]: of the first `chunks`, the `count` with the keys farthest in angle from the mean."""
    n = landmarks.shape[2]
    like = functional.cosine_similarity(keys.unflatten(2, (n, -1)), landmarks[:, :, :, None], -1).amin(3)
    inside = torch.arange(n, device=keys.device) < chunks[:, None, None]
    return marked(-like, inside.expand_as(like), count)


def chosen(q: Tensor, shadow: Shadow, count: int, scale: float) -> Tensor:
    """bool [B, Hkv, n]: the `count` chunks with the greatest share of any query head of q [B, H, 1, D]."""
    heads, n = shadow.landmarks.shape[1:3]
    inside = torch.arange(n, device=q.device) < shadow.chunks[:, None, None]
    inside = inside & ~shadow.outliers
    logits = q.squeeze(2).unflatten(1, (heads, -1)) @ shadow.landmarks.mT * scale
    shares = logits.masked_fill(~inside[:, :, None], float("-inf")).softmax(-1).amax(2)
    return marked(shares, inside, count)


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
