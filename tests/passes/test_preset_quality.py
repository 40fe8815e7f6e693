"""What the lossy presets cost on real weights."""

from __future__ import annotations

import json

import pytest

from tilewright.frontends.cli import OK, main

BOUNDS = {"cpu-int8": 1.05, "cpu-int4": 1.01}
"""Largest ratio of perplexities on the bundled page, preset over the model as it is (seen: 1.043, 0.999)."""


@pytest.mark.slow
@pytest.mark.parametrize("preset", BOUNDS)
def test_perplexity_of_smollm2(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "smollm2", "--pipeline", preset, "--json"]) == OK
    ratio = json.loads(capsys.readouterr().out)["ratio"]
    # Equal would mean that nothing was quantized.
    assert ratio != 1.0
    assert 0.97 < ratio < BOUNDS[preset]
