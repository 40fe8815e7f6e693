"""How much a kept tensor changed since the one kept before, and that both are copies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tilewright.compiler.ops.measured_copy import measured_copy
from tilewright.runtime.step_probe import Kept

X = torch.ones(1, 4, 3)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def kept(x: Tensor, beside: Kept | None = None) -> Kept:
    return Kept(x, beside, measured_copy.definition)


def change(new: Tensor, old: Tensor) -> float:
    """The definition, in double precision."""
    pairs = zip(new.double().flatten(1), old.double().flatten(1), strict=True)
    return max(float((n - o).abs().sum() / o.abs().sum()) for n, o in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 300, 576), (1, 1, 7), (2, 40, 576)])
def test_the_change_is_that_of_sums_in_double_precision(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """40 rows of 8 sum to more than float16 holds."""
    generator = torch.Generator().manual_seed(0)
    values = [(8 + k * torch.randn(shape, generator=generator)).to(dtype) for k in range(1, 6)]
    found = [kept(values[0])]
    for before, value in zip(values, values[1:], strict=False):
        found.append(kept(value, found[-1]))
        assert found[-1].change == pytest.approx(change(value, before), rel=1e-6)


def test_one_copy_beside_many() -> None:
    """The policy of the first block keeps the probe of a computed step while later ones come and go."""
    old = kept(X)
    held = {kept(X * level, old).tensor.data_ptr() for level in (1.5, 3.0, 0.25)}
    assert [kept(X * level, old).change for level in (1.5, 3.0, 0.25)] == [0.5, 2.0, 0.75]
    assert len(held) == 1, "they take each other's place"
    assert torch.equal(old.tensor, X)


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 4, 3)])
def test_what_is_kept_is_a_copy(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    first = kept(x)
    second = kept(2 * x, first)
    third = kept(4 * x, second)
    with torch.no_grad():
        x.mul_(9)
    assert float(second.tensor.sum() * 2) == float(third.tensor.sum()) == 4 * math.prod(shape)
    assert third.tensor.data_ptr() == first.tensor.data_ptr(), "two take turns"
    assert not first.tensor.requires_grad
    assert not second.tensor.requires_grad
    assert (kept(x).bytes(), second.bytes()) == (math.prod(shape) * 4, math.prod(shape) * 8)


def test_other_sizes_and_dtypes_have_memory_of_their_own() -> None:
    old = kept(X)
    wide = kept(torch.ones(1, 12, 1), old)
    assert wide.tensor.shape == (1, 12, 1)
    exact = kept(X.double() * (1 + 1e-12), old)
    assert exact.tensor.dtype == torch.float64
    assert wide.change == exact.change == math.inf
    assert kept(X.double(), exact).change == pytest.approx(1e-12, rel=1e-3)
    assert torch.equal(old.tensor, X)


def test_memory_made_in_inference_mode_is_written_outside_of_it() -> None:
    with torch.inference_mode():
        old = kept(X)
    new = kept(2 * X, old)
    with torch.inference_mode():
        assert kept(3 * X, new).change == pytest.approx(0.5)


def test_a_change_that_cannot_be_measured_is_infinite() -> None:
    one = torch.ones(1, 4, 3)
    for new, old in ((one, 0 * one), (0 * one, 0 * one), (one * math.nan, one), (one, one * math.nan)):
        assert kept(new, kept(old)).change == math.inf
    both = torch.cat([X, X * math.nan])
    assert kept(both, kept(torch.ones_like(both))).change == math.inf
