"""What quantize-linear does to one weight, and which layers it leaves alone."""

from __future__ import annotations

import torch
from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.quantizers import Quantized, half_quadratic
from tilewright.compiler.schema import arguments
from tilewright.compiler.weight_format import WeightFormat

_LOOK_THROUGH = frozenset(
    {
        "view",
        "reshape",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "to",
        "_to_copy",
        "alias",
        "clone",
        "transpose",
    }
)
"""Ops between an output head and the program's output."""


def is_head(node: fx.Node) -> bool:
    """True when the weight is the embedding's too, or the result reaches the output without arithmetic."""
    weight = arguments(node)["weight"]
    if any(user.target is ops.embedding for user in weight.users):
        return True
    pending, seen = [node], set[fx.Node]()
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            name = str(user.target).split(".")[1] if isinstance(user.target, torch._ops.OpOverload) else ""
            if name in _LOOK_THROUGH and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def round_weight(weight: torch.Tensor, form: WeightFormat, rounding: str) -> Quantized:
    """Codes and grid of a weight [N, K] in a format."""
    quantizer = form.quantizer()
    return half_quadratic(quantizer, weight) if rounding == "hqq" else quantizer.quantize(weight)


def pack_weight(weight: torch.Tensor, *, form: WeightFormat, rounding: str) -> torch.Tensor:
    """The packed uint8 matrix of a weight [N, K] of any floating dtype."""
    return form.pack(round_weight(weight.float(), form, rounding))


def dequantized(weight: torch.Tensor, *, form: WeightFormat, rounding: str) -> torch.Tensor:
    """float32 [N, K]: the weight on its grid."""
    return round_weight(weight.float(), form, rounding).dequantize()
