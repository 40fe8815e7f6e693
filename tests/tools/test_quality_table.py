"""What the quality table judges: bands have two ends, and a goal that is missed is a failure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tilewright.compiler.pipeline import Pipeline
from tilewright.compiler.weight_format import WeightFormat
from tilewright.tools import quality_table
from tilewright.tools.quality_table import ROWS, Measured, Row, main, off_grid


def measured(row: Row, delta: float) -> Measured:
    return Measured(row.name, row.pipeline, delta, 0.001, math.exp(delta), row.low, row.high, row.goal)


def test_every_row_is_a_pipeline_and_its_band_can_be_missed_at_both_ends() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        Pipeline.parse(row.pipeline)
        assert -0.02 <= row.low < row.high, row.name
        assert ("FILE" in row.pipeline) == (row.calibrated is not None), row.name
        assert row.goal is None or row.low < math.log(row.goal) <= row.high, row.name
        assert not measured(row, row.low - 1e-6).inside
        assert not measured(row, row.high + 1e-6).inside


@pytest.mark.parametrize(
    ("delta", "said", "status"),
    [
        (0.0048, "inside, goal 1.005 met", 0),
        (0.0052, "inside, goal 1.005 MISSED", 1),
        (-0.02, "OUTSIDE, goal 1.005 met", 1),
    ],
)
def test_the_exit_status_judges_bands_and_goals(
    delta: float, said: str, status: int, monkeypatch: Any, capsys: Any
) -> None:
    def rows(model: Any, rows: Any, text: str, windows: int) -> Iterator[Measured]:
        yield from (measured(row, delta) for row in rows)

    monkeypatch.setattr(quality_table, "measure", rows)
    monkeypatch.setattr(quality_table, "resolve", lambda name: None)
    assert main(["--row", "W8A8 token, g32, rotated"]) == status
    assert said in capsys.readouterr().out


def test_a_row_without_a_goal_is_judged_by_its_band_alone() -> None:
    row = next(row for row in ROWS if row.name == "W8A8 static")
    assert measured(row, 0.7).good
    assert "goal" not in measured(row, 0.7).line()
    assert not measured(row, 0.1).good, "a static range of one token that costs nothing is no static range"


def test_weights_off_the_grid_are_near_it_and_not_on_it() -> None:
    """Rounding them to the grid of Q4_1 changes them, where it changed nothing before; a tied head stays."""
    torch.manual_seed(0)
    form = WeightFormat(4, 32, "float-zero")
    module = torch.nn.ModuleDict({"table": torch.nn.Embedding(7, 96), "head": torch.nn.Linear(96, 7)})
    module["head"].weight = module["table"].weight
    module["layer"] = torch.nn.Linear(96, 40)
    layer, tied = module["layer"], module["table"].weight.detach().clone()
    layer.weight.data = form.round_weight(layer.weight)
    before = layer.weight.detach().clone()
    assert float((form.round_weight(before) - before).norm()) < 1e-3 * float(before.norm())
    off_grid(module)
    assert torch.equal(module["head"].weight, tied)
    moved = (layer.weight - before).detach().unflatten(1, (3, 32))
    step = (before.unflatten(1, (3, 32)).amax(-1) - before.unflatten(1, (3, 32)).amin(-1)) / 15
    assert bool((moved.abs() <= 0.5001 * step[..., None]).all())
    assert float(moved.abs().mean() / step.mean()) == pytest.approx(0.25, rel=0.05)
    assert float((form.round_weight(layer.weight) - layer.weight).norm()) > 0.02 * float(before.norm())
