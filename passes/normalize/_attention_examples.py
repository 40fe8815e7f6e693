"""Examples of `match-attention`: spellings of models in use, and near misses of each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tilewright.compiler import Example, Tensor

LOWEST = torch.finfo(torch.float32).min
BF16 = torch.bfloat16
Q, K, V = Tensor(2, 6, 5, 8), Tensor(2, 6, 7, 8), Tensor(2, 6, 7, 4)
KEEP, ADDED = Tensor(2, 1, 5, 7, dtype=torch.bool), Tensor(2, 1, 5, 7)


def spelled(q, k, v, mask=None, *, by=0.3, fill=None, cap=None, late=None, wide=None, drop=0.0):
    """Eager attention of transformers, with everything that models vary."""
    s = q @ k.transpose(-1, -2) * by
    s = s if cap is None else torch.tanh(s / cap) * cap
    if fill is not None:
        s = s.masked_fill(~mask, fill)
    elif mask is not None:
        s = s + mask
    s = s if late is None else s / late
    p = torch.softmax(s, -1, wide).to(v.dtype)
    return F.dropout(p, drop) @ v


def with_sinks(q, k, v, mask, sinks, *, kept=-1, layout=(1, -1, 1, 1)):
    """gpt-oss: one more logit per head, dropped after the softmax."""
    s = q @ k.transpose(-1, -2) * 0.3 + mask
    s = torch.cat((s, sinks.reshape(layout).expand(*s.shape[:-1], 1)), -1)
    return torch.softmax(s - s.max(-1, keepdim=True).values, -1)[..., :kept] @ v


def regrouped(q, k, v, bias, mask, *, beta=1.0, sizes=(2, 3, 5, 7)):
    """BLOOM: batch and heads in one axis for the products, apart for the mask."""
    s = torch.baddbmm(bias, q, k.transpose(1, 2), beta=beta, alpha=0.3).view(sizes) + mask
    return torch.bmm(torch.softmax(s, -1).view(-1, 5, 7), v)


def floored(q, k, v, mask, floor=LOWEST):
    """XGLM: masked scores are kept finite."""
    s = torch.max(q @ k.transpose(-1, -2) + mask, torch.full((), floor))
    return torch.softmax(s, -1) @ v


def narrow_inside(q, k, v, wide=BF16):
    return torch.softmax((q @ k.transpose(-1, -2)).to(wide), -1).to(v.dtype) @ v


def tensor_scale(q, k, v, scale):
    """Swin v2: a learned scale for each head."""
    return torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v


def filled_wide(q, k, v, keep):
    s = (q @ k.transpose(-1, -2)).float().masked_fill(~keep, LOWEST)
    return torch.softmax(s, -1).to(v.dtype) @ v


def accepting() -> Iterator[Example]:
    """Spellings that are attention."""
    sdpa = F.scaled_dot_product_attention
    grouped = (Q, Tensor(2, 2, 7, 8), Tensor(2, 2, 7, 4))
    yield Example(lambda q, k, v: sdpa(q, k, v), (Q, K, V))
    yield Example(lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3), (Q, K, V))
    yield Example(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), grouped)
    yield Example(lambda q, k, v, m: sdpa(q, k, v, m), (Q, K, V, KEEP))
    yield Example(lambda q, k, v, m: sdpa(q, k, v, m), (Q, K, V, ADDED))
    yield Example(lambda q, k, v: spelled(q, k, v), (Q, K, V))
    yield Example(lambda q, k, v, m: spelled(q, k, v, m, cap=5.0, wide=torch.float32), (Q, K, V, ADDED))
    yield Example(lambda q, k, v, m: spelled(q, k, v, m, fill=LOWEST), (Q, K, V, KEEP))
    yield Example(lambda q, k, v, m: spelled(q, k, v, m, late=3.5), (Q, K, V, ADDED))
    yield Example(lambda q, k, v, m: torch.softmax(q @ k.mT + m + m, -1) @ v, (Q, K, V, ADDED))
    yield Example(floored, (Q, K, V, ADDED))
    yield Example(with_sinks, (Q, K, V, ADDED, Tensor(6)))
    yield Example(regrouped, (*FLAT, Tensor(6, 1, 7), Tensor(2, 1, 5, 7)))
    yield Example(tensor_scale, (Q, K, V, Tensor(6, 1, 1)))
    narrow = tuple(Tensor(*t.shape, dtype=BF16) for t in (Q, K, V))
    yield Example(lambda q, k, v: spelled(q, k, v, wide=torch.float32), narrow)


FLAT = (Tensor(6, 5, 8), Tensor(6, 7, 8), Tensor(6, 7, 4))


def refused() -> Iterator[Example]:
    """Near misses, each with the reason it is refused for."""

    def no(reason, model, *inputs):
        return Example(model, inputs, refusal=reason)

    qkv, masked = (Q, K, V), (Q, K, V, ADDED)
    yield no("dropout is 0.1", lambda q, k, v: spelled(q, k, v, drop=0.1), *qkv)
    yield no("v has shape (7,)", lambda q, k, v: spelled(q, k, v), Q, K, Tensor(7))
    yield no("q, k and v have 4, 3 and 3 axes", spelled, Q, Tensor(6, 7, 8), Tensor(6, 7, 4))
    yield no("batch axes (2, 6), (1, 6)", spelled, Q, Tensor(1, 6, 7, 8), Tensor(1, 6, 7, 4))
    yield no("1 query heads cannot share 6", spelled, Tensor(2, 1, 5, 8), K, V)
    flat = (*FLAT, Tensor(6, 1, 7), Tensor(2, 1, 5, 7))
    yield no("beta is 0.5", lambda *a: regrouped(*a, beta=0.5), *flat)
    yield no("softcap is 5.0", lambda q, k, v, m: spelled(q, k, v, m, cap=5.0, late=2.0), *masked)
    yield no("scaled by -2.0", lambda q, k, v, m: spelled(q, k, v, m, late=-2.0), *masked)
    wide = tuple(Tensor(*t.shape, dtype=torch.float64) for t in qkv)
    yield no("softmax is taken in torch.float32", lambda q, k, v: spelled(q, k, v, wide=torch.float32), *wide)
    yield no("narrowed to torch.bfloat16", narrow_inside, *qkv)
    yield no("not one torch.float32 for each head", tensor_scale, Q, K, V, Tensor(5, 7))
    square = (Tensor(6, 5, 8), Tensor(6, 5, 8), Tensor(6, 5, 4))
    crossed = (*square, Tensor(6, 1, 5), Tensor(2, 5, 3, 5))
    yield no("regrouped to [2, 5, 3, 5]", _crossed, *crossed)
    shared = (Tensor(6, 5, 8), Tensor(1, 7, 8), Tensor(6, 7, 4), Tensor(2, 1, 5, 7))
    yield no("k (1,)", _regrouped_product, *shared)
    yield no("become -10000.0", lambda q, k, v, m: spelled(q, k, v, m, fill=-1e4), Q, K, V, KEEP)
    narrow = tuple(Tensor(*t.shape, dtype=BF16) for t in qkv)
    yield no("torch.bfloat16 cannot hold", filled_wide, *narrow, KEEP)
    yield no("mask is 1.5", lambda q, k, v: spelled(q, k, v, 1.5), *qkv)
    yield no("mask is torch.bool", spelled, Q, K, V, KEEP)
    yield no("mask has shape (3, 2, 6, 5, 7)", spelled, Q, K, V, Tensor(3, 2, 6, 5, 7))
    yield no("kept above -5.0", lambda q, k, v, m: floored(q, k, v, m, -5.0), *masked)
    yield no("sinks have shape (2, 3)", with_sinks, *masked, Tensor(2, 3))
    even = (Tensor(2, 5, 5, 8), Tensor(2, 5, 7, 8), Tensor(2, 5, 7, 4), ADDED, Tensor(5))
    yield no("sinks are laid out as", lambda *a: with_sinks(*a, layout=(1, 1, -1, 1)), *even)
    short = (Q, K, Tensor(2, 6, 6, 4), ADDED, Tensor(6))
    yield no("columns 0 to", lambda *a: with_sinks(*a, kept=-2), *short)


def _crossed(q, k, v, bias, mask):
    """Rows go to another axis before the mask, and the softmax is right all the same."""
    s = torch.baddbmm(bias, q, k.transpose(1, 2)).view(2, 5, 3, 5) + mask
    return torch.bmm(torch.softmax(s, -1).view(6, 5, 5), v)


def _regrouped_product(q, k, v, mask):
    s = torch.matmul(q, k.transpose(1, 2)).view(2, 3, 5, 7) + mask
    return torch.bmm(torch.softmax(s, -1).view(6, 5, 7), v)
