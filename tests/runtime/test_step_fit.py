"""A polynomial fitted to recorded changes, and the policy that it makes."""

from __future__ import annotations

import math

import pytest
import torch

from tilewright.compiler.ops.measured_copy import measured_copy
from tilewright.compiler.ops.step_reuse import enter, leave
from tilewright.runtime.step_fit import Recorded
from tilewright.runtime.step_reuse import Accumulated, Policy, StepReuse, StepReuseError

X = torch.ones(1, 4, 3, dtype=torch.float64)
CHANGES = (0.5, 0.25, 0.125, 0.75, 0.8, 0.375)


def curve(change: float) -> float:
    return 3.0 * change**2 + 0.5 * change + 0.01


def run(policy: Policy, changes: tuple[float, ...], left_out: int = -1) -> tuple[int, int]:
    """(computed, reused) of a request whose probe changes so, and whose residual changes by `curve`; one step
    may never be called."""
    reuse, probe, residual = StepReuse(policy), X, X
    reuse.begin("r", len(changes) + 2)
    for step, change in enumerate((0.0, *changes)):
        if step == left_out:
            continue
        probe = probe * (1.0 + change)
        residual = residual * (1.0 + (curve(change) if step else 0.0))
        with reuse.call("r", "", step):
            begun = enter(X, probe, 0, measured_copy.definition)
            leave(begun + residual, begun, begun, 0, measured_copy.definition)
    return reuse.end("r")


def test_the_polynomial_is_that_of_what_was_recorded() -> None:
    recorded = Recorded()
    assert run(recorded, CHANGES) == (7, 0), "nothing is reused meanwhile"
    assert [x for x, _ in recorded.changes] == pytest.approx(CHANGES, rel=1e-9)
    assert [y for _, y in recorded.changes] == pytest.approx([curve(x) for x in CHANGES], rel=1e-9)
    policy = recorded.fitted(0.3, degree=2)
    assert policy.coefficients == pytest.approx((3.0, 0.5, 0.01), rel=1e-6)
    assert policy.limits == pytest.approx((0.125, 0.8))
    assert policy.threshold == 0.3
    higher = recorded.fitted(0.3)
    assert higher.coefficients == pytest.approx((0.0, 0.0, 3.0, 0.5, 0.01), abs=1e-6)


def test_changes_beyond_what_was_recorded_count_as_its_ends() -> None:
    """A parabola that falls to nothing at 1.25 would leave every step out behind a great change."""
    falling = (-0.8, 1.0, 0.0)
    assert run(Accumulated(0.15, falling), (2.0, 2.0, 2.0)) == (1, 3)
    assert run(Accumulated(0.15, falling, (0.1, 1.0)), (2.0, 2.0, 2.0)) == (4, 0)
    assert run(Accumulated(0.15, (1.0, 0.0), (0.1, 1.0)), (0.01, 0.01, 0.01)) == (2, 2), "0.1, then 0.2"


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.1, 1.0)])
def test_a_change_that_cannot_be_told_is_computed(limits: tuple[float, float]) -> None:
    reuse = StepReuse(Accumulated(1e9, (1.0, 0.0), limits))
    reuse.begin("r", 9)
    for step, probe in enumerate((0 * X, X, X, X * math.nan, X)):
        with reuse.call("r", "", step):
            begun = enter(X, probe, 0, measured_copy.definition)
            leave(begun + X, begun, begun, 0, measured_copy.definition)
        assert reuse.counts("r") == [(1, 0), (2, 0), (2, 1), (3, 1), (4, 1)][step]


def test_too_little_to_fit_to() -> None:
    recorded = Recorded()
    run(recorded, CHANGES[:4])
    assert len(recorded.fitted(0.1, degree=3).coefficients) == 4
    for degree in (0, 4):
        with pytest.raises(StepReuseError, match=f"degree = {degree}: .* below the 4 different changes"):
            recorded.fitted(0.1, degree)
    with pytest.raises(StepReuseError, match="the 0 different changes"):
        Recorded().fitted(0.1)
    constant = Recorded()
    run(constant, (0.5, 0.5, 0.5, 0.5, 0.5, 0.5))
    with pytest.raises(StepReuseError, match="below the"):
        constant.fitted(0.1)


def test_what_cannot_be_measured_is_not_recorded() -> None:
    recorded = Recorded()
    run(recorded, (0.5, math.nan, 0.25))
    assert recorded.changes == [(0.5, pytest.approx(curve(0.5)))]
    run(recorded, (0.5, 0.25, 0.125), left_out=2)
    assert len(recorded.changes) == 2, "from step to step: not over a gap"
