"""Ops that are evaluated whole, by their definition: attention and the normalisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.finite_field.planes import OutOfScope
from tilewright.compiler.finite_field.value import COMPOSITES, H, dispatch

_ATEN = torch.ops.aten


def takes(*functions: object) -> Callable[[H], H]:
    """Register a definition for torch functions that would otherwise decompose inexactly."""

    def register(handler: H) -> H:
        for function in functions:
            COMPOSITES[function] = handler
        return handler

    return register


@takes(F.scaled_dot_product_attention, _ATEN.scaled_dot_product_attention.default)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query key^T + mask) value; aten itself splits the scale in two inexact roots."""
    if dropout_p != 0.0:
        raise OutOfScope("attention with dropout")
    if enable_gqa:
        key, value = (
            x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) if x.shape[-3] != query.shape[-3] else x
            for x in (key, value)
        )
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        kept = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~kept, float("-inf"))
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


@takes(torch.matmul, Tensor.matmul, _ATEN.matmul.default)
def matmul(x: Tensor, other: Tensor) -> Tensor:
    """One product; aten would expand, reshape and, for vectors, squeeze in place."""
    product: Tensor = dispatch(_ATEN.matmul.default, (x, other), {})
    return product


@takes(F.linear, _ATEN.linear.default)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """input weight^T + bias."""
    product = matmul(input, weight.t())
    return product if bias is None else product + bias


@takes(F.rms_norm, torch.rms_norm, _ATEN.rms_norm.default)
def rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """input / sqrt(mean(input^2) + eps) * weight over the trailing axes."""
    dims = list(range(-len(normalized_shape), 0))
    if eps is None:  # the smallest step of the dtype that aten computes in
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    scaled = input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps)
    return scaled if weight is None else scaled * weight


@takes(F.layer_norm, torch.layer_norm, _ATEN.layer_norm.default)
def layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias over the trailing axes."""
    dims = list(range(-len(normalized_shape), 0))
    centered = input - input.mean(dims, keepdim=True)
    scaled = centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


@takes(F.group_norm, torch.group_norm, _ATEN.group_norm.default)
def group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Layer norm over groups of channels: input [N, C, ...], weight and bias [C]."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    scaled = layer_norm(grouped, grouped.shape[-1:], eps=eps).reshape(input.shape)
    channels = (-1,) + (1,) * (input.dim() - 2)
    scaled = scaled if weight is None else scaled * weight.reshape(channels)
    return scaled if bias is None else scaled + bias.reshape(channels)


@takes(F.dropout, torch.dropout, _ATEN.dropout.default)
def dropout(input: Tensor, p: float = 0.5, train: bool = True, *_: Any, **options: Any) -> Tensor:  # noqa: A002
    """The identity at inference."""
    if options.get("training", train) and p != 0.0:
        raise OutOfScope("dropout in training")
    return input
