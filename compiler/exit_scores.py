"""How sure a token is after some layers of a language model, 0 to 1: what early exits decide by."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def saturation(after: Tensor, before: Tensor) -> Tensor:
    """CALM's hidden-state saturation: cosine of the stream [..., C] behind and in front of a layer."""
    a, b = _wide(after), _wide(before)
    return ((a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()).clamp(0.0, 1.0)


def confidence(logits: Tensor) -> Tensor:
    """CALM's softmax response: the best probability less the second best. logits: [..., V]."""
    best = _wide(logits).softmax(-1).topk(2, -1).values
    return best.select(-1, 0) - best.select(-1, 1)


def certainty(logits: Tensor) -> Tensor:
    """1 - entropy / log of the vocabulary's size. logits: [..., V]."""
    log = _wide(logits).log_softmax(-1)
    return (1.0 + (log.exp() * log).sum(-1) / math.log(logits.shape[-1])).clamp(0.0, 1.0)


def learnt(after: Tensor, before: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Probability that a trained policy lets a token leave; weight: [C + 2], bias: [1]."""
    return torch.sigmoid((features(after, before).to(weight.dtype) * weight).sum(-1) + bias)


def features(after: Tensor, before: Tensor) -> Tensor:
    """[..., C + 2]: the state scaled to RMS 1, its cosine with the state a layer before, and how far it
    moved."""
    a, b = _wide(after), _wide(before)
    size = a.square().mean(-1, keepdim=True).sqrt()
    moved = (a - b).square().mean(-1, keepdim=True).sqrt() / size
    return torch.cat((a / size, saturation(after, before).unsqueeze(-1), moved), -1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
