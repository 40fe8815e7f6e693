"""Real diffusers schedulers in a loop: every call has the step of the scheduler's list that asked for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from tilewright.frontends.denoise import StepRunner, driven
from tilewright.runtime.step_reuse import FirstBlock, StepReuse
from tilewright.runtime.step_state import Schedule, StepState

SCHEDULERS: list[tuple[str, dict[str, Any], int, bool]] = [
    ("HeunDiscreteScheduler", {}, 6, True),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, 20, True),
    ("FlowMatchHeunDiscreteScheduler", {}, 6, True),
    ("KDPM2DiscreteScheduler", {}, 6, False),
    ("KDPM2AncestralDiscreteScheduler", {}, 6, True),
    ("UniPCMultistepScheduler", {}, 6, False),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, 150, True),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 150, True),
    ("DPMSolverSinglestepScheduler", {}, 6, False),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 6, False),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 0.01}, 60, False),
    ("DDIMScheduler", {}, 6, False),
]
"""Class, options, steps asked for, and whether its list repeats a timestep."""


def _denoise(pipe: Any, steps: int, branches: tuple[str, ...]) -> torch.Tensor:
    """The loop of a pipeline, with one call of the transformer for each branch."""
    generator = torch.Generator().manual_seed(0)
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(1, 2, 4, 4, generator=generator)
    for t in pipe.scheduler.timesteps:
        scale = getattr(pipe.scheduler, "scale_model_input", lambda given, _: given)
        given, noise = scale(x, t), torch.zeros_like(x)
        for name in branches:
            with pipe.transformer.cache_context(name) if name else torch.no_grad():
                noise = noise + pipe.transformer(given, timestep=t.expand(1))
        options = {"generator": generator} if "Ancestral" in type(pipe.scheduler).__name__ else {}
        x = pipe.scheduler.step(noise, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("branches", [("cond", "uncond"), ("",), ("", "")], ids=["two", "one", "unnamed"])
@pytest.mark.parametrize(("name", "options", "steps", "repeats"), SCHEDULERS)
def test_each_call_has_its_step(
    name: str, options: dict[str, Any], steps: int, repeats: bool, branches: tuple[str, ...]
) -> None:
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    times = [float(t) for t in scheduler.timesteps]
    assert (len(set(times)) < len(times)) == repeats, "the case is what it says"
    seen: list[int] = []

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(runner.step)
        return 0.1 * x

    runner = StepRunner(
        model, reuse=StepReuse(FirstBlock(0.0)), state=StepState(), schedule=Schedule(dense=10**6)
    )
    pipe = SimpleNamespace(transformer=model, scheduler=scheduler)
    with driven(pipe, runner, request="a", steps=steps):
        assert runner.steps == len(times)
        found = _denoise(pipe, steps, branches)
    assert torch.isfinite(found).all()
    assert seen == [step for step in range(len(times)) for _ in branches]
