"""The CPU kernels of quantized_linear for fp8 and NVFP4 weights against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewright.compiler.float_format import FloatFormat, rounded_activation
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import FAMILIES, host_target, select
from tilewright.runtime.contracts import KernelKey

TARGET = host_target()
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")

FORMATS = [
    FloatFormat("fp8-e4m3"),
    FloatFormat("fp8-e5m2", 64),
    FloatFormat("fp8-e4m3", 32, activation="fp8-token"),
    FloatFormat("fp8-e5m2", per_tensor=True, activation="fp8-token"),
    FloatFormat("nvfp4", 16),
]
ROWS_OF_X = (1, 2, 3, 7, 8, 9, 23)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def run(op: str, *args: Any) -> Any:
    key = select(op, TARGET, args)
    assert isinstance(key, KernelKey), str(key)
    return build_kernel(FAMILIES[op], key).op(*FAMILIES[op].rewrite_args(key, args))


def expected(x: torch.Tensor, packed: torch.Tensor, rows: int, form: FloatFormat) -> torch.Tensor:
    """float64, of the activations and the weight as the format means them."""
    weight = form.dequantize(packed, rows, x.shape[-1]).double()
    return rounded_activation(x, form.text).double() @ weight.T


def sizes(form: FloatFormat) -> list[tuple[int, int]]:
    """(rows, columns): one block and less, columns that are no whole chunks where the format has such."""
    step = form.group or 1
    return [(rows, -(-columns // step) * step) for rows, columns in ((1, 7), (13, 37), (67, 130), (41, 576))]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.text)
def test_odd_sizes_and_few_and_many_rows(form: FloatFormat) -> None:
    for rows, columns in sizes(form):
        weight = torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None]
        packed, bias = form.pack_weight(weight), torch.randn(rows)
        for count in ROWS_OF_X:
            x = torch.randn(count, columns)
            got = run("quantized_linear", x, packed, bias, rows, form.text)
            want = expected(x, packed, rows, form) + bias.double()
            scale = x.abs().double() @ weight.T.abs().double() + bias.abs()
            assert float(((got.double() - want).abs() / scale).max()) < 1e-6, (rows, columns, count)


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2", "nvfp4"])
@pytest.mark.parametrize("count", [1, 9])
def test_every_code_is_its_value(name: str, count: int) -> None:
    """Rows of one code in front of columns of one: every finite code of a byte, of every scale of NVFP4."""
    form = FloatFormat(name, 16 if name == "nvfp4" else 0)
    rows, columns = 256, 64
    one = form.largest * (448 if name == "nvfp4" else 1)  # its scale is 1
    packed = form.pack_weight(torch.full((rows, columns), one))
    scales, fine, _ = form.places(columns)
    codes = torch.arange(256, dtype=torch.uint8)
    packed[:, :scales] = codes[:, None]
    if name == "nvfp4":
        packed[:, fine : fine + 4] = codes.flip(0)[:, None]
    meant = form.dequantize(packed, rows, columns)
    finite = meant.isfinite().all(1)
    x = torch.eye(columns)[:count] + torch.eye(columns)[columns - count :] * 2
    got = run("quantized_linear", x, packed, None, rows, form.text)
    assert int(finite.sum()) >= 248
    assert torch.equal(got[:, finite].double(), x.double() @ meant[finite].double().T)


@pytest.mark.parametrize("count", [1, 12])
def test_activations_round_as_torch_does(count: int) -> None:
    """x as multiples of the codes' steps and their middles, seen through 448 times an identity."""
    form, columns = FloatFormat("fp8-e4m3", activation="fp8-token"), 512
    packed = form.pack_weight(448 * torch.eye(columns))
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, -codes, middles, -middles])
    x = torch.cat([values, torch.full((columns - len(values),), 448.0)]).repeat(count, 1)
    got = run("quantized_linear", x, packed, None, columns, form.text)
    assert torch.equal(got, 448 * rounded_activation(x, form.text))


def test_a_token_that_is_not_finite_is_nan_alone() -> None:
    form = FloatFormat("fp8-e4m3", activation="fp8-token")
    packed, x = form.pack_weight(torch.randn(9, 64)), torch.randn(11, 64)
    x[3, 5], x[7, 9], x[8] = torch.inf, torch.nan, 0.0
    for part in (x, x[3:4], x[7:8]):
        got = run("quantized_linear", part, packed, None, 9, form.text)
        assert torch.equal(got.isnan().all(1), ~part.isfinite().all(1))
        assert not got.isnan().any(1)[part.isfinite().all(1)].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_and_several_weights(dtype: torch.dtype) -> None:
    for form in (FORMATS[0], FORMATS[2], FORMATS[4]):
        counts, x = [24, 5, 9], torch.randn(2, 1, 96).to(dtype)
        packed = [form.pack_weight(torch.randn(n, 96)) for n in counts]
        biases = [None, torch.randn(5).to(dtype), None]
        for part in (x, x[:1]):
            outs = run("quantized_linear_multi", part, packed, biases, counts, form.text)
            for out, weight, bias, n in zip(outs, packed, biases, counts, strict=True):
                want = expected(part, weight, n, form) + (0 if bias is None else bias.double())
                assert out.dtype == dtype
                error = (out.double() - want).norm() / want.norm()
                assert float(error) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_a_weight_packed_for_another_size_is_refused() -> None:
    form = FloatFormat("fp8-e4m3")
    packed, x = form.pack_weight(torch.randn(16, 64)), torch.randn(1, 96)
    assert "rows for x need" in str(select("quantized_linear", TARGET, (x, packed, None, 16, form.text)))
    key = select("quantized_linear", TARGET, (x[:, :64], packed, None, 16, form.text))
    assert isinstance(key, KernelKey)
    with pytest.raises(RuntimeError, match="not packed for the columns"):
        build_kernel(FAMILIES["quantized_linear"], key).op(x, packed, 16)
