"""A denoising loop's side of state between steps: which step and branch each call of the model belongs to.

`StepRunner` stands in a loop of one's own; `driven` puts one into a diffusers pipeline for one request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.runtime.step_reuse import StepReuse
from tilewright.runtime.step_state import Schedule, StepClock, StepState


class StepRunner:
    """Calls a compiled model inside the state of its request, branch and step.

    The branch is that of `branch(name)`, which has the form of diffusers' `cache_context`; the step is what
    it is told, or else follows from the timestep of the call. Serves one request at a time; two requests
    that take turns have two runners over the same StepReuse and StepState.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        reuse: StepReuse | None = None,
        state: StepState | None = None,
        schedule: Schedule | None = None,
        models: dict[str, Callable[..., Any]] | None = None,
        timestep: str = "timestep",
    ) -> None:
        """reuse: for `reuse-step-residual`. state, schedule, models: for passes that have a program per
        phase; models[phase] stands for `model` at steps of that phase, and where steps of a phase have
        programs of their own, models["phase@step"]. timestep: name of the argument."""
        if (state is None) != (schedule is None) or (models and state is None):
            raise OptionError("state, schedule and models belong together")
        self._model, self._models, self._timestep = model, dict(models or {}), timestep
        self._reuse, self._state, self._schedule = reuse, state, schedule
        self._request, self._branch = "", ""
        self._told: int | None = None
        self._clock: StepClock | None = None
        self._at = -1

    @property
    def step(self) -> int:
        """The step of the present or last call; -1 before the first."""
        return self._at

    @contextmanager
    def request(self, name: str, timesteps: Sequence[float]) -> Iterator[StepRunner]:
        """Run a request with these timesteps, falling; all it held is dropped at the end."""
        if self._clock is not None:
            raise OptionError(f"request {self._request!r} runs already", remedy="use one runner per request")
        clock = StepClock(timesteps)
        with ExitStack() as stack:
            if self._reuse is not None:
                self._reuse.begin(name, len(clock.timesteps))
                stack.callback(self._reuse.end, name)
            if self._state is not None:
                self._state.begin(name, clock.timesteps)
                stack.callback(self._state.end, name)
            self._request, self._clock = name, clock
            try:
                yield self
            finally:
                self._clock = None

    @contextmanager
    def branch(self, name: str, *, step_index: int | None = None, **_: Any) -> Iterator[None]:
        """Calls inside belong to this branch of guidance, such as `cond` or `uncond`.

        step_index: the step, counted from 0, where the loop knows it. What else a pipeline tells its cache
        (sigma, number of steps) is not needed.
        """
        before = self._branch, self._told
        self._branch, self._told = name, step_index
        try:
            yield
        finally:
            self._branch, self._told = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call; OptionError outside of a request or without a timestep argument."""
        if self._clock is None:
            raise OptionError("no request runs", remedy="call inside `with runner.request(name, timesteps):`")
        if self._timestep not in kwargs:
            raise OptionError(f"the call has no argument {self._timestep!r}", remedy="pass it by name")
        value = kwargs[self._timestep]
        step = self._clock.step(float(value.reshape(-1)[0]) if hasattr(value, "reshape") else float(value))
        step = self._at = step if self._told is None else self._told
        model = self._model
        with ExitStack() as stack:
            if self._reuse is not None:
                stack.enter_context(self._reuse.call(self._request, self._branch, step))
            if self._state is not None and self._schedule is not None:
                phase = self._state.phase(self._schedule, self._request, self._branch, step)
                model = self._program(phase.value, step)
                stack.enter_context(self._state.call(self._request, self._branch, step))
            return model(*args, **kwargs)

    def _program(self, phase: str, step: int) -> Callable[..., Any]:
        own = [name for name in self._models if name.startswith(f"{phase}@")]
        if own and f"{phase}@{step}" not in own:
            raise OptionError(
                f"step {step} is {phase}, and the programs are for {', '.join(sorted(own))}",
                remedy="search and denoise with the same number of steps and dense steps",
            )
        return self._models.get(f"{phase}@{step}" if own else phase, self._model)


class _Driven:
    """Stands for the transformer of a pipeline: its calls and branches go to a runner, the rest to it."""

    def __init__(self, module: Any, runner: StepRunner) -> None:
        self._module, self._runner = module, runner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._runner(*args, **kwargs)

    def cache_context(self, name: str, **told: Any) -> Any:
        return self._runner.branch(name, **told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def driven(pipe: Any, runner: StepRunner, *, request: str, steps: int) -> Iterator[Any]:
    """`pipe` with its transformer's calls through the runner, for one request of `steps` steps.

    pipe: a diffusers pipeline with `transformer` and `scheduler`, called inside with as many
    `num_inference_steps`. Its transformer is put back at the end. OptionError for a pipeline without these,
    with a second transformer, or a number of steps below 1.
    """
    module, scheduler = getattr(pipe, "transformer", None), getattr(pipe, "scheduler", None)
    if module is None or scheduler is None:
        raise OptionError(f"{type(pipe).__name__} has no transformer and scheduler to drive")
    if getattr(pipe, "transformer_2", None) is not None:
        raise OptionError(
            f"{type(pipe).__name__} has a second transformer", remedy="drive a pipeline that has one"
        )
    if steps < 1:
        raise OptionError(f"steps = {steps}: expected 1 or more")
    scheduler.set_timesteps(steps)
    with runner.request(request, [float(t) for t in scheduler.timesteps]):
        pipe.transformer = _Driven(module, runner)
        try:
            yield pipe
        finally:
            pipe.transformer = module
