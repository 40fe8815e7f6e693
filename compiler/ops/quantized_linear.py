"""Linear layers whose weights are small integers or floats, and whose activations may be.

Opaque to tracing: unpacking takes a hundred ops a weight, which shapes do not depend on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.float_format import parse_format, rounded_activation
from tilewright.compiler.ops.registry import define
from tilewright.compiler.quantizers import fake_static
from tilewright.compiler.weight_format import WeightFormat


def _fake(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, format: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _fake_multi(
    x: Tensor, packed: list[Tensor], biases: list[Tensor | None], rows: list[int], format: str
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], count)) for count in rows]


@define(
    "quantized_linear(Tensor x, Tensor packed, Tensor? bias, int rows, str format) -> Tensor",
    flops=lambda x, packed, bias, rows, format, *, out: 2 * math.prod(x.shape) * rows,
    fake=_fake,
)
def quantized_linear(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, format: str) -> Tensor:
    """x W^T + b: x [..., K], W [rows, K] packed as the text `format` (of a WeightFormat or
    FloatFormat) says, bias [rows].

    With quantized activations x is replaced by scale * integer (or small float) first; their products are
    then exact, and what is left to rounding is the sum over groups in float32. The scale of static ones lies
    in `packed`.
    """
    form = parse_format(format)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = form.dequantize(packed, rows, x.shape[-1]).to(wide)
    if isinstance(form, WeightFormat) and form.has_step:
        given = fake_static(x, form.step_of(packed)).to(wide)
    else:
        given = (x if form.activation == "none" else rounded_activation(x, format)).to(wide)
    return F.linear(given, weight, None if bias is None else bias.to(wide)).to(x.dtype)


@define(
    "quantized_linear_multi(Tensor x, Tensor[] packed, Tensor?[] biases, int[] rows, str format) -> Tensor[]",
    flops=lambda x, packed, biases, rows, format, *, out: 2 * math.prod(x.shape) * sum(rows),
    fake=_fake_multi,
)
def quantized_linear_multi(
    x: Tensor, packed: list[Tensor], biases: list[Tensor | None], rows: list[int], format: str
) -> list[Tensor]:
    """Several quantized linear layers of one format that read one input: x [..., K] -> [..., rows[i]] each.

    A kernel quantizes the activations once and reads all weights in one parallel region, so weights for
    static activations have one step.
    """
    return [
        quantized_linear.definition(x, weight, bias, count, format)
        for weight, bias, count in zip(packed, biases, rows, strict=True)
    ]
