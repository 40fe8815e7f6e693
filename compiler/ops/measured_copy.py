"""A tensor that is to be kept is copied, and measured against the one kept before, in one reading of both."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.compiler.ops.registry import define


def _fake(x: Tensor, before: Tensor, into: Tensor) -> Tensor:
    same = all(t.shape == x.shape and t.dtype == x.dtype for t in (before, into))
    if x.dim() == 0 or not same or not x.dtype.is_floating_point:
        found = ", ".join(f"{list(t.shape)} {t.dtype}" for t in (x, before, into))
        raise ValueError(
            f"measured_copy: x, before, into ({found}) must be floating, of one shape [B, ...] and one dtype"
        )
    return x.new_empty((2, x.shape[0]), dtype=_sum_dtype(x))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@define(
    "measured_copy(Tensor x, Tensor before, Tensor(a!) into) -> Tensor",
    flops=lambda x, *_, out: 5 * x.numel(),
    fake=_fake,
)
def measured_copy(x: Tensor, before: Tensor, into: Tensor) -> Tensor:
    """Copies x [B, ...] to `into`, which shares no memory with the others; sums [2, B]: the L1 norms of
    x - before and of before, of each sample, in float32 (float64 for tensors in float64). ValueError for
    tensors that do not match."""
    _fake(x, before, into)
    new, old = (t.reshape(t.shape[0], -1).to(_sum_dtype(x)) for t in (x, before))
    norms = [torch.linalg.vector_norm(t, 1, 1, dtype=torch.float64) for t in (new - old, old)]
    into.copy_(x)
    return torch.stack(norms).to(_sum_dtype(x))
