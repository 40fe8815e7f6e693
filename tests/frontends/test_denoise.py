"""The loop's helper finds step and branch, keeps requests apart, and fits diffusers' cache_context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.ops.measured_copy import measured_copy
from tilewright.frontends.denoise import StepRunner
from tilewright.runtime.contracts import REUSE, STATE
from tilewright.runtime.step_reuse import FAST_30, FirstBlock, StepReuse, StepReuseError
from tilewright.runtime.step_state import Schedule, StepState, StepStateError

TIMES = [1000.0 - 30 * i for i in range(30)]


class Gated:
    """Stands for a program with one gate; remembers which calls computed."""

    def __init__(self) -> None:
        self.computed: list[bool] = []

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        access = REUSE.get()
        assert access is not None
        reuse = access.decide(0, x, x, measured_copy.definition)
        if not reuse:
            access.keep(0, 2 * x, x, x, measured_copy.definition)
        self.computed.append(not reuse)
        return x + (access.residual(0) if reuse else x)


def _loop(runner: StepRunner, model: Gated, x: Tensor, branches: tuple[str, ...]) -> list[Tensor]:
    found = []
    for time in TIMES:
        for name in branches:
            with runner.branch(name):
                found.append(runner(x, timestep=torch.tensor([time])))
    return found


def test_branches_follow_their_own_schedule() -> None:
    model, reuse = Gated(), StepReuse(FAST_30)
    runner = StepRunner(model, reuse=reuse)
    with runner.request("a", TIMES):
        _loop(runner, model, torch.ones(1, 2, 3), ("cond", "uncond"))
        assert reuse.bytes() > 0
    assert reuse.bytes() == 0
    for side in (model.computed[::2], model.computed[1::2]):
        assert [i + 1 for i, c in enumerate(side) if c] == [1, 2, 8, 14, 20, 26, 29, 30]


def test_two_requests_take_turns() -> None:
    reuse = StepReuse(FirstBlock(0.5))
    models = [Gated(), Gated()]
    runners = [StepRunner(m, reuse=reuse) for m in models]
    with runners[0].request("a", TIMES), runners[1].request("b", TIMES):
        for time in TIMES[:5]:
            for i, runner in enumerate(runners):
                got = runner(torch.full((1, 2, 3), 1.0 + i), timestep=time)
                assert torch.equal(got, torch.full((1, 2, 3), 2.0 + 2 * i))
    assert models[0].computed == models[1].computed == [True, False, False, False, False]


def test_each_phase_has_its_program_and_state() -> None:
    seen: list[str] = []

    def named(name: str) -> Any:
        def run(timestep: float) -> None:
            assert STATE.get() is not None
            seen.append(name)

        return run

    schedule = Schedule(dense=2, searches=(2,))
    runner = StepRunner(
        named("dense"), state=StepState(), schedule=schedule, models={"search": named("search")}
    )
    with runner.request("a", TIMES):
        for time in TIMES[:3]:
            runner(timestep=time)
    assert seen == ["dense", "dense", "search"]


def test_steps_that_share_a_timestep_are_counted_for_each_branch() -> None:
    """Guidance may start late, or the first timestep be shared: no count of calls before tells how many."""
    runner = StepRunner(lambda **_: None)
    with runner.request("a", [20.0, 20.0, 10.0]):
        for step, time in enumerate([20.0, 20.0, 10.0]):
            for name in ("cond", "uncond"):
                with runner.branch(name):
                    runner(timestep=time)
                assert runner.step == step


def test_the_noisiest_token_tells_the_step() -> None:
    """A pipeline that is given its first frame passes a timestep per token, 0 for those of the frame."""
    runner = StepRunner(lambda **_: None)
    with runner.request("a", TIMES):
        runner(timestep=torch.tensor([[0.0, 0.0, TIMES[4], TIMES[4]]]))
        assert (runner.step, runner.steps) == (4, 30)


def test_errors_name_what_is_wrong() -> None:
    model = Gated()
    runner = StepRunner(model, reuse=StepReuse(FAST_30))
    x = torch.ones(1, 2, 3)
    with pytest.raises(OptionError, match="no request runs"):
        runner(x, timestep=1.0)
    with runner.request("a", TIMES):
        with pytest.raises(OptionError, match="no argument 'timestep'"):
            runner(x)
        with pytest.raises(OptionError, match="runs already"), runner.request("b", TIMES):
            pass
        runner(x, timestep=TIMES[5])
        with pytest.raises(StepReuseError, match="step 2 of 30 after step 5"):
            runner(x, timestep=TIMES[2])
        with pytest.raises(StepStateError, match="before the first"):
            runner(x, timestep=5000.0)
    with pytest.raises(OptionError, match="belong together"):
        StepRunner(model, models={"sparse": model})
