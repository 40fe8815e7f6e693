"""How much probability every block of an attention holds: what searches for layouts look at."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.compiler.ops.registry import define

ROWS = 256
"""Query rows at a time: no tensor is larger than ROWS x keys per head."""


def _fake(q: Tensor, k: Tensor, lse: Tensor, q_off: Tensor, k_off: Tensor, *_: object) -> Tensor:
    shape = (*q.shape[:2], q_off.shape[-1] - 1, k_off.shape[-1] - 1)
    return q.new_empty(shape, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


@define(
    "block_mass(Tensor q, Tensor k, Tensor lse, Tensor q_off, Tensor k_off, Tensor? mask=None, "
    "float? scale=None) -> Tensor",
    flops=lambda q, k, *_, out: 2 * q.numel() * k.shape[-2] + 3 * q.numel() // q.shape[-1] * k.shape[-2],
    fake=_fake,
)
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_off: Tensor,
    k_off: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """W[b, h, i, j]: exp(scores[r, t] - lse[r]) over rows r of query block i and keys t of key block j.

    q [B, H, S, D], k [B, H, T, D], lse [B, H, S] natural log, q_off [1, nQ + 1], k_off [1, nK + 1] int32
    borders, mask bool [1 or B, 1 or H, 1, T] of kept keys -> float32 [B, H, nQ, nK]. With the lse of the same
    scores a row of W sums to the rows of its block. A query whose lse is -inf attended nothing: no mass.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(wide).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    of_row, of_key = (_block_of(off, n) for off, n in ((q_off, q.shape[2]), (k_off, k.shape[2])))
    nq, nk = q_off.shape[-1] - 1, k_off.shape[-1] - 1
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    found = torch.zeros(*q.shape[:2], nq, nk, dtype=wide, device=q.device)
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        share = torch.exp(q[:, :, rows].to(wide) @ keys - lse[:, :, rows, None])
        if mask is not None:
            share = share.masked_fill(~mask, 0.0)
        by_key = torch.zeros(*share.shape[:3], nk, dtype=wide, device=q.device)
        by_key.index_add_(3, of_key, share)
        found.index_add_(2, of_row[rows], by_key)
    return found


def _block_of(off: Tensor, slots: int) -> Tensor:
    """int64 [slots]: the block of each slot."""
    return torch.searchsorted(off[0, 1:].contiguous(), torch.arange(slots, device=off.device), right=True)
