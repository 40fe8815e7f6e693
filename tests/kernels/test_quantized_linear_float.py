"""The CPU kernels of quantized_linear for fp8 and NVFP4 weights against the definition in float64."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from tilewright.compiler.float_format import FloatFormat, rounded_activation
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import FAMILIES, host_target, select
from tilewright.runtime.build import LIBRARY, compile_cpp
from tilewright.runtime.contracts import KernelKey, Target

TARGET = host_target()
TARGETS = [Target("cpu", "avx2"), *([TARGET] if TARGET.arch == "avx512" else [])]
"""A processor with AVX-512 runs the other kernels too."""
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")

FORMATS = [
    FloatFormat("fp8-e4m3"),
    FloatFormat("fp8-e5m2", 64),
    FloatFormat("fp8-e4m3", 32, activation="fp8-token"),
    FloatFormat("fp8-e5m2", per_tensor=True, activation="fp8-token"),
    FloatFormat("nvfp4", 16),
]
ROWS_OF_X = (*range(1, 10), 13, 23)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    return found


def run(op: str, *args: Any, target: Target = TARGET) -> Any:
    key = select(op, target, args)
    assert isinstance(key, KernelKey), str(key)
    return build_kernel(FAMILIES[op], key).op(*FAMILIES[op].rewrite_args(key, args))


def expected(x: torch.Tensor, packed: torch.Tensor, rows: int, form: FloatFormat) -> torch.Tensor:
    """float64, of the activations and the weight as the format means them."""
    weight = form.dequantize(packed, rows, x.shape[-1]).double()
    return rounded_activation(x, form.text).double() @ weight.T


def sizes(form: FloatFormat) -> list[tuple[int, int]]:
    """(rows, columns): one block and less, columns that are no whole chunks where the format has such."""
    step = form.group or 1
    return [(rows, -(-columns // step) * step) for rows, columns in SIZES]


SIZES = ((1, 7), (13, 37), (67, 130), (9, 96), (24, 128), (35, 235), (131, 576))
"""With NVFP4 a register of codes is 128 columns: such that it is filled, and to every number of chunks."""


def check(form: FloatFormat, rows: int, columns: int, count: int, target: Target) -> None:
    weight = torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None]
    packed, bias, x = form.pack_weight(weight), torch.randn(rows), torch.randn(count, columns)
    got = run("quantized_linear", x, packed, bias, rows, form.text, target=target)
    want = expected(x, packed, rows, form) + bias.double()
    scale = x.abs().double() @ weight.T.abs().double() + bias.abs()
    assert float(((got.double() - want).abs() / scale).max()) < 1e-6, (rows, columns, count)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.text)
def test_odd_sizes_and_few_and_many_rows(form: FloatFormat, target: Target) -> None:
    for rows, columns in sizes(form):
        for count in ROWS_OF_X:
            check(form, rows, columns, count, target)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.text)
def test_prefill_of_512_rows(form: FloatFormat, target: Target) -> None:
    for rows, columns in ((72, 192), (37, 320)):
        check(form, rows, columns, 512, target)


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2", "nvfp4"])
@pytest.mark.parametrize("count", [1, 23])
def test_every_code_is_its_value(name: str, count: int, target: Target) -> None:
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
    got = run("quantized_linear", x, packed, None, rows, form.text, target=target)
    assert int(finite.sum()) >= 248
    assert torch.equal(got[:, finite].double(), x.double() @ meant[finite].double().T)


@pytest.mark.parametrize("name", ["fp8-e4m3", "fp8-e5m2", "nvfp4"])
def test_every_code_in_every_place(name: str, target: Target) -> None:
    """All finite codes in an order that differs from row to row, seen through the rows of an identity."""
    form = FloatFormat(name, 16 if name == "nvfp4" else 0)
    rows, columns = 21, 288
    packed = form.pack_weight(torch.randn(rows, columns))
    scales, _, _ = form.places(columns)
    packed[:, :scales] = ((torch.arange(rows)[:, None] * 77 + torch.arange(scales) * 5) % 256).byte()
    if name != "nvfp4":
        packed[:, :scales][~FloatFormat(name).dequantize(packed, rows, columns).isfinite()] = 0
    want, x = form.dequantize(packed, rows, columns).double(), torch.eye(columns)
    for count in (1, 2, 3, 4, 9, columns):
        for part, meant in zip(x.split(count), want.T.split(count), strict=True):
            got = run("quantized_linear", part, packed, None, rows, form.text, target=target)
            torch.testing.assert_close(got.double(), meant, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("count", [1, 23])
def test_activations_round_as_torch_does(count: int, target: Target) -> None:
    """x as multiples of the codes' steps and their middles, seen through 448 times an identity."""
    form, columns = FloatFormat("fp8-e4m3", activation="fp8-token"), 512
    packed = form.pack_weight(448 * torch.eye(columns))
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, -codes, middles, -middles])
    x = torch.cat([values, torch.full((columns - len(values),), 448.0)]).repeat(count, 1)
    got = run("quantized_linear", x, packed, None, columns, form.text, target=target)
    assert torch.equal(got, 448 * rounded_activation(x, form.text))


def test_a_token_that_is_not_finite_is_nan_alone(target: Target) -> None:
    form = FloatFormat("fp8-e4m3", activation="fp8-token")
    packed, x = form.pack_weight(torch.randn(9, 64)), torch.randn(11, 64)
    x[3, 5], x[7, 9], x[8] = torch.inf, torch.nan, 0.0
    for part in (x, x[3:4], x[7:8]):
        got = run("quantized_linear", part, packed, None, 9, form.text, target=target)
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


@pytest.mark.parametrize("form", [FORMATS[0], FORMATS[4]], ids=lambda form: form.text)
def test_nothing_is_left_of_the_last_call(form: FloatFormat, target: Target) -> None:
    """The memory of a row of x is kept: what a longer row of NaNs left there does not show."""
    for columns, value in ((256, torch.nan), (160, 1.0)):
        packed, x = form.pack_weight(torch.ones(8, columns)), torch.full((1, columns), value)
        got = run("quantized_linear", x, packed, None, 8, form.text, target=target)
    assert torch.equal(got, torch.full((1, 8), 160.0))


BEHIND = """
import ctypes, mmap, sys, torch
from tilewright.compiler.float_format import parse_format
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import FAMILIES, select
from tilewright.runtime.contracts import Target

family, page, memory = FAMILIES["quantized_linear"], mmap.PAGESIZE, mmap.mmap(-1, 8 * mmap.PAGESIZE)
forbidden = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 7 * page
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
for columns in (32, 64, 96, 128, 160, 224, 256):
    form, rows = parse_format(sys.argv[2]), 9
    made = form.pack_weight(torch.randn(rows, columns))
    packed = torch.frombuffer(memory, dtype=torch.uint8, count=made.numel(), offset=7 * page - made.numel())
    packed = packed.view(made.shape).copy_(made)
    for count in (1, 2, 23):
        args = (torch.randn(count, columns), packed, None, rows, form.text)
        key = select("quantized_linear", Target("cpu", sys.argv[1]), args)
        found = build_kernel(family, key).op(*family.rewrite_args(key, args))
        given = (args[0], made, *args[2:])
        assert torch.equal(found, build_kernel(family, key).op(*family.rewrite_args(key, given)))
print("read nothing behind")
"""


@pytest.mark.parametrize("text", ["fp8-e4m3.0.none.rows", "nvfp4.16.none.rows"])
def test_nothing_behind_a_weight_is_read(text: str, target: Target) -> None:
    """A page that must not be read lies behind the last byte of the packed weight."""
    command = [sys.executable, "-c", BEHIND, target.arch, text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "read nothing behind\n", (done.returncode, done.stderr)


E4M3, GROUPS, NVFP4 = FORMATS[0], FORMATS[1], FORMATS[4]
MUTANTS = {
    "avx2": {
        "codes below the others": (E4M3, 1, "_mm256_extracti128_si256(h, 1)", "_mm256_castsi256_si128(h)"),
        "the scale of a group": (GROUPS, 1, "scale_of(start[r], K32, g)", "scale_of(start[r], K32, 0)"),
        "the odd columns": (NVFP4, 1, "_mm_srli_epi16(c, 4)", "c"),
        "the place of e4m3 scales": (NVFP4, 9, "fine_at(K32) + 2 * c", "fine_at(K32)"),
        "streams": (E4M3, 1, "at[s].block * 8 + r", "at[0].block * 8 + r"),
    },
    "avx512": {
        "codes below the others": (E4M3, 1, "_mm512_extracti64x4_epi64(h, 1)", "_mm512_castsi512_si256(h)"),
        "the sign": (E4M3, 1, "_mm512_set1_epi16(-16385)", "_mm512_set1_epi16(16383)"),
        "the scale of a group": (GROUPS, 1, "scale_of(row, K32, c / kGroup)", "scale_of(row, K32, 0)"),
        "the scale of a group in a panel": (GROUPS, 23, "c / kGroup", "0"),
        "the last code of a word": (NVFP4, 1, "words, 4 * j", "words, 4 * (j & 6)"),
        "two lanes of a scale": (NVFP4, 1, "(0, 0, 1, 1, 2,", "(0, 1, 1, 1, 2,"),
        "the second scales of two": (NVFP4, 1, "twice(both, 8)", "twice(both, 0)"),
        "the place of e4m3 scales": (NVFP4, 23, "fine_at(K32) + 2 * c", "fine_at(K32)"),
        "the columns of x": (NVFP4, 1, "transpose8<16>(eight + 8,", "transpose8<16>(eight,"),
        "the columns of a tile": (NVFP4, 23, "k < span(K32); ++k", "k < K32 * 32; ++k"),
        "streams": (E4M3, 1, "at[s].block * 8 + r", "at[0].block * 8 + r"),
        "a row of few": (E4M3, 5, "rows[m].x + c * 32", "rows[0].x + c * 32"),
        "a row of few of NVFP4": (NVFP4, 2, "rows[m].x + c * 32 + j", "rows[0].x + c * 32 + j"),
        "the last tile": (E4M3, 23, "rows + M - R, first + M - R", "rows + M - R, first + M - R - 1"),
    },
}
"""(format, rows of x, text, what it becomes)."""
CHANGED = [(target, name, *mutant) for target in TARGETS for name, mutant in MUTANTS[target.arch].items()]


@pytest.mark.parametrize("changed", CHANGED, ids=lambda changed: f"{changed[0]} {changed[1]}")
def test_the_oracle_rejects_the_mutant(changed: tuple[Target, str, FloatFormat, int, str, str]) -> None:
    target, _, form, count, old, new = changed
    family, mutant = FAMILIES["quantized_linear"], f"small_float_mutant_{CHANGED.index(changed)}"

    def generate(key: KernelKey, op: str) -> str:
        text = family.generate["cpu"](key, op)
        assert old in text
        return text.replace(old, new)

    wrong = dataclasses.replace(family, op=mutant, generate={"cpu": generate})
    packed, x = form.pack_weight(torch.randn(67, 192)), torch.randn(count, 192)
    args = (x, packed, None, 67, form.text)
    key = select("quantized_linear", target, args)
    assert isinstance(key, KernelKey)
    got = build_kernel(wrong, dataclasses.replace(key, op=mutant)).op(*family.rewrite_args(key, args))
    want = expected(x, packed, 67, form)
    assert not float((got.double() - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("form", [E4M3, FORMATS[1], NVFP4], ids=lambda form: form.text)
def test_avx512_source_compiles(form: FloatFormat) -> None:
    """This machine may lack AVX-512: the text is compiled, not run."""
    args = (torch.randn(2, 64), form.pack_weight(torch.randn(9, 64)), None, 9, form.text)
    key = select("quantized_linear", Target("cpu", "avx512"), args)
    assert isinstance(key, KernelKey)
    text = FAMILIES["quantized_linear"].source(key)[1]
    assert "_mm512_fmadd_ps" in text
    assert (compile_cpp(text, "avx512", {HEADER: TORCH_ABI}) / LIBRARY).stat().st_size > 0


def test_a_weight_packed_for_another_size_is_refused() -> None:
    form = FloatFormat("fp8-e4m3")
    packed, x = form.pack_weight(torch.randn(16, 64)), torch.randn(1, 96)
    assert "rows for x need" in str(select("quantized_linear", TARGET, (x, packed, None, 16, form.text)))
    key = select("quantized_linear", TARGET, (x[:, :64], packed, None, 16, form.text))
    assert isinstance(key, KernelKey)
    with pytest.raises(RuntimeError, match="not packed for the columns"):
        build_kernel(FAMILIES["quantized_linear"], key).op(x, packed, 16)
