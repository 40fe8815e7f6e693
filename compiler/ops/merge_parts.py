"""Many attentions of the same queries over disjoint keys, merged in one sum."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.compiler.ops.registry import define


def _fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    if outs.dim() != 4 or outs.shape[:3] != lses.shape or not outs.shape[0]:
        raise ValueError(
            f"merge_parts: outs {list(outs.shape)}, lses {list(lses.shape)} must be [n, H, T, E] and "
            "[n, H, T] with n of 1 or more"
        )
    if lses.dtype not in (torch.float32, torch.float64) or not outs.dtype.is_floating_point:
        raise ValueError(
            f"merge_parts: lses {lses.dtype} must be float32 or float64, outs {outs.dtype} floating"
        )
    return outs.new_empty((1, *outs.shape[1:]), dtype=lses.dtype), lses.new_empty((1, *lses.shape[1:]))


@define(
    "merge_parts(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    flops=lambda outs, lses, *, out: 2 * outs.numel() + 7 * lses.numel(),
    fake=_fake,
)
def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from those over n disjoint sets of them: outs [n, H, T, E], lses [n, H, T]
    natural log -> [1, H, T, E] in the dtype of lses, [1, H, T]; 0 and -inf where no part has a key.

    It differs from `merge_attention` in that n parts are one sum, which does not tell how they came.
    """
    _fake(outs, lses)
    most = lses.amax(0, keepdim=True).clamp(min=torch.finfo(lses.dtype).min)
    weights = torch.exp(lses - most)
    total = weights.sum(0, keepdim=True)
    out = (weights[..., None] * outs.to(lses.dtype)).sum(0, keepdim=True)
    return out / total.clamp(min=1.0)[..., None], most + total.log()  # the greatest weight is 1
