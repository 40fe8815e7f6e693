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
        self._at, self._steps = -1, 0

    @property
    def step(self) -> int:
        """The step of the present or last call; -1 before the first."""
        return self._at

    @property
    def steps(self) -> int:
        """The number of steps of the present or last request; 0 before the first."""
        return self._steps

    @contextmanager
    def request(self, name: str, timesteps: Sequence[float]) -> Iterator[StepRunner]:
        """Run a request with these timesteps, none above the last; all it held is dropped at the end."""
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
            self._request, self._clock, self._steps = name, clock, len(clock.timesteps)
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

    def forget(self) -> None:
        """Drop what the running request kept so far: its next call computes, and collects where it should.

        OptionError outside of a request.
        """
        if self._clock is None:
            raise OptionError("no request runs", remedy="forget while `runner.request(name, timesteps)` runs")
        if self._reuse is not None:
            self._reuse.forget(self._request)
        if self._state is not None:
            self._state.forget(self._request)

    def shares_with(self, other: StepRunner) -> bool:
        """Whether both keep what they keep in one place."""
        reuse, state = self._reuse is not None, self._state is not None
        return (reuse and self._reuse is other._reuse) or (state and self._state is other._state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call; OptionError outside of a request or without a timestep argument."""
        if self._clock is None:
            raise OptionError("no request runs", remedy="call inside `with runner.request(name, timesteps):`")
        if self._timestep not in kwargs:
            raise OptionError(f"the call has no argument {self._timestep!r}", remedy="pass it by name")
        value = kwargs[self._timestep]
        # Tokens that are given (a first frame) may have a timestep of their own, 0: the noisiest tell.
        time = float(value.max()) if hasattr(value, "max") else float(value)
        step = self._clock.step(time, self._branch) if self._told is None else self._told
        self._at = step
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
    """Stands for a transformer of a pipeline: its calls and branches go to a runner, the rest to it."""

    def __init__(self, module: Any, runner: StepRunner, others: Sequence[StepRunner]) -> None:
        self._module, self._runner, self._others = module, runner, others

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for other in self._others:  # its turn is over, and what it kept would be old if it came back
            other.forget()
        return self._runner(*args, **kwargs)

    def cache_context(self, name: str, **told: Any) -> Any:
        return self._runner.branch(name, **told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def driven(
    pipe: Any, runner: StepRunner, *, request: str, steps: int, second: StepRunner | None = None
) -> Iterator[Any]:
    """`pipe` with its transformers' calls through runners, for one request of `steps` steps.

    pipe: a diffusers pipeline with `transformer` and `scheduler`, called inside with as many
    `num_inference_steps`. second: the runner of `transformer_2`, for a pipeline of two experts (Wan2.2's for
    high and low noise), with a StepReuse and a StepState of its own. Steps are the sampler's for both; where
    one takes over, what the other kept is dropped, and its first step is computed. The transformers are put
    back at the end. OptionError for a pipeline without `transformer` and `scheduler`, runners that are not as
    many as its transformers or keep state in one place, or a number of steps below 1.
    """
    scheduler = getattr(pipe, "scheduler", None)
    modules = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    if modules["transformer"] is None or scheduler is None:
        raise OptionError(f"{type(pipe).__name__} has no transformer and scheduler to drive")
    runners = _runners(type(pipe).__name__, modules, runner, second)
    if steps < 1:
        raise OptionError(f"steps = {steps}: expected 1 or more")
    scheduler.set_timesteps(steps)
    with ExitStack() as stack:
        for name, one in runners.items():
            stack.enter_context(one.request(request, [float(t) for t in scheduler.timesteps]))
            stack.callback(setattr, pipe, name, modules[name])
        for name, one in runners.items():
            others = [other for other in runners.values() if other is not one]
            setattr(pipe, name, _Driven(modules[name], one, others))
        yield pipe


def _runners(
    pipe: str, modules: dict[str, Any], first: StepRunner, second: StepRunner | None
) -> dict[str, StepRunner]:
    """The runner of each transformer that there is."""
    if (modules["transformer_2"] is None) != (second is None):
        found, remedy = (
            ("has one transformer, and second is given", "leave it out")
            if modules["transformer_2"] is None
            else ("has a second transformer", "give second=StepRunner(...) for its transformer_2")
        )
        raise OptionError(f"{pipe} {found}", remedy=remedy)
    if second is None:
        return {"transformer": first}
    if second is first or second.shares_with(first):
        raise OptionError(
            "both transformers would keep their state in one place",
            remedy="give each a StepRunner with a StepReuse and a StepState of its own",
        )
    return {"transformer": first, "transformer_2": second}
