"""What the lossy presets cost on real weights."""

from __future__ import annotations

import json

import pytest
import torch

from tilewright.frontends.cli import OK, main

BOUNDS = {"cpu-int8": 1.05, "cpu-int4": 1.01}
"""Largest ratio of perplexities on the bundled page, preset over the model as it is (seen: 1.045, 0.999).
With sums in another order, as kernels for unknown lengths have them, 8 bits a token give 1.056: few channels
set the scale of each token, so that the last bit of one value moves many."""


@pytest.mark.slow
@pytest.mark.parametrize("preset", BOUNDS)
def test_perplexity_of_smollm2(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()  # lengths that other tests compiled for would make these unknown
    assert main(["evaluate", "smollm2", "--pipeline", preset, "--json"]) == OK
    ratio = json.loads(capsys.readouterr().out)["ratio"]
    # Equal would mean that nothing was quantized.
    assert ratio != 1.0
    assert 0.97 < ratio < BOUNDS[preset]
