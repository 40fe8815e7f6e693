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
    WeightFormat(3, 96),
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
    for rows, columns in sizes:
        packed = packed_of(form, torch.randn(rows, columns))
        bias = torch.randn(rows)
        for count in tokens:
            x = torch.randn(count, columns)
            args = (x, packed, bias, rows, form.text)
            got = kernel("quantized_linear", args, target)(*args)
            want = all_ops()["quantized_linear"].definition(
                x.double(), packed, bias.double(), rows, form.text
            )
            assert got.shape == want.shape
            assert relative(got, want) < 3e-6, (rows, columns, count)
            if form.activation != "none":
                truth = exact_integers(x, packed, rows, form) + bias.double()
                assert relative(got, truth) < 1e-6, (rows, columns, count)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("form", QUICK, ids=lambda form: form.text)
def test_odd_sizes_remainder_groups_and_few_rows(form: WeightFormat, target: Target) -> None:
    check(form, target=target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("form", EVERY, ids=lambda form: form.text)
def test_every_format(form: WeightFormat, target: Target) -> None:
    check(form, target=target)


@pytest.mark.parametrize("form", [W4A8, W8A8, W4, W8A4, STATIC], ids=lambda form: form.text)
def test_prefill_of_512_rows(form: WeightFormat) -> None:
    check(form, sizes=((72, 160), (37, 101)), tokens=(512,))


def test_more_rows_than_are_made_ready_together() -> None:
    check(W4A8, sizes=((9, 40),), tokens=(768, 770, 1600))


def saturating(rows: int, columns: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The inputs on which kernels that add products of 8-bit numbers in 16 bits lose: (weight, x)."""
    noise = 1 - 0.02 * torch.rand(rows, columns)
    extreme = noise * torch.sign(torch.randn(rows, columns))
    positive = 1 - 0.02 * torch.rand(3, columns)
    return {
        "extreme weights": (extreme, torch.randn(3, columns)),
        "positive activations": (torch.randn(rows, columns), positive),
        "both": (noise, positive),
    }


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("case", list(saturating(1, 1)))
@pytest.mark.parametrize(
    "form",
    [
        W8A8,
        WeightFormat(8, 32, "float-zero", "int8-group"),
        W4A8,
        WeightFormat(4, 64, "float-zero", "int8-token"),
        W8A4,
        STATIC,
        WeightFormat(4, 64, "float-zero", "int8-static"),
    ],
    ids=lambda form: form.text,
)
def test_saturation(form: WeightFormat, case: str, target: Target) -> None:
    """The error is that of exact integer arithmetic: rounding of float32 alone."""
    weight, x = saturating(24, 576)[case]
    packed = packed_of(form, weight, step=float(x.abs().max()) / 127)
    for rows_of_x in (x[:1], x):
        args = (rows_of_x, packed, None, 24, form.text)
        got = kernel("quantized_linear", args, target)(*args)
        # Sums that cancel are judged by the size of what is added.
        size = float((rows_of_x.abs() @ weight.abs().t()).norm())
        error = float((got.double() - exact_integers(rows_of_x, packed, 24, form)).norm())
        assert error < 5e-7 * size


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_all_codes_at_their_ends(target: Target) -> None:
    """Largest codes against largest activations of either sign, the worst sums of eight products."""
    for form, code in itertools.product(
        (W4A8, W8A8, WeightFormat(8, 32, "float-zero", "int8-group"), STATIC, W8A4), (0, 255)
    ):
        code = min(code, (1 << form.bits) - 1) or (1 if form.quantizer().narrow else 0)
        weight = form.quantizer().quantize(torch.randn(8, 64))
        weight = dataclasses.replace(weight, codes=torch.full((8, 64), code, dtype=torch.uint8))
        packed = form.with_step(form.pack(weight), 1 / 127) if form.has_step else form.pack(weight)
        for sign in (1.0, -1.0):
            x = torch.full((1, 64), sign)
            args = (x, packed, None, 8, form.text)
            got = kernel("quantized_linear", args, target)(*args)
            assert relative(got, exact_integers(x, packed, 8, form)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations(dtype: torch.dtype) -> None:
    packed = W4A8.pack(W4A8.quantizer().quantize(torch.randn(19, 70)))
    x, bias = torch.randn(5, 70).to(dtype), torch.randn(19).to(dtype)
    for given in (x[:1], x):
        args = (given, packed, bias, 19, W4A8.text)
        got, want = kernel("quantized_linear", args)(*args), all_ops()["quantized_linear"].definition(*args)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_several_weights_share_the_activations() -> None:
    rows = [24, 5, 9]
    packed = [W4A8.pack(W4A8.quantizer().quantize(torch.randn(n, 100))) for n in rows]
    biases = [None, torch.randn(5), None]
    for count in (1, 4):
        x = torch.randn(2, count, 100)[:1]
        args = (x, packed, biases, rows, W4A8.text)
        got = kernel("quantized_linear_multi", args)(*args)
        for mine, want in zip(got, all_ops()["quantized_linear_multi"].definition(*args), strict=True):
            assert relative(mine, want) < 1e-6


@pytest.mark.parametrize("form", [W4A8, W8A4, STATIC], ids=lambda form: form.text)
def test_nothing_but_numbers_comes_out_of_nothing_but_numbers(form: WeightFormat) -> None:
    packed = packed_of(form, torch.randn(8, 64))
    x = torch.zeros(3, 64)
    x[1, 40], x[2, 3] = float("nan"), float("inf")
    for given in (x, x[1:2], x[2:]):
        args = (given, packed, None, 8, form.text)
        got, want = kernel("quantized_linear", args)(*args), all_ops()["quantized_linear"].definition(*args)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(5), want.nan_to_num(5))
        bad = ~given.isfinite().all(1)
        assert torch.equal(got.isnan().all(1), bad), "such rows are NaN, whole, and no others"
        assert not bool(got[~bad].isnan().any())


def test_weights_that_share_static_activations_hold_one_step() -> None:
    x, rows = torch.randn(3, 70), [13, 24]
    packed = [packed_of(STATIC, torch.randn(n, 70)) for n in rows]
    args = (x, packed, [None, None], rows, STATIC.text)
    for mine, want in zip(
        kernel("quantized_linear_multi", args)(*args),
        all_ops()["quantized_linear_multi"].definition(*args),
        strict=True,
    ):
        assert relative(mine, want) < 1e-6
    other = (x, [packed[0], packed_of(STATIC, torch.randn(24, 70), step=0.03)], *args[2:])
    with pytest.raises(RuntimeError, match="must hold one step"):
        kernel("quantized_linear_multi", other)(*other)


def test_refusals_name_values() -> None:
    packed = W4A8.pack(W4A8.quantizer().quantize(torch.randn(8, 64)))
    x = torch.randn(2, 64)
    for args, said in (
        ((x.double(), packed, None, 8, W4A8.text), "x is float64"),
        ((x[:, :32], packed, None, 8, W4A8.text), "need [1, 144] uint8"),
        ((x, packed, None, 8, "int4.32"), "weight format 'int4.32'"),
        ((x, packed, torch.randn(7), 8, W4A8.text), "bias 0 is [7]"),
        ((x, packed, None, 8, W4A8.text.replace("blocks8", "rows")), "packed as rows"),
    ):
        refused = select("quantized_linear", TARGET, args)
        assert isinstance(refused, Refusal)
        assert said in str(refused)
    long = WeightFormat(4, 512, "symmetric", "int8-group", "rows")
    meta = (
        torch.empty(1, 512, device="meta"),
        torch.empty(long.shape(8, 512), dtype=torch.uint8, device="meta"),
    )
    refused = select("quantized_linear", Target("cuda", "sm_80"), (*meta, None, 8, long.text))
    assert "activation groups of 512" in str(refused)


W4_OFFSET = WeightFormat(4, 64, "float-zero", "int8-token")
MUTANTS = {
    "the shift of the code of zero": (W4A8, 1, "_mm256_set1_epi32(row.shift[g])", "_mm256_setzero_si256()"),
    "the second half of a panel": (W4A8, 4, "to += kGridFloats * 4 + half * 32", "to += kGridFloats * 4"),
    "a row of few": (W4A8, 3, "rows[m], m, K32);", "rows[0], m, K32);"),
    "streams": (W4A8, 1, "first + 2 * each", "first + 1 * each"),
    "the cut of static activations": (STATIC, 1, "cut(vmul(", "(vmul("),
    "the place of the step": (STATIC, 4, "(rows + 7) / 8 * block", "(rows - 1) / 8 * block"),
    "the range of 4 bits": (W8A4, 1, "? 7.0f / most", "? 6.0f / most"),
}
"""(format, rows of x, text, what it becomes) for any processor."""
MUTANTS_OF = {
    "avx2": {
        "the nibble": (W4, 1, "j % 2 ? _mm256_srli_epi16(pair, 4) : pair", "pair"),
        "the sign of 8-bit weights": (W8A8, 1, "_mm256_sign_epi8(a, w)", "a"),
        "the offsets of a panel": (W4_OFFSET, 4, "grids + 24", "grids + 16"),
    },
    "avx512": {
        "codes of 8 bits as they lie": (W8A8, 1, "_mm512_xor_si512", "_mm512_or_si512"),
        "the nibble": (W4, 1, "8 * b + 4 * (i % 2)", "8 * b"),
        "the columns of the upper half": (W4, 1, "x + place<i>[1] * 4", "x + place<i>[0] * 4"),
        "the upper half of a block": (W4, 1, "_mm512_extractf32x8_ps(both, 1)", "vset(0.0f)"),
        "a column of a panel": (W4, 13, "to + (place<i>[1] * 4 + b)", "to + (place<i>[1] * 4)"),
        "the offsets of a float panel": (W4, 13, "twice(grid(tail + kGridBytes))", "twice(grid(tail))"),
        "the last tile": (W4, 13, "rows + M - R, first + M - R", "rows + M - R, first + M - R - 1"),
        "which columns lie together": (W4A8, 1, "i % 2 + 2};", "i % 2 + 1};"),
        "one half of the rows": (W4A8, 1, "_mm512_extracti64x4_epi64(part[s], 1)", "_mm256_setzero_si256()"),
        "the shift of a panel": (W4A8, 4, "_mm512_set1_epi32(rows[m].shift[g])", "_mm512_setzero_si512()"),
        "the offsets of a panel": (W4_OFFSET, 4, "_mm512_loadu_ps(grids + 16)", "_mm512_loadu_ps(grids)"),
    },
}
CHANGED = [(TARGET, name, *mutant) for name, mutant in MUTANTS.items()] + [
    (target, name, *mutant) for target in TARGETS for name, mutant in MUTANTS_OF[target.arch].items()
]


@pytest.mark.parametrize("changed", CHANGED, ids=lambda changed: f"{changed[0]} {changed[1]}")
def test_the_oracle_rejects_the_mutant(changed: tuple[Target, str, WeightFormat, int, str, str]) -> None:
    target, _, form, tokens, old, new = changed
    family, mutant = FAMILIES["quantized_linear"], f"quantized_mutant_{CHANGED.index(changed)}"

    def generate(key: KernelKey, op: str) -> str:
        text = family.generate["cpu"](key, op)
        assert old in text
        return text.replace(old, new)

    wrong = dataclasses.replace(family, op=mutant, generate={"cpu": generate})
    packed = packed_of(form, torch.randn(67, 130) + 0.3)
    x = 2 * torch.randn(tokens, 130)
    args = (x, packed, None, 67, form.text)
    key = select("quantized_linear", target, args)
    assert isinstance(key, KernelKey)
    got = build_kernel(wrong, dataclasses.replace(key, op=mutant)).op(*family.rewrite_args(key, args))
    assert not relative(got, all_ops()["quantized_linear"].definition(*args)) < 1e-3


@pytest.mark.parametrize("form", [W4A8, W8A8], ids=lambda form: form.text)
def test_avx512_source_compiles(form: WeightFormat) -> None:
    """This machine may lack AVX-512: the text is compiled, not run."""
    packed = form.pack(form.quantizer().quantize(torch.randn(9, 70)))
    key = select(
        "quantized_linear", Target("cpu", "avx512"), (torch.randn(2, 70), packed, None, 9, form.text)
    )
    assert isinstance(key, KernelKey)
    text = FAMILIES["quantized_linear"].source(key)[1]
    assert "_mm512_dpbusd_epi32" in text
    assert (compile_cpp(text, "avx512", {HEADER: TORCH_ABI}) / LIBRARY).stat().st_size > 0


def test_avx512_is_taken_only_with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_get_cpu_capability", lambda: "AVX512")
    for has, arch in ((True, "avx512"), (False, "avx2")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_vnni": has})
        assert host_target.__wrapped__() == Target("cpu", arch)
