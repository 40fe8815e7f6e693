"""Normalisations over the trailing axes, alone and fused with the residual add before them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.ops.registry import define

SCALE_LAST, SCALE_FIRST = "scale_last", "scale_first"
"""Where an rms_norm in 16 bits rounds: `scale_last` casts back, then multiplies by the weight (Llama);
`scale_first` multiplies in float32 and casts the product (Gemma, aten.rms_norm)."""


@define(
    'rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0, str rounding="scale_first") -> Tensor',
    flops=lambda x, *_, out: 4 * math.prod(x.shape),
)
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, rounding: str = SCALE_FIRST
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last axis: x [..., D], weight [D] or None.

    Statistics are taken in float32 (float64 for float64 input). Result dtype: that of x for `scale_first`;
    for `scale_last` the promotion of x and weight.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if rounding == SCALE_LAST:
        scale = weight if offset == 0.0 else weight + offset
        return y.to(x.dtype) * scale
    scale = weight.to(wide)
    return (y * (scale if offset == 0.0 else scale + offset)).to(x.dtype)


@define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset=0.0, "
    'str rounding="scale_first") -> (Tensor, Tensor)',
    flops=lambda x, *_, out: 5 * math.prod(x.shape),
)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    rounding: str = SCALE_FIRST,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + x), residual + x): both [..., D], read once and written once."""
    total = residual + x
    return rms_norm.definition(total, weight, eps, offset, rounding), total


@define(
    "layer_norm(Tensor x, int[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) "
    "-> Tensor",
    flops=lambda x, *_, out: 6 * math.prod(x.shape),
)
def layer_norm(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the trailing axes `normalized_shape`."""
    return F.layer_norm(x, normalized_shape, weight, bias, eps)
