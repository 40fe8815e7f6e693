"""Scores that tokens get from softmaxes of noised logits: what `keyformer-kv` is made of.

Noise is a function of seed, layer, query head and the two positions, counted from where a sequence starts: it
does not depend on batch, padding, or how a prompt was cut into calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256
"""Query rows at a time: no tensor is larger than ROWS x keys per head."""
BITS = 23
"""Of a random number: float32 holds k + 1/2 for all of them."""


def _mixed(x: Tensor) -> Tensor:
    """Hash of integers below 2**32 to such; products stay below 2**63."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel(seed: int, layer: int, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """float32 [B, H, T, n] of Gumbel(0, 1), for queries int64 [B, T] and keys int64 [B, H, n]."""
    head = torch.arange(heads, device=keys.device) + heads * layer
    start = _mixed(_mixed(head + (seed & 0xFFFF) * 0x9E37) ^ seed)
    rows = _mixed(start[:, None] ^ (queries[:, None] & 0xFFFFFFFF))
    found = _mixed(rows[..., None] ^ ((keys[:, :, None] * 0x2545F491) & 0xFFFFFFFF))
    uniform = ((found >> (32 - BITS)).to(torch.float32) + 0.5) / (1 << BITS)
    return -torch.log(-torch.log(uniform))


def noised_mass(
    q: Tensor,
    keys: Tensor,
    positions: Tensor,
    held: Tensor,
    lengths: Tensor,
    first: Tensor,
    scale: float | None,
    noise: tuple[float, int, int],
    temperature: Tensor,
) -> Tensor:
    """float32 [B, Hkv, n]: what the tokens get from the queries, softmax((logits + noise) / temperature).

    q [B, H, T, D] of the newest of `lengths` tokens; keys [B, Hkv, n, D] of the tokens at positions [B, Hkv,
    n], of which `held` count; noise: (factor, seed, layer); temperature float32 [B, T].
    """
    (_, heads, tokens, size), group = q.shape, q.shape[1] // keys.shape[1]
    (factor, seed, layer), wide = noise, torch.float32
    found = torch.zeros(positions.shape, dtype=wide, device=q.device)
    turned = keys.to(wide).repeat_interleave(group, 1).transpose(-1, -2)
    at = positions.repeat_interleave(group, 1)
    counts = (held & (positions >= first[:, None, None])).repeat_interleave(group, 1)
    places = lengths[:, None] - tokens + torch.arange(tokens, device=q.device)
    for start in range(0, tokens, ROWS):
        rows, place = q[:, :, start : start + ROWS].to(wide), places[:, start : start + ROWS]
        logits = rows @ turned * (size**-0.5 if scale is None else scale)
        if factor:
            begin = first[:, None]
            logits = logits + factor * gumbel(seed, layer, heads, place - begin, at - begin[..., None])
        seen = counts[:, :, None] & (at[:, :, None] <= place[:, None, :, None])
        heat = temperature[:, None, start : start + ROWS, None]
        shares = (logits / heat).masked_fill(~seen, float("-inf")).softmax(-1)
        shares = torch.where(seen, shares, 0.0)  # a query that sees nothing is 0 / 0
        found = found + shares.sum(2).unflatten(1, (-1, group)).sum(2)
    return found
