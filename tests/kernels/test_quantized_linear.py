"""The CPU kernels of quantized_linear against the definition in float64 and against exact integers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from tilewright.compiler.ops import all_ops
from tilewright.compiler.quantizers import ACTIVATIONS, quantize_activation
from tilewright.compiler.weight_format import BITS, WeightFormat
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import FAMILIES, host_target, select
from tilewright.runtime.build import LIBRARY, compile_cpp
from tilewright.runtime.contracts import KernelKey, Refusal, Target

TARGET = host_target()
TARGETS = [Target("cpu", "avx2"), *([TARGET] if TARGET.arch == "avx512" else [])]
"""A processor with AVX-512 runs the other kernels too."""
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")

W4A8 = WeightFormat(4, 32, "symmetric", "int8-group")
W8A8 = WeightFormat(8, 0, "symmetric", "int8-token")
W4 = WeightFormat(4, 32, "float-zero")
W8A4 = WeightFormat(8, 0, "symmetric", "int4-token")
STATIC = WeightFormat(8, 0, "symmetric", "int8-static")
QUICK = [
    W4A8,
    W8A8,
    W4,
    W8A4,
    WeightFormat(4, 32, "float-zero", "int4-token"),
    STATIC,
    WeightFormat(4, 64, "float-zero", "int8-static"),
    WeightFormat(4, 64, "float-zero", "int8-token"),
    WeightFormat(8, 32, "float-zero", "int8-group"),
    WeightFormat(8, 0),
    WeightFormat(3, 64, "symmetric", "int8-token"),
    WeightFormat(2, 0, "float-zero"),
    WeightFormat(4, 32, "float-zero", grid="wide"),
]
EVERY = [
    WeightFormat(bits, group, mode, activation)
    for bits, group, mode, activation in itertools.product(
        BITS, (0, 32, 96), ("symmetric", "float-zero"), ACTIVATIONS
    )
    if group or activation != "int8-group"
] + [WeightFormat(8, 64, "symmetric", "int8-token", grid="wide")]
SIZES = ((16, 64), (13, 37), (67, 130), (41, 576))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def kernel(op: str, args: tuple[Any, ...], target: Target = TARGET) -> Any:
    key = select(op, target, args)
    assert isinstance(key, KernelKey), str(key)
    run = build_kernel(FAMILIES[op], key).op
    return lambda *given: run(*FAMILIES[op].rewrite_args(key, given))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def packed_of(form: WeightFormat, weight: torch.Tensor, step: float = 0.02) -> torch.Tensor:
    """The packed weight; with static activations of a step that cuts what lies beyond 2.54."""
    packed = form.pack_weight(weight)
    return form.with_step(packed, step) if form.has_step else packed


def on_grid(x: torch.Tensor, packed: torch.Tensor, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of activations; a scale per row, per group, or the step in `packed`."""
    if not form.has_step:
        return quantize_activation(x, form.activation, form.group)
    step = packed[-1, :4].clone().view(torch.float32)
    codes = (x * (1 / step)).round()
    codes[codes > 127], codes[codes < -127] = 127, -127
    return codes, step.expand(x.shape[0], 1)


def exact_integers(x: torch.Tensor, packed: torch.Tensor, rows: int, form: WeightFormat) -> torch.Tensor:
    """x W^T with integer products and sums in int64, scales and the sum over groups in float64."""
    columns = x.shape[-1]
    weight = form.unpack(packed, rows, columns)
    codes, scale = on_grid(x, packed, form)
    width = form.group or columns
    total = torch.zeros(x.shape[0], rows, dtype=torch.float64)
    for g, at in enumerate(range(0, columns, width)):
        q, w = codes[:, at : at + width].long(), weight.codes[:, at : at + width].long()
        s = scale[:, g if scale.shape[1] > 1 else 0].double()[:, None]
        part = (q @ w.t()).double() * weight.scale[:, g].double()
        total += s * (part + q.sum(1, keepdim=True).double() * weight.offset[:, g].double())
    return total


def check(
    form: WeightFormat, sizes: Any = SIZES, tokens: Any = (*range(1, 9), 37), target: Target = TARGET
) -> None:
