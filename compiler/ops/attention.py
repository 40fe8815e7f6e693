"""Attention with every attribute that models use, as one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.ops.registry import define


def _flops(q: Tensor, k: Tensor, v: Tensor, *_: object, out: Tensor) -> object:
    scores = q.shape[-2] * k.shape[-2]
    heads = 1
    for size in q.shape[:-2]:
        heads = heads * size
    return heads * scores * (2 * q.shape[-1] + 2 * v.shape[-1] + 5)


@define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, float? scale=None, bool causal=False, "
    "float softcap=0.0, Tensor? sinks=None) -> Tensor",
    flops=_flops,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(softcap(scale * q k^T) + mask) v, over the last two axes.

    q [..., H, S, D], k [..., Hkv, T, D], v [..., Hkv, T, E] -> [..., H, S, E]; H is a multiple of Hkv and
    query
    head h reads key head h // (H / Hkv). mask broadcasts to [..., H, S, T]: bool (True is kept) or added
    to the scores. scale None means 1/sqrt(D). causal keeps key t for query s when t <= s (top-left aligned).
    softcap c > 0 replaces a score x by c * tanh(x / c) before the mask. sinks [H]: one more logit per head
    that takes probability and gives no value. A row with no key at all gives 0.
    """
    grouped = q.dim() >= 3 and q.shape[-3] != k.shape[-3]
    if softcap == 0.0 and sinks is None:
        if grouped:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
            )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if grouped:
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap != 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        kept = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~kept, float("-inf"))
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask
    if sinks is not None:
        extra = sinks.to(scores.dtype).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, extra), -1)
        return (torch.softmax(scores, -1)[..., :-1].to(v.dtype)) @ v
    return torch.softmax(scores, -1).nan_to_num(0.0).to(v.dtype) @ v
