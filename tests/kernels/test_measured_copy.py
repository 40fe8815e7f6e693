"""measured_copy against sums in double precision: the definition, generated C++ and Triton; and what gates
measure with once they are compiled."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tilewright.compiler import ops
from tilewright.compiler.ops import all_ops
from tilewright.kernels.load import build_kernel
from tilewright.kernels.measured_copy.family import MEASURED_COPY
from tilewright.kernels.table import KernelChoice, host_target, select_for_node
from tilewright.runtime.contracts import KernelKey, Refusal, Target

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
on_cpu = pytest.mark.skipif(host_target().arch == "generic", reason="kernels need AVX2")
in_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def definition(x: Tensor, before: Tensor, into: Tensor) -> Tensor:
    found: Tensor = all_ops()["measured_copy"].definition(x, before, into)
    return found


def by_table(x: Tensor, before: Tensor, into: Tensor) -> Tensor:
    """The generated C++."""
    choice = select_for_node("measured_copy", [x, before, into], host_target(), training=False)
    assert isinstance(choice, KernelChoice), str(choice)
    found: Tensor = choice.op(x, before, into)
    return found


def interpreted(x: Tensor, before: Tensor, into: Tensor) -> Tensor:
    """The generated Triton in the interpreter."""
    key = MEASURED_COPY.configure([t.to("meta") for t in (x, before, into)], Target("cuda", "sm_80"))
    assert isinstance(key, KernelKey), str(key)
    found: Tensor = build_kernel(MEASURED_COPY, key).op(x, before, into)
    return found


SIDES = [
    pytest.param(definition, id="definition"),
    pytest.param(by_table, id="cpp", marks=on_cpu),
    pytest.param(interpreted, id="triton", marks=[in_interpreter, pytest.mark.interpreter]),
]


def oracle(x: Tensor, before: Tensor) -> Tensor:
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(x, before, strict=True)]
    return torch.tensor([[(a - b).abs().sum() for a, b in pairs], [b.abs().sum() for _, b in pairs]])


def check(side: Side, x: Tensor, before: Tensor) -> None:
    kept, old = x.clone(), before.clone()
    into = torch.full_like(x, 7.0, memory_format=torch.contiguous_format)
    sums = side(x, before, into)
    assert torch.equal(into, x)
    assert torch.equal(x, kept)
    assert torch.equal(before, old)
    assert sums.dtype == F32
    torch.testing.assert_close(sums.double(), oracle(x, before).double(), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 3, 37), (3, 1), (1, 5, 4097), (2, 8192), (5, 2, 2, 3)])
def test_sums_and_copies(side: Side, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Less than a vector, ends within one, whole runs, runs that end early, samples of their own."""
    torch.manual_seed(3)
    before = (8 + torch.randn(shape)).to(dtype)
    check(side, (before.float() + 0.1 * torch.randn(shape)).to(dtype), before)
    check(side, before, before)
    check(side, -before, before)


@pytest.mark.parametrize("side", SIDES)
def test_many_elements_strides_and_none(side: Side) -> None:
    """2^21 elements of the same size: a sum in float32, element by element, would be off by a percent."""
    check(side, torch.full((2, 1 << 20), 0.1), torch.full((2, 1 << 20), 0.3))
    wide = torch.randn(2, 40, 96)
    check(side, wide.transpose(1, 2), wide[:, :, :40].new_full((2, 96, 40), 0.5))
    assert side(torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 0)).tolist() == [[0, 0], [0, 0]]
    nan = side(torch.tensor([[float("nan")], [1.0]]), torch.ones(2, 1), torch.ones(2, 1))
    assert nan[0].isnan().tolist() == [True, False]


@on_cpu
def test_threads_do_not_change_sums() -> None:
    x, before = torch.randn(2, 3, 300, 77)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(by_table(x, before, torch.empty_like(x)))
    assert torch.equal(*found)


@pytest.mark.parametrize("side", SIDES[:2])
def test_what_does_not_fit_is_refused(side: Side) -> None:
    x = torch.ones(2, 3)
    for wrong in ((x, x[:1], x.clone()), (x, x, x[:, :2].clone()), (x, x.half(), x.clone())):
        with pytest.raises((ValueError, RuntimeError), match=r"one shape \[B, ...\]"):
            side(*wrong)
    with pytest.raises(ValueError, match=r"one shape \[B, ...\]"):
        ops.measured_copy(x.to("meta"), x.long().to("meta"), x.to("meta"))


def test_other_dtypes_are_refused_with_a_reason() -> None:
    x = torch.ones(1, 3, dtype=torch.float64)
    refused = MEASURED_COPY.configure([x, x, x], Target("cpu", "avx2"))
    assert isinstance(refused, Refusal)
    assert "float64" in refused.reason
