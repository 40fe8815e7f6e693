"""The parity helper: it accepts rounding, refuses wrong results, and refuses to judge by a weak bound."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tilewright.compiler.diagnostics import ParityError
from tilewright.compiler.parity import (
    assert_parity,
    differential_fp64,
    errors,
    errors_against_fp64,
    float64_evaluation,
    relative_rms,
)


def attention_case(dtype=torch.float32, gain=2.0):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator).mul(gain).to(dtype) for _ in range(3))
    return F.scaled_dot_product_attention(q, k, v), (q, k, v)


def test_rounding_is_accepted_and_measured_in_ulps_of_the_dtype():
    want = torch.full((2, 2), 20.0, dtype=torch.bfloat16) * torch.tensor([1.0, 1.5], dtype=torch.bfloat16)
    got = want.clone()
    got[0, 0] += 0.125  # one unit in the last place of bfloat16 in [16, 32)
    assert errors(got, want).ulps == 1.0
    assert errors(want, want).within(ulps=0, rms=0)


def test_small_elements_are_judged_at_the_size_of_the_whole():
    want = torch.tensor([1.0, -1.0, 1e-9, 2.0])
    got = want + torch.tensor([0.0, 0.0, 6e-8, 0.0])
    assert errors(got, want).ulps < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_against_float64(dtype):
    want, (q, k, v) = attention_case(dtype)
    exact = float64_evaluation(F.scaled_dot_product_attention, (q, k, v))
    spelled = torch.softmax(q @ k.mT * 8**-0.5, -1) @ v
    found = assert_parity(
        spelled,
        want,
        ulps=16,
        rms=6 * torch.finfo(dtype).eps,
        reference64=exact,
        nulls=[v.mean(-2, keepdim=True)],
    )
    assert 0 < found.rms < 6 * torch.finfo(dtype).eps


def test_a_difference_above_either_bound_is_an_error():
    want, _ = attention_case()
    with pytest.raises(ParityError, match="relative RMS error"):
        assert_parity(want * (1 + 1e-4), want, ulps=1e6, rms=1e-6)
    spike = want.clone()
    spike[0, 0, 0, 0] += 1e-4
    with pytest.raises(ParityError, match="ulp"):
        assert_parity(spike, want, ulps=8, rms=1e-2)


def test_an_error_beyond_that_of_eager_is_found_even_inside_loose_bounds():
    want, args = attention_case()
    exact = float64_evaluation(F.scaled_dot_product_attention, args)
    with pytest.raises(ParityError, match="against float64 exceeds"):
        assert_parity((exact * (1 + 1e-4)).float(), want, ulps=1e5, rms=1e-2, reference64=exact)


def test_weak_bounds_are_refused():
    want, (_, _, v) = attention_case()
    with pytest.raises(ParityError, match="accept zeros"):
        assert_parity(want, want, ulps=1e9, rms=1.0)
    # A flat softmax: attention is the mean of V, and a bound of 2 % cannot tell them apart.
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(3))
    flat = F.scaled_dot_product_attention(q * 1e-3, k * 1e-3, v)
    with pytest.raises(ParityError, match="rolled by one along axis -2"):
        assert_parity(flat, flat, ulps=1e9, rms=0.02)
    with pytest.raises(ParityError, match=r"accept nulls\[0\]"):
        assert_parity(want, want, ulps=1e9, rms=0.5, nulls=[want * 0.9])
    constant = torch.ones(4, 4)
    with pytest.raises(ParityError, match="rolled by one"):
        assert_parity(constant, constant, ulps=1, rms=1e-6)


def test_the_mean_over_the_last_axis_but_one_is_refused():
    rows = torch.randn(1, 8, generator=torch.Generator().manual_seed(3)).repeat(4, 1)
    rows = rows + 1e-3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    with pytest.raises(ParityError, match="axis -2|mean over"):
        assert_parity(rows, rows, ulps=1e9, rms=0.01)


def test_shape_dtype_integers_and_non_finite_values_must_match():
    want, _ = attention_case()
    with pytest.raises(ParityError, match="should be"):
        assert_parity(want.double(), want, ulps=1, rms=1e-6)
    with pytest.raises(ParityError, match="1 of 4"):
        assert_parity(torch.arange(4), torch.tensor([0, 1, 2, 4]), ulps=1, rms=1e-6)
    broken = want.clone()
    broken[0, 0, 0, 0] = math.nan
    with pytest.raises(ParityError):
        assert_parity(broken, want, ulps=1e9, rms=0.1)
    with_inf = want.clone()
    with_inf[0, 0, 0, 0] = -math.inf
    assert relative_rms(with_inf, with_inf.clone()) == 0.0
    other = with_inf.clone()
    other[0, 0, 0, 0] = math.inf
    assert relative_rms(other, with_inf) == math.inf


def test_float64_evaluation_widens_casts_and_parameters():
    layer = torch.nn.Linear(5, 3)

    def model(x):
        return layer(x.to(torch.bfloat16).float()).to(torch.float16)

    x = torch.randn(4, 5)
    got = float64_evaluation(model, [x])
    assert got.dtype == torch.float64
    want = x.double() @ layer.weight.double().T + layer.bias.double()
    assert relative_rms(got, want) < 1e-15


def test_float64_evaluation_refuses_a_lost_write():
    state = torch.zeros(3)
    with pytest.raises(ParityError, match="in place"):
        float64_evaluation(lambda x: state.add_(x), [torch.ones(3)])


def test_errors_against_fp64_tell_rounding_from_a_wrong_constant():
    _, args = attention_case()

    def spelled(q, k, v, scale=8**-0.5):
        return torch.softmax(q @ k.mT * scale, -1) @ v

    good = errors_against_fp64(F.scaled_dot_product_attention, spelled, args)
    assert good.acceptable
    assert 0 < good.eager[0] < 1e-6
    bad = errors_against_fp64(F.scaled_dot_product_attention, lambda *a: spelled(*a, scale=0.3536), args)
    assert not bad.acceptable
    with pytest.raises(ParityError, match="another shape"):
        errors_against_fp64(lambda x: x, lambda x: x[:1], [torch.ones(3)])
    with pytest.raises(ParityError, match="not a float"):
        errors_against_fp64(lambda x: x.argmax(), lambda x: x.argmin(), [torch.arange(3.0)])


def test_differential_fp64_sees_what_float32_hides():
    _, args = attention_case()

    def shifted(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=8**-0.5 * (1 + 1e-8))

    assert differential_fp64(F.scaled_dot_product_attention, F.scaled_dot_product_attention, args) == 0.0
    assert 1e-10 < differential_fp64(F.scaled_dot_product_attention, shifted, args) < 1e-6
    assert differential_fp64(lambda *a: a[0], lambda *a: a[0][:1], args) == math.inf
    assert differential_fp64(lambda *a: a[0], lambda *a: a[:2], args) == math.inf
