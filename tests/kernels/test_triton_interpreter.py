"""Generated Triton kernels, run on CPU tensors by Triton's interpreter, against the definitions.

Triton chooses the interpreter when it is imported: this file runs in its own process with TRITON_INTERPRET=1
(test_triton_offline.py starts it). bfloat16 is left out: the interpreter truncates where GPUs round.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tilewright.compiler.float_format import FloatFormat
from tilewright.compiler.ops import all_ops
from tilewright.compiler.ops.mlp import ACTIVATIONS
from tilewright.compiler.parity import assert_parity
from tilewright.compiler.weight_format import WeightFormat
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import FAMILIES, full_args
from tilewright.runtime.contracts import KernelKey, Target

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]
TARGET = Target("cuda", "sm_80")
BOUNDS = {torch.float32: {"rms": 1e-6, "ulps": 64.0}, torch.float16: {"rms": 3e-4, "ulps": 2.0}}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(*shape)).to(dtype)


def as_list(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return [to_meta(v) for v in value] if isinstance(value, list) else value


def check(op: str, *args: Any, target: Target = TARGET) -> None:
    family, full = FAMILIES[op], full_args(op, args)
    key = family.configure([to_meta(v) for v in full], target)  # chosen as on the GPU
    assert isinstance(key, KernelKey), str(key)
    kernel = build_kernel(family, key).op
    got = as_list(kernel(*family.rewrite_args(key, full)))
    for mine, theirs in zip(got, as_list(all_ops()[op].definition(*full)), strict=True):
        assert_parity(mine, theirs, **BOUNDS[args[0].dtype])


@pytest.mark.parametrize("size", [7, 64, 576, 1000])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_norms(size: int, dtype: torch.dtype) -> None:
    x, residual, weight = (
        randn(2, 3, size, dtype=dtype),
        randn(2, 3, size, dtype=dtype),
        randn(size, dtype=dtype),
    )
    check("rms_norm", x, None, 1e-6)
    check("rms_norm", x.transpose(0, 1), weight, 1e-6, 1.0, "scale_last")
    check("add_rms_norm", x, residual, weight, 1e-5)
    check("add_rms_norm", x, residual, weight, 1e-5, 0.0, "scale_last")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_gated_mlp(activation: str, dtype: torch.dtype) -> None:
    check("gated_mlp", randn(3, 577, dtype=dtype), randn(3, 577, dtype=dtype), activation)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(
    "form",
    [
        WeightFormat(bits, group, mode, activation, "rows")
        for bits, group, mode, activation in (
            (4, 32, "symmetric", "int8-group"),
            (4, 64, "float-zero", "int8-token"),
            (4, 32, "float-zero", "none"),
            (8, 0, "symmetric", "int8-token"),
            (8, 96, "float-zero", "int8-group"),
            (3, 0, "symmetric", "none"),
            (3, 32, "float-zero", "int8-group"),
            (2, 64, "symmetric", "int8-token"),
            (8, 0, "symmetric", "int4-token"),
            (8, 0, "symmetric", "int8-static"),
            (4, 64, "float-zero", "int8-static"),
        )
    ],
    ids=lambda form: form.text,
)
def test_quantized_linear(form: WeightFormat, dtype: torch.dtype) -> None:
    rows = (13, 40)
    packed = [form.pack_weight(torch.randn(n, 100)) for n in rows]
    if form.has_step:  # cuts what lies beyond 3.81
        packed = [form.with_step(p, 0.03) for p in packed]
    for tokens in (1, 18):
        x, bias = randn(tokens, 100, dtype=dtype), randn(13, dtype=dtype)
        check("quantized_linear", x, packed[0], bias, 13, form.text)
        check("quantized_linear_multi", x, packed, [None, randn(40, dtype=dtype)], list(rows), form.text)


@pytest.mark.parametrize("activation", ["int8-token", "int4-token", "int8-static"])
def test_a_row_that_holds_no_number_is_no_number(activation: Any) -> None:
    form = WeightFormat(8, 0, "symmetric", activation, "rows")
    packed = form.pack_weight(torch.randn(13, 70))
    packed = form.with_step(packed, 0.03) if form.has_step else packed
    x = randn(18, 70)
    x[3, 69], x[17, 0], x[5, 40] = float("nan"), float("inf"), -float("inf")
    key = FAMILIES["quantized_linear"].configure(
        [to_meta(v) for v in (x, packed, None, 13, form.text)], TARGET
    )
    assert isinstance(key, KernelKey), str(key)
    run = build_kernel(FAMILIES["quantized_linear"], key).op
    got = run(*FAMILIES["quantized_linear"].rewrite_args(key, (x, packed, None, 13, form.text)))
    assert got.isnan().any(1).nonzero().flatten().tolist() == [3, 5, 17]
    assert got.isnan().all(1).nonzero().flatten().tolist() == [3, 5, 17]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(
    "form",
    [
        FloatFormat("fp8-e4m3"),
        FloatFormat("fp8-e5m2", 48 * 2),
        FloatFormat("fp8-e4m3", per_tensor=True, activation="fp8-token"),
        FloatFormat("fp8-e5m2", 32, activation="fp8-token"),
        FloatFormat("nvfp4", 16),
    ],
    ids=lambda form: form.text,
)
def test_quantized_linear_of_small_floats(form: FloatFormat, dtype: torch.dtype, arch: str) -> None:
    """By shifting bits, and on fp8 pointers; weights reach the subnormals of their format."""
    rows, target = (13, 40), Target("cuda", arch)
    columns = 96 if form.group else 100
    weights = [torch.randn(n, columns) * 4.0 ** torch.randint(-7, 1, (n, columns)) for n in rows]
    packed = [form.pack_weight(w) for w in weights]
    for tokens in (1, 18):
        x, bias = randn(tokens, columns, dtype=dtype), randn(13, dtype=dtype)
        check("quantized_linear", x, packed[0], bias, 13, form.text, target=target)
        biases = [None, randn(40, dtype=dtype)]
        check("quantized_linear_multi", x, packed, biases, list(rows), form.text, target=target)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_linear(rows: int, dtype: torch.dtype) -> None:
    for n, k in ((5, 7), (19, 300)):
        check("linear", randn(rows, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype))
    check("linear", randn(rows, 40, dtype=dtype), randn(9, 100, dtype=dtype)[:, 20:60])


def test_linear_multi() -> None:
    x, weights = randn(2, 70), [randn(n, 70) for n in (17, 3, 9)]
    check("linear_multi", x, weights, [None, randn(3), None])


def test_the_gradient_name_differentiates_through_the_interpreted_kernel() -> None:
    x, weight = randn(2, 40).requires_grad_(), randn(40).requires_grad_()
    family = FAMILIES["rms_norm"]
    key = family.configure(full_args("rms_norm", (x.to("meta"), weight.to("meta"), 1e-6)), TARGET)
    assert isinstance(key, KernelKey)
    dy = randn(2, 40)
    got = torch.autograd.grad(build_kernel(family, key).train_op(x, weight, 1e-6), (x, weight), dy)
    want = torch.autograd.grad(all_ops()["rms_norm"].definition(x, weight, 1e-6), (x, weight), dy)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
