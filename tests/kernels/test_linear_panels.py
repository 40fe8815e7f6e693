"""float32 linear layers with more rows of x than a decode step has: panels of the weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.diagnostics import ParityError
from tilewright.compiler.parity import assert_parity
from tilewright.kernels.common.family import config_of
from tilewright.kernels.linear.cpp_panel import DEPTH, TILE
from tilewright.kernels.linear.family import LINEAR, LINEAR_MULTI, MOST_ROWS, ROWS
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import host_target
from tilewright.runtime.contracts import KernelKey, Refusal, Target

TARGET = host_target()
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")
TARGETS = [Target("cpu", "avx2"), *([TARGET] if TARGET.arch == "avx512" else [])]
RMS, ULPS = 3e-7, 24.0
"""torch's own float32 product, on these shapes: 2.6e-7 and 22."""
SHAPES = ((1, 5), (67, 63), (33, 65), (64, DEPTH), (45, DEPTH + 9), (193, 5 * DEPTH + 1))
"""N, K: panels with rows missing, columns past the last 8, weights longer than a panel."""


def randn(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape)


def key_of(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], target: Target
) -> KernelKey:
    given = (x, weights[0], biases[0]) if len(weights) == 1 else (x, list(weights), list(biases))
    key = (LINEAR if len(weights) == 1 else LINEAR_MULTI).configure(given, target)
    assert isinstance(key, KernelKey), str(key)
    assert config_of(key)["panel"] == TILE[target.arch]
    return key


def check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], target: Target, edit: Any = None
) -> None:
    """Every product against float64; edit: (old, new) in the generated source."""
    key, family = key_of(x, weights, biases, target), LINEAR if len(weights) == 1 else LINEAR_MULTI
    if edit is not None:
        honest, (old, new) = family.generate["cpu"], edit

        def generate(key: Any, op: str) -> str:
            text = honest(key, op)
            assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
            return text.replace(old, new)

        family = dataclasses.replace(family, generate={"cpu": generate}, op=family.op + "_mutant")
        key = dataclasses.replace(key, op=family.op)
    given = [t for pair in zip(weights, biases, strict=True) for t in pair if t is not None]
    got = build_kernel(family, key).op(x, *given)
    for mine, weight, bias in zip(got if len(weights) > 1 else [got], weights, biases, strict=True):
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_parity(mine, want.float(), reference64=want, rms=RMS, ulps=ULPS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("rows", [9, 13, 14, 40, 64])
def test_one_weight(rows: int, target: Target) -> None:
    for n, k in SHAPES:
        check(randn(rows, k), [randn(n, k)], [randn(n) if n % 3 == 0 else None], target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_rows_of_weights_and_of_x_that_lie_apart(target: Target) -> None:
    x, wide = randn(300, 5, 4).permute(1, 2, 0), randn(67, 900)
    check(x, [wide[:, 100:400]], [None], target)
    check(randn(3, 300, 4).transpose(1, 2), [wide[::2, 7:307]], [randn(34)], target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("rows", [11, 27])
def test_weights_of_one_call_one_without_rows(rows: int, target: Target) -> None:
    for k in (63, 3 * DEPTH + 40):
        weights = [randn(n, k) for n in (67, 2, 300)]
        check(randn(1, rows, k), weights, [None, randn(2), randn(300)], target)
        weights.insert(1, randn(0, k))
        x = randn(rows, k)
        got = build_kernel(LINEAR_MULTI, key_of(x, weights, [None] * 4, target)).op(x, *weights)
        assert [y.shape for y in got] == [(rows, n) for n in (67, 0, 2, 300)]
        torch.testing.assert_close(got[3], x @ weights[3].t(), rtol=1e-5, atol=1e-3)


def test_any_number_of_threads_gives_the_same_bits_and_so_does_any_number_of_rows() -> None:
    """Each result is one sum in one order: a tree's logits do not depend on the batch around it."""
    x, weight = randn(61, 700), randn(1537, 700)
    op = build_kernel(LINEAR, key_of(x, [weight], [None], TARGET)).op
    before, want = torch.get_num_threads(), op(x, weight)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(op(x, weight), want)
    finally:
        torch.set_num_threads(before)
    for some in (x[:9], x[20:37], x[30:]):
        first = int((x == some[0]).all(1).nonzero())
        assert torch.equal(op(some, weight), want[first : first + len(some)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("      index -= panels;\n", ""),
        ("k += kDepth) {", "k += kDepth + 1) {"),
        ("for (; c < depth; ++c)", "for (; c + 1 < depth; ++c)"),
        ("    if (!first) value = vadd(value, vload(out));\n", ""),
        ("row + kLanes, n - kLanes, first, sum[m][1]", "row + kLanes, n - kLanes, first, sum[m][0]"),
        ("    if (first && w.bias != nullptr) value = vadd(value, vload(w.bias + row));\n", ""),
        ("      m += rows;", "      m += rows + (parts > 2);"),
    ],
)
def test_the_oracle_rejects_the_mutant(old: str, new: str) -> None:
    k = 2 * DEPTH + 3
    weights = [randn(70, k), randn(90, k)]
    with pytest.raises(ParityError):
        check(randn(45, k), weights, [randn(70), None], TARGET, (old, new))


def test_who_takes_which_rows() -> None:
    weight = randn(40, 64)
    for rows, dtype, target in (
        (MOST_ROWS + 1, torch.float32, Target("cpu", "avx2")),
        (ROWS[-1] + 1, torch.bfloat16, TARGET),
        (ROWS[-1] + 1, torch.float32, Target("cuda", "sm_90")),
    ):
        refused = LINEAR.configure(
            (torch.empty(rows, 64, dtype=dtype, device="meta"), weight.to("meta", dtype), None), target
        )
        most = MOST_ROWS if dtype == torch.float32 and target.kind == "cpu" else ROWS[-1]
        assert isinstance(refused, Refusal)
        assert refused.reason == f"x has {rows} rows, the kernels take 1 to {most}"
    few = LINEAR.configure((randn(ROWS[-1], 64), weight, None), TARGET)
    assert isinstance(few, KernelKey)
    assert "panel" not in config_of(few)
