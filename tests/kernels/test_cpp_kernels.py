"""Every generated C++ kernel against the definition of its op: odd shapes, dtypes, strides, mutants."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tilewright.compiler.diagnostics import BuildError, ParityError
from tilewright.compiler.ops import all_ops
from tilewright.compiler.ops.mlp import ACTIVATIONS
from tilewright.compiler.parity import assert_parity, float64_evaluation
from tilewright.kernels.common.family import KernelFamily, config_of
from tilewright.kernels.linear import family as linear_family
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import FAMILIES, KernelChoice, full_args, host_target, select_for_node

TARGET = host_target()
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")

# Relative RMS and ulps of the result dtype. 16-bit results may fall on the other side of a rounding edge.
BOUNDS = {
    torch.float32: {"rms": 4e-7, "ulps": 16.0},
    torch.bfloat16: {"rms": 2e-3, "ulps": 2.0},
    torch.float16: {"rms": 3e-4, "ulps": 2.0},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 7


def randn(*shape: int, dtype: torch.dtype = torch.float32, gain: float = 2.0) -> torch.Tensor:
    return (gain * torch.randn(*shape)).to(dtype)


def choose(op: str, args: tuple[Any, ...], training: bool = False) -> KernelChoice:
    found = select_for_node(op, args, TARGET, training=training)
    assert isinstance(found, KernelChoice), str(found)
    return found


def as_list(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def check(op: str, *args: Any, call: Any = None) -> None:
    """The kernel's results have the definition's dtypes and shapes and agree within the bounds."""
    choice = choose(op, args)
    given, _ = choice.rewrite_args(args)
    definition = all_ops()[op].definition
    full = full_args(op, args)
    got, want = as_list((call or choice.op)(*given)), as_list(definition(*full))
    exact = as_list(float64_evaluation(definition, full))
    assert len(got) == len(want)
    for mine, theirs, truth in zip(got, want, exact, strict=True):
        assert mine.dtype == theirs.dtype
        bounds = BOUNDS[args[0].dtype]
        if args[0].dtype == torch.float32:
            assert_parity(mine, theirs, reference64=truth, **bounds)
        else:  # the definition rounds in between, and so must the kernel
            assert_parity(mine.to(args[0].dtype), theirs.to(args[0].dtype), **bounds)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


@pytest.mark.parametrize("size", [7, 64, 576, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(size: int, dtype: torch.dtype) -> None:
    for rows in ((1, 1), (2, 5), (37,)):
        x, residual = randn(*rows, size, dtype=dtype), randn(*rows, size, dtype=dtype)
        check("add_rms_norm", x, residual, randn(size, dtype=dtype), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "weight", "offset", "rounding"),
    [
        (torch.float32, torch.float32, 0.0, "scale_first"),
        (torch.float32, torch.float32, 1.0, "scale_last"),
        (torch.float32, None, 0.0, "scale_first"),
        (torch.bfloat16, torch.bfloat16, 1.0, "scale_first"),
        (torch.bfloat16, torch.bfloat16, 1.0, "scale_last"),
        (torch.float16, torch.float32, 0.0, "scale_last"),
        (torch.float16, torch.float32, 0.0, "scale_first"),
    ],
)
def test_rms_norm_forms(dtype: torch.dtype, weight: torch.dtype | None, offset: float, rounding: str) -> None:
    for size in (7, 64, 576, 1000):
        scale = None if weight is None else randn(size, dtype=weight)
        check("rms_norm", randn(3, 5, size, dtype=dtype), scale, 1e-6, offset, rounding)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp(activation: str) -> None:
    for shape in ((1, 7), (3, 64), (2, 5, 576), (19, 1000)):
        check("gated_mlp", randn(*shape), randn(*shape), activation)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gated_mlp_16_bit(dtype: torch.dtype) -> None:
    check("gated_mlp", randn(5, 333, dtype=dtype), randn(5, 333, dtype=dtype), "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp_at_the_ends_of_the_range(activation: str) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 87.0, -87.0, 104.0, -104.0, 3e38, -3e38, inf, nan]
    )
    choice = choose("gated_mlp", (gate, gate, activation))
    got = choice.op(gate, torch.ones_like(gate))
    # in float64: on CPUs with AVX-512 torch's own float32 gelu gives inf for 3e38 and NaN for inf
    want = all_ops()["gated_mlp"].definition(gate.double(), torch.ones_like(gate).double(), activation)
    torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (2, torch.float16), (4, torch.bfloat16)])
def test_linear(rows: int, dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (3, 5), (67, 63), (130, 65), (576, 576), (193, 1000)):
        if k > 1:  # one column: the weight itself would pass for its mean
            check("linear", randn(rows, k, dtype=dtype), randn(n, k, dtype=dtype))


@pytest.mark.parametrize("rows", [5, 6, 7, 8])
def test_linear_with_bias_and_more_rows(rows: int) -> None:
    for n, k in ((67, 63), (130, 65), (193, 1000)):
        check("linear", randn(rows, k), randn(n, k), randn(n))


def test_linear_multi() -> None:
    for k in (63, 576):
        weights = [randn(n, k) for n in (67, 1, 40)]
        check("linear_multi", randn(1, 1, k), weights, [None, None, None])
        for rows in (5, 8):
            check("linear_multi", randn(rows, k), weights, [randn(67), None, randn(40)])


@pytest.fixture
def narrow_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which torch's own product does not use AVX-512."""
    if TARGET.arch != "avx512":
        pytest.skip("the kernel of many rows is made for AVX-512")
    monkeypatch.setattr(linear_family, "library_is_narrow", lambda: True)


@pytest.mark.usefixtures("narrow_library")
def test_linear_of_many_rows() -> None:
    for n, k in ((1, 5), (67, 63), (193, 130)):
        for shape in ((65, k), (2, 37, k), (1, 1, 70, k)):
            check("linear", randn(*shape), randn(n, k), randn(n))
    check("linear", randn(63, 80).t(), randn(67, 63))
    check("linear_multi", randn(2, 37, 63), [randn(n, 63) for n in (67, 1, 40)], [randn(67), None, randn(40)])
    x, weight, bias = randn(0, 63), randn(67, 63), randn(67)
    assert choose("linear", (x, weight, bias)).op(x, weight, bias).shape == (0, 67)


@pytest.mark.usefixtures("narrow_library")
def test_linear_of_many_rows_checks_its_arguments() -> None:
    x, weight, bias = randn(65, 64), randn(5, 64), randn(5)
    choice = choose("linear", (x, weight, bias))
    assert config_of(choice.key)["rows"] == linear_family.MANY
    for wrong in ((x.half(), weight, bias), (x[:, :63], weight, bias), (x, weight.t(), bias)):
        with pytest.raises(RuntimeError):
            choice.op(*wrong)
    with pytest.raises(RuntimeError, match="layout"):  # oneDNN would read what lies between
        choice.op(x, weight, randn(10)[::2])
    with pytest.raises(RuntimeError, match="layout"):
        choice.op(x, randn(5, 128)[:, ::2], bias)


def test_linear_multi_skips_weights_without_rows() -> None:
    x, weights = randn(1, 64), [randn(5, 64), randn(0, 64), randn(9, 64)]
    got = choose("linear_multi", (x, weights, [None] * 3)).op(x, *weights)
    for mine, weight in zip(got, weights, strict=True):
        torch.testing.assert_close(mine, x @ weight.t(), rtol=1e-5, atol=1e-4)


def test_inputs_that_are_not_contiguous() -> None:
    x = randn(64, 3, 6).permute(1, 2, 0)
    check("rms_norm", x, randn(128)[::2], 1e-6)
    check("add_rms_norm", x, randn(3, 6, 64), randn(64), 1e-6)
    check("gated_mlp", x, randn(6, 3, 64).transpose(0, 1), "silu")
    wide = randn(67, 200)
    check("linear", randn(64, 1).t(), wide[:, 100:164])  # rows of the weight are 200 apart


def test_no_rows_gives_no_rows() -> None:
    empty = torch.empty(0, 64)
    assert choose("rms_norm", (empty, randn(64), 1e-6)).op(empty, randn(64), 1e-6).shape == (0, 64)
    assert choose("gated_mlp", (empty, empty, "silu")).op(empty, empty).shape == (0, 64)


def test_one_and_two_threads_agree_bit_for_bit() -> None:
    x, weight = randn(1, 576), randn(1537, 576)
    op = choose("linear", (x, weight)).op
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(op(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def openmp_runtimes() -> set[str]:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        names = ("libgomp", "libiomp", "libomp")
        return {line.split()[-1] for line in maps if any(name in line for name in names)}


def test_kernels_bring_no_openmp_runtime_of_their_own() -> None:
    x, weight = randn(1, 576), randn(576, 576)
    torch.nn.functional.linear(x, weight)
    before = openmp_runtimes()
    choose("linear", (x, weight)).op(x, weight)
    assert openmp_runtimes() == before


def test_the_op_checks_its_arguments() -> None:
    x, weight = randn(1, 64), randn(5, 64)
    op = choose("linear", (x, weight)).op
    with pytest.raises(RuntimeError, match="as many columns as x"):
        op(x, randn(5, 63))
    with pytest.raises(RuntimeError, match="1 to 1 rows"):
        op(randn(2, 64), weight)
    with pytest.raises(RuntimeError, match="float32"):
        op(x.half(), weight.half())


def test_a_compiler_complaint_is_one_error() -> None:
    key = choose("gated_mlp", (randn(1, 8), randn(1, 8), "relu")).key
    with pytest.raises(BuildError, match=r"error: .*unknown_function") as caught:
        build_kernel_of_mutant("gated_mlp", "vmax(vset(0.0f), g)", "unknown_function(g)", key)
    assert "\n" not in str(caught.value)


def mutated(family: KernelFamily, old: str, new: str) -> KernelFamily:
    """The family with one textual mistake in its generated source."""
    honest = family.generate["cpu"]

    def generate(key: Any, op: str) -> str:
        text = honest(key, op)
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        return text.replace(old, new)

    return dataclasses.replace(family, generate={"cpu": generate}, op=family.op + "_mutant")


def _mutant_cases() -> list[tuple[str, tuple[Any, ...], str, str]]:
    torch.manual_seed(SEED)
    x = randn(5, 67)
    return [
        ("rms_norm", (x, randn(67), 1e-6), "static_cast<float>(D) + eps", "static_cast<float>(D - 1) + eps"),
        ("add_rms_norm", (x, randn(5, 67), randn(67), 1e-6), "sums[1] = vfma(v, v, sums[1]);", ""),
        ("gated_mlp", (x, randn(5, 67), "silu"), "vstore_first(o + i,", "vstore_first(o + i - 1,"),
        ("linear", (x[:1], randn(41, 67)), "first + 2 * each", "first + 1 * each"),
        (
            "linear_multi",
            (x[:1], [randn(41, 67), randn(9, 67)], [None] * 2),
            "weight->data + row * weight->stride",
            "weight->data + row / 2 * weight->stride",
        ),
    ]


@pytest.mark.parametrize("case", _mutant_cases(), ids=lambda case: case[0])
def test_the_oracle_rejects_the_mutant(case: tuple[str, tuple[Any, ...], str, str]) -> None:
    op, args, old, new = case
    key = choose(op, args).key
    wrong = build_kernel_of_mutant(op, old, new, key)
    with pytest.raises(ParityError):
        check(op, *args, call=wrong)


def build_kernel_of_mutant(op: str, old: str, new: str, key: Any) -> Any:
    family = mutated(FAMILIES[op], old, new)
    return build_kernel(family, dataclasses.replace(key, op=family.op)).op
