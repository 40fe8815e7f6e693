"""How much a kept tensor changed since the one kept before, and that both are copies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tilewright.runtime.step_probe import Kept, relative_change

X = torch.ones(1, 4, 3)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def change(new: Tensor, old: Tensor) -> float:
    """The definition, in double precision."""
    pairs = zip(new.double().flatten(1), old.double().flatten(1), strict=True)
    return max(float((n - o).abs().sum() / o.abs().sum()) for n, o in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 300, 576), (1, 40, 576), (1, 1, 7), (2, 40, 576)])
def test_the_change_is_that_of_sums_in_double_precision(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """One sample of few elements takes another way; 40 rows of 8 sum to more than float16 holds."""
    generator = torch.Generator().manual_seed(0)
    values = [(8 + k * torch.randn(shape, generator=generator)).to(dtype) for k in range(1, 6)]
    kept = [Kept(values[0])]
    for before, value in zip(values, values[1:], strict=False):
        kept.append(Kept(value, kept[-1]))
        want = pytest.approx(change(value, before), rel=3e-5 if dtype.itemsize > 2 else 2e-3)
        assert kept[-1].change(kept[-2]) == want, "of rows that change places"
        assert relative_change(value, before) == want


def test_one_copy_beside_many() -> None:
    """The policy of the first block keeps the probe of a computed step while later ones come and go."""
    old = Kept(X)
    for level in (1.5, 3.0, 0.25):
        assert Kept(X * level, old).change(old) == pytest.approx(abs(level - 1.0))
    assert torch.equal(old.tensor, X)


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 4, 3)])
def test_what_is_kept_is_a_copy(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, requires_grad=True)
    first = Kept(x)
    second = Kept(2 * x, first)
    with torch.no_grad():
        x.mul_(9)
    assert float(first.tensor.sum() * 2) == float(second.tensor.sum()) == 2 * math.prod(shape)
    assert not first.tensor.requires_grad
    assert not second.tensor.requires_grad
    assert first.bytes() == math.prod(shape) * 4 * (3 if shape[0] == 1 else 1)


def test_other_sizes_and_dtypes_have_memory_of_their_own() -> None:
    old = Kept(X)
    wide = Kept(torch.ones(1, 12, 1), old)
    assert wide.tensor.shape == (1, 12, 1)
    exact = Kept(X.double() * (1 + 1e-12), old)
    assert exact.tensor.dtype == torch.float64
    assert exact.change(Kept(X.double())) == pytest.approx(1e-12, rel=1e-3)
    assert torch.equal(old.tensor, X)


def test_memory_made_in_inference_mode_is_written_outside_of_it() -> None:
    with torch.inference_mode():
        old = Kept(X)
    new = Kept(2 * X, old)
    with torch.inference_mode():
        assert Kept(3 * X, new).change(new) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(1, 4, 3), (1, 70000)])
def test_a_change_that_cannot_be_measured_is_infinite(shape: tuple[int, ...]) -> None:
    one = torch.ones(shape)
    for new, old in ((one, 0 * one), (0 * one, 0 * one), (one * math.nan, one), (one, one * math.nan)):
        kept = Kept(old)
        assert Kept(new, kept).change(kept) == relative_change(new, old) == math.inf
    both = torch.cat([X, X * math.nan])
    assert relative_change(both, torch.ones_like(both)) == math.inf
