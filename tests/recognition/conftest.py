"""What the recognition tests share: capture a graph, run one pass over it without replay, judge the
result."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tilewright.compiler.float64 import Float64
from tilewright.compiler.log import Fuel
from tilewright.compiler.passes_base import Example
from tilewright.compiler.pipeline import RunOptions, run_pass
from tilewright.compiler.replay import relative_rms, tensors_in
from tilewright.compiler.selftest import capture_example
from tilewright.compiler.selftest import run as run_program

ULPS = 16
FLOAT64 = 1e-9
FACTOR = 4.0
"""How much further from the float64 run the rewritten program may be than the original was."""


@dataclass
class Outcome:
    """What a pass did to one program."""

    applied: int
    reasons: list[str]
    error: float
    """Between the two programs, in units of what is allowed."""
    error64: float
    """Between their float64 runs, relative."""
    distance: tuple[float, float] = (0.0, 0.0)
    """Of the rewritten program and of the original from the float64 run, in units of what is allowed."""

    @property
    def is_right(self):
        """Close to the original; or as true as it, where it rounds to 16 bits after what was rewritten."""
        ours, theirs = self.distance
        close = self.error <= 1.0 or ours <= FACTOR * theirs
        return not self.applied or (close and self.error64 <= FLOAT64)


def where_defined(got, want):
    """Largest relative RMS over results, where the original gives finite numbers."""
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        if g.shape != w.shape or g.dtype != w.dtype:
            return float("inf")
        if w.is_floating_point():
            g, w = torch.where(torch.isfinite(w), g, 0.0), torch.where(torch.isfinite(w), w, 0.0)
            limit = ULPS * torch.finfo(w.dtype).eps
        else:
            limit = 1.0
        worst = max(worst, relative_rms(g, w) / limit)
    return worst


def examine(value, model, inputs, weights=()):
    """Run one pass over a function, without replay, and compare before with after."""
    example = Example(model, tuple(inputs))
    before, after = capture_example(example), capture_example(example)
    for program in (before, after):
        for i in weights:
            program.inputs[i] = replace(program.inputs[i], kind=type(program.inputs[i].kind).WEIGHT)
    report = run_pass(value, after, RunOptions(replay=False, verify="shapes"), Fuel())
    error, error64, distance = 0.0, 0.0, (0.0, 0.0)
    if report.applied:
        got, want = run_program(after), run_program(before)
        error = where_defined(got, want)
        wide = [tensors_in(Float64(p).run_on(p.example_inputs)) for p in (after, before)]
        error64 = where_defined(*wide) * ULPS * torch.finfo(torch.float64).eps
        truth = [t.to(w.dtype) for t, w in zip(wide[1], want, strict=True)]
        distance = (where_defined(got, truth), where_defined(want, truth))
    return Outcome(len(report.applied), [r.reason for r in report.refused], error, error64, distance)


@pytest.fixture(scope="session")
def judge():
    return examine
