"""GPTQ against rounding to nearest, and its edges."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.gptq import HessianError, gptq
from tilewright.compiler.quantizers import Quantizer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(2)


def correlated(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, 12) @ torch.randn(12, columns) + 0.3 * torch.randn(tokens, columns)


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("kind", ["symmetric", "float-zero"])
def test_it_lowers_the_error_of_the_output(kind: str, group: int) -> None:
    x, w = correlated(512, 150), torch.randn(40, 150)
    quantizer = Quantizer(3, kind, group)
    found = gptq(quantizer, w, x.t() @ x)
    near = quantizer.quantize(w)
    assert found.codes.shape == near.codes.shape
    assert found.scale.shape == near.scale.shape
    error = [(x @ (q.dequantize() - w).t()).norm() for q in (found, near)]
    assert float(error[0]) < 0.6 * float(error[1])


@pytest.mark.parametrize("group", [0, 32, 64])
def test_the_identity_is_rounding_to_nearest(group: int) -> None:
    w, quantizer = torch.randn(9, 100), Quantizer(4, "float-zero", group)
    found, near = gptq(quantizer, w, 3 * torch.eye(100)), quantizer.quantize(w)
    assert torch.equal(found.codes, near.codes)
    assert torch.equal(found.scale, near.scale)


def test_a_weight_on_its_grid_stays() -> None:
    x, quantizer = correlated(300, 64), Quantizer(4, "symmetric", 32)
    w = quantizer.fake(torch.randn(11, 64))
    torch.testing.assert_close(gptq(quantizer, w, x.t() @ x).dequantize(), w, rtol=1e-5, atol=1e-6)


def test_inputs_that_never_occur_and_few_samples() -> None:
    x = correlated(20, 64)
    x[:, 5] = 0.0
    found = gptq(Quantizer(4), torch.randn(7, 64), x.t() @ x)
    assert torch.isfinite(found.dequantize()).all()
    assert float(found.dequantize()[:, 5].abs().max()) == 0.0


def test_impossible_hessians() -> None:
    w = torch.randn(4, 8)
    with pytest.raises(OptionError, match="8 columns"):
        gptq(Quantizer(4), w, torch.eye(9))
    with pytest.raises(OptionError, match="damping = 0"):
        gptq(Quantizer(4), w, torch.eye(8), damping=0.0)
    with pytest.raises(HessianError, match="NaN"):
        gptq(Quantizer(4), w, torch.eye(8) * float("nan"))
    with pytest.raises(HessianError, match="not positive definite"):
        gptq(Quantizer(4), w, torch.diag(torch.tensor([1.0] * 7 + [-100.0])))
