"""Linear layers, one or several on the same input, and the embedding look-up."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.ops.registry import define


@define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    flops=lambda x, weight, bias=None, *, out: 2 * math.prod(x.shape) * weight.shape[0],
    lowers_to="linear.default",
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return F.linear(x, weight, bias)


@define(
    "linear_multi(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    flops=lambda x, weights, biases, *, out: 2 * math.prod(x.shape) * sum(w.shape[0] for w in weights),
)
def linear_multi(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Several linear layers that read one input: x [..., K], weights[i] [N_i, K] -> [..., N_i] each.

    The weights stay where they are; a kernel reads them in one parallel region.
    """
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@define(
    "embedding(Tensor weight, Tensor indices) -> Tensor",
    flops=lambda weight, indices, *, out: 0,
)
def embedding(weight: Tensor, indices: Tensor) -> Tensor:
    """Rows of weight [V, D] picked by indices [...] -> [..., D]."""
    return F.embedding(indices, weight)
