"""The gates that are timed do what their names say."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler.ops.measured_copy import measured_copy
from tilewright.runtime.step_reuse import Accumulated, FirstBlock, StepReuse
from tilewright.tools import bench_gate

DEFINITION = measured_copy.definition


def test_a_line_for_every_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gate.main(["--rounds", "1", "--shape", "1x1x8", "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1, 1, 8] bfloat16, 1 threads, us of a step:"
    assert all(float(line.split()[-1]) > 0 for line in lines[1:])
    assert len(lines) == 1 + len(bench_gate.sides(torch.ones(1, 1, 8)))


@pytest.mark.parametrize(("threshold", "want"), [(1.0, (1, 4)), (0.0, (5, 0))])
@pytest.mark.parametrize("policy", [Accumulated, FirstBlock])
def test_a_side_that_reuses_does(
    policy: type[Accumulated | FirstBlock],
    threshold: float,
    want: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[StepReuse] = []

    class Noted(StepReuse):
        def begin(self, request: str, steps: int) -> None:
            made.append(self)
            super().begin(request, steps)

    monkeypatch.setattr(bench_gate, "StepReuse", Noted)
    step = bench_gate.gate(policy(threshold), torch.ones(1, 1, 8), torch.full((1, 1, 8), 2.0), DEFINITION)
    for _ in range(5):
        step()
    assert made[0].counts("r") == want
