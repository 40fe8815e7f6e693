"""The numeric core: grids, remainder groups, rounding, guards, half-quadratic rounding, activations."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.quantizers import (
    Quantizer,
    fake_activation,
    half_quadratic,
    quantize_activation,
    split,
    weight_problem,
    whole_zero,
)

KINDS = ("symmetric", "asymmetric", "float-zero")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 7, 32])
def test_error_is_at_most_half_a_step(kind: str, bits: int, group: int) -> None:
    x = torch.randn(5, 45) + 0.7
    quantizer = Quantizer(bits, kind, group)
    found = quantizer.quantize(x)
    step = found.scale.amax()
    assert int(found.codes.max()) <= 2**bits - 1
    assert float((found.dequantize() - x).abs().max()) <= float(step) * 0.5001
    per_group = split((found.dequantize() - x).abs(), group).amax(-1)
    assert bool((per_group <= 0.5001 * found.scale).all())


def test_the_last_group_is_short_and_has_its_own_grid() -> None:
    x = torch.cat((torch.ones(1, 32), 100 * torch.ones(1, 5)), 1)
    found = Quantizer(4, "symmetric", 32).quantize(x)
    assert found.scale.shape == (1, 2)
    assert float(found.scale[0, 1] / found.scale[0, 0]) == pytest.approx(100)


def test_rounding_is_half_to_even() -> None:
    x = torch.tensor([[-7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 7.0]])
    assert Quantizer(4, "symmetric").fake(x).tolist() == [[-7.0, 0.0, 2.0, 2.0, 0.0, -2.0, 7.0]]


def test_a_grid_is_a_fixed_point() -> None:
    for kind in KINDS:
        quantizer = Quantizer(4, kind, 16, storage=torch.float16)
        once = quantizer.fake(torch.randn(6, 40))
        assert float((quantizer.fake(once) - once).abs().max()) <= 2e-3 * float(once.abs().max())


def test_a_q4_1_block_is_exactly_float_zero() -> None:
    """d and m in float16, codes 0 and 15 in every block: quantizing again finds them all."""
    d, m = (torch.rand(64, 4) * 0.1).half().float(), torch.randn(64, 4).half().float()
    codes = torch.randint(0, 16, (64, 4, 32))
    codes[..., 3], codes[..., 17] = 0, 15
    weight = (d[..., None] * codes + m[..., None]).flatten(1)
    found = Quantizer(4, "float-zero", 32, storage=torch.float16).quantize(weight)
    assert torch.equal(found.dequantize(), weight)
    assert not torch.equal(Quantizer(4, "symmetric", 32).fake(weight), weight)
    assert not torch.equal(Quantizer(4, "asymmetric", 32).fake(weight), weight)


def test_constant_and_zero_rows() -> None:
    for kind in KINDS:
        quantizer = Quantizer(4, kind, 8)
        assert torch.equal(quantizer.fake(torch.zeros(2, 20)), torch.zeros(2, 20))
    assert torch.equal(Quantizer(4, "float-zero", 8).fake(torch.full((2, 20), 3.0)), torch.full((2, 20), 3.0))


def test_narrow_range_and_whole_tensor() -> None:
    x = torch.tensor([[-1.0, 1.0, 0.1], [0.5, -0.25, 0.0]])
    narrow = Quantizer(8, "symmetric", narrow=True).quantize(x)
    assert int(narrow.codes.min()) >= 1
    whole = Quantizer(8, whole_tensor=True).quantize(x)
    assert float(whole.scale[0, 0]) == float(whole.scale[1, 0]) == pytest.approx(1 / 127)


def test_sixteen_bits_are_the_identity() -> None:
    x = torch.randn(3, 5)
    assert Quantizer(16).is_identity
    assert Quantizer(16).fake(x) is x


def test_half_quadratic_lowers_the_error() -> None:
    quantizer = Quantizer(3, "float-zero", 32, storage=torch.float16)
    x = torch.randn(64, 100) ** 3
    plain = (quantizer.fake(x) - x).abs().mean()
    better = (half_quadratic(quantizer, x).dequantize() - x).abs().mean()
    assert float(better) < 0.95 * float(plain)
    with pytest.raises(OptionError, match="float offsets"):
        half_quadratic(Quantizer(4), x)


def test_activations_per_token_and_per_group() -> None:
    x = torch.randn(3, 70)
    x[1, 40:] *= 50
    for activation, group in (("int8-token", 32), ("int8-group", 32)):
        codes, scale = quantize_activation(x, activation, group)
        assert float(codes.abs().max()) == 127.0
        assert scale.shape == (3, 1 if activation == "int8-token" else 3)
        error = (fake_activation(x, activation, group) - x).abs()
        assert float(error.max()) <= float(scale.max()) * 0.501
    tight = (fake_activation(x, "int8-group", 32) - x)[1, :32].abs().max()
    loose = (fake_activation(x, "int8-token", 32) - x)[1, :32].abs().max()
    assert float(tight) < 0.1 * float(loose)


def test_activations_at_the_ends_of_the_range() -> None:
    x = torch.zeros(4, 32)
    x[1], x[2, 5], x[3, 5] = 1e-38, float("inf"), float("nan")
    got = fake_activation(x, "int8-group", 32)
    assert torch.equal(got[:2], torch.zeros(2, 32))
    assert bool(got[2:].isnan().all())


def test_problems_of_weights_are_named() -> None:
    good = torch.randn(3, 4)
    assert weight_problem(good) is None
    assert "holds 1 NaN" in str(weight_problem(torch.tensor([[1.0, float("nan")]])))
    assert "holds 2 NaN" in str(weight_problem(torch.tensor([[-float("inf"), float("inf")]])))
    assert "not floating" in str(weight_problem(torch.ones(2, 2, dtype=torch.int32)))
    assert "axes" in str(weight_problem(torch.ones(2)))
    assert "is empty" in str(weight_problem(torch.ones(0, 4)))


def test_impossible_settings() -> None:
    for options, said in (
        ({"bits": 9}, "bits = 9"),
        ({"bits": 1}, "bits = 1"),
        ({"bits": 4, "kind": "log"}, "kind = 'log'"),
        ({"bits": 4, "group": -1}, "group = -1"),
        ({"bits": 4, "group": 32, "whole_tensor": True}, "group = 32"),
        ({"bits": 4, "clip": 0.0}, "clip = 0.0"),
    ):
        with pytest.raises(OptionError, match=said.replace(".", r"\.")):
            Quantizer(**options)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_whole_zeros_are_codes_and_exact_in_the_storage(bits: int) -> None:
    x = torch.randn(9, 45) * 0.03 + torch.randn(9, 1) * 0.05
    x[0, :16] = 0.0
    quantizer = Quantizer(bits, "float-zero", 16, storage=torch.float16)
    found = whole_zero(quantizer, x)
    zeros = torch.round(-found.offset / found.scale)
    assert torch.equal(zeros * found.scale, -found.offset)
    assert 0 <= int(zeros.min()) <= int(zeros.max()) < 2**bits
    for part in (found.scale, found.offset):
        assert torch.equal(part.half().float(), part)
    assert float(found.dequantize()[0, :16].abs().max()) == 0.0
    plain = Quantizer(bits, "asymmetric", 16).quantize(x)
    errors = [(split(q.dequantize() - x, 16)[..., :13] ** 2).sum() for q in (found, plain)]
    assert float(errors[0]) < float(errors[1])


def test_whole_zeros_are_of_small_float_zero_codes() -> None:
    for kind, bits in (("symmetric", 4), ("float-zero", 8)):
        with pytest.raises(OptionError, match="whole zero points are offsets"):
            whole_zero(Quantizer(bits, kind, 32), torch.randn(3, 32))
