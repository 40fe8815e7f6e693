"""Attention over blocks with 8-bit products of queries and keys; the products with values stay as they are.

source: SageAttention, arXiv:2410.02367. Keys have their mean over tokens taken off first, which changes no
probability (a softmax does not see what all keys of a row share) and takes away what keys have in common, the
largest part of their size. Queries and keys are then rounded to 8 bits, one scale for Q_ROWS queries and for
K_ROWS keys of a head: to int8, or to e4m3 floats (fp8 with block scales: FlashAttention-3, arXiv:2407.08608),
which keep three bits of every element where int8 keeps the same step for all that share a scale. The error is
measured as relative RMS of the result against `block_sparse_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops import block_sparse_attention as plain
from tilewright.compiler.ops.registry import define

Q_ROWS, K_ROWS = 128, 64
"""Consecutive tokens of a head that share a scale; neither depends on the layout."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest code of a dtype of codes."""


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quantize_rows(x: Tensor, rows: int, kind: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """(codes of `kind` like x [B, H, S, D], scales [B, H, ceil(S / rows)] of `wide`): x ~ codes * scale.

    A scale is the largest size in its rows / LARGEST; rows of zeros give codes 0. To nearest, ties to even.
    """
    batch, heads, tokens, size = x.shape
    blocks = -(-tokens // rows)
    padded = torch.nn.functional.pad(wide(x), (0, 0, 0, blocks * rows - tokens))
    grouped = padded.view(batch, heads, blocks, rows * size)
    scale = grouped.abs().amax(-1) / LARGEST[kind]
    safe = torch.where(scale > 0, scale, 1.0)
    scaled = grouped / safe[..., None]
    codes = scaled.round().to(kind) if kind == torch.int8 else scaled.to(kind)
    return codes.view(batch, heads, blocks * rows, size)[:, :, :tokens].contiguous(), scale


def restore_rows(codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """Codes times scales, in the dtype of the scales."""
    return codes.to(scales.dtype) * scales.repeat_interleave(rows, 2)[:, :, : codes.shape[2], None]


def key_mean(k: Tensor) -> Tensor:
    """The mean of k [B, Hkv, T, D] over tokens, [B, Hkv, 1, D]; 0 without tokens."""
    return wide(k).sum(2, keepdim=True) / max(k.shape[2], 1)


def prepare(
    q: Tensor, k: Tensor, kind: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q codes, q scales, k codes, k scales, q . mean(k) [B, H, S], unscaled) of q and smoothed k."""
    mean = key_mean(k)
    shared = mean.repeat_interleave(q.shape[1] // k.shape[1], 1)
    taken_off = (wide(q) * shared).sum(-1)
    return (*quantize_rows(q, Q_ROWS, kind), *quantize_rows(wide(k) - mean, K_ROWS, kind), taken_off)


def rounded_queries(q: Tensor, kind: torch.dtype = torch.int8) -> Tensor:
    """q as its codes stand for it."""
    return restore_rows(*quantize_rows(q, Q_ROWS, kind), Q_ROWS).to(q.dtype)


def rounded_keys(k: Tensor, kind: torch.dtype = torch.int8) -> Tensor:
    """k as the codes of its smoothed form and its mean stand for it."""
    mean = key_mean(k)
    return (restore_rows(*quantize_rows(wide(k) - mean, K_ROWS, kind), K_ROWS) + mean).to(k.dtype)


def _attend(
    kind: torch.dtype, q: Tensor, k: Tensor, v: Tensor, layout: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    q8, q_scale, k8, k_scale, taken_off = prepare(q, k, kind)
    queries, keys = restore_rows(q8, q_scale, Q_ROWS), restore_rows(k8, k_scale, K_ROWS)
    out, lse = plain.block_sparse_attention.definition(queries, keys, wide(v), *layout)
    given = dict(zip(plain.LAYOUT_NAMES, layout, strict=False)).get("scale")
    scale = q.shape[3] ** -0.5 if given is None else given
    return out.to(q.dtype), lse + scale * taken_off


@define(
    f"block_sparse_attention_int8(Tensor q, Tensor k, Tensor v, {plain.LAYOUT}) -> (Tensor, Tensor)",
    flops=plain.pair_flops,
    fake=plain.fake_pair,
)
def block_sparse_attention_int8(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` whose scores are products of int8 codes; out in the dtype of q, lse float32.

    Shapes as there. lse is that of the keys as given: what smoothing took off is added again. For
    inference only.
    """
    return _attend(torch.int8, q, k, v, layout)


@define(
    f"block_sparse_attention_fp8(Tensor q, Tensor k, Tensor v, {plain.LAYOUT}) -> (Tensor, Tensor)",
    flops=plain.pair_flops,
    fake=plain.fake_pair,
)
def block_sparse_attention_fp8(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention_int8` with e4m3 codes."""
    return _attend(torch.float8_e4m3fn, q, k, v, layout)
