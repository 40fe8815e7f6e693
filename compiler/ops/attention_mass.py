"""How much attention every key gets, from the log-sum-exps of an attention that ran: column sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright.compiler.ops.registry import define

ROWS = 256
"""Query rows at a time: no tensor is larger than ROWS x keys per head."""


def _fake_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    first: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    _check_mass(q, k, lse, first)
    return q.new_empty(k.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _check_mass(q: Tensor, k: Tensor, lse: Tensor, first: Tensor | None) -> None:
    fits = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1] or lse.shape != q.shape[:3]:
        raise ValueError(
            f"attention_mass: q {list(q.shape)}, k {list(k.shape)}, lse {list(lse.shape)} must be "
            "[B, H, T, D], [B, Hkv, S, D], [B, H, T] with H a multiple of Hkv"
        )
    if first is not None and (first.dtype != torch.int64 or first.shape != q.shape[:1]):
        raise ValueError(f"attention_mass: first is {list(first.shape)} {first.dtype}; it must be int64 [B]")


@define(
    "attention_mass(Tensor q, Tensor k, Tensor lse, Tensor? first=None, float? scale=None, bool causal=True) "
    "-> Tensor",
    flops=lambda q, k, *_, out, **__: q.numel() * k.shape[2] * 2 + 3 * q.numel() // q.shape[3] * k.shape[2],
    fake=_fake_mass,
)
def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    first: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
) -> Tensor:
    """How much attention every key gets: the sum of exp(scale q . k - lse) over queries and heads.

    q [B, H, T, D], k [B, Hkv, S, D], lse [B, H, T] natural log -> [B, Hkv, S]. `causal`: query t stands at
    position S - T + t. Keys before first[b] get 0; a query whose lse is -inf gives 0.
    """
    _check_mass(q, k, lse, first)
    (tokens, keys), wide = (q.shape[2], k.shape[2]), torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).unflatten(1, (k.shape[1], -1)) * (q.shape[3] ** -0.5 if scale is None else scale)
    sums = lse.to(wide).masked_fill(lse == -math.inf, math.inf).unflatten(1, (k.shape[1], -1))
    at, turned = torch.arange(keys, device=q.device), k.to(wide)[:, :, None].transpose(-1, -2)
    found = torch.zeros(k.shape[:3], dtype=wide, device=q.device)
    for start in range(0, tokens, ROWS):
        share = torch.exp(
            rows[:, :, :, start : start + ROWS] @ turned - sums[:, :, :, start : start + ROWS, None]
        )
        if causal:
            place = keys - tokens + start + torch.arange(share.shape[3], device=q.device)
            share = share.masked_fill(at > place[:, None], 0.0)
        found += share.sum((2, 3))
    return found if first is None else found.masked_fill(at < first[:, None, None], 0.0)
