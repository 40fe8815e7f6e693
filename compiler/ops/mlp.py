"""The gated activation between the linear layers of a gated MLP."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.ops.registry import define

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation named by one of `ACTIVATIONS`."""
    if activation == "silu":
        return F.silu(x)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "relu":
        return F.relu(x)
    if activation == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")


@define(
    "gated_mlp(Tensor gate, Tensor up, str activation) -> Tensor",
    flops=lambda gate, *_, out: 6 * math.prod(gate.shape),
)
def gated_mlp(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, elementwise: the middle of down(activation(gate(x)) * up(x)).

    The linear layers around it stay separate `linear` ops, so that passes over linears see them.
    """
    return activate(gate, activation) * up
