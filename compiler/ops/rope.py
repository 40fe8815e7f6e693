"""Rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright.compiler.ops.registry import define


@define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    flops=lambda x, *_, out: 3 * math.prod(x.shape),
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x * cos + rotate(x) * sin: x [..., D] with D even; cos and sin broadcast to the shape of x.

    rotate pairs channel i with i + D/2 (half form, Llama) or 2i with 2i + 1 (interleaved form, GPT-J, Wan):
    (a, b) -> (-b, a).
    """
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((-b, a), -1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin
