"""State between the denoising steps of a request, and the phase a layer is in at a step.

Everything here runs outside compiled code: the caller asks for the phase of a step, calls the program
compiled for it, and hands state in and out as plain tensors. State is keyed by (request, branch, layer), so
two requests that take turns never see each other's, nor do the two branches of classifier-free guidance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch

from tilewright.runtime.contracts import REUSE, STATE

Key = tuple[str, str, int]
"""(request, guidance branch, layer)."""


AGE = "age"
"""A slot that every layer has: `StepState.age` as int32 [1]."""
_SAME = 1e-5
"""Timesteps that differ by less than this share of the first are one: a solver's midpoint may be an end."""
_THOUSAND = 1000.0
"""Some models count time in parts of this."""
_NEAR = 2.0**-8
"""Two timesteps are the same but for rounding to bfloat16."""


class StepStateError(Exception):
    """State was asked for that does not exist, or a step that the request's schedule does not hold."""


class Phase(Enum):
    """What a layer does at one step."""

    DENSE = "dense"
    SEARCH = "search"
    """Dense, and collects what later steps attend."""
    SPARSE = "sparse"
    REFRESH = "refresh"
    """Dense and sparse, and collects the difference."""


@dataclass(frozen=True)
class Schedule:
    """The phase of every step of a request: `dense` steps first, then by the kind of system."""

    dense: int = 0
    searches: tuple[int, ...] = ()
    """Steps that search; every one is at or after the dense prefix."""
    period: int = 0
    """The first step after the prefix refreshes, and those that are multiples of it; 0 never, 1 always."""

    def __post_init__(self) -> None:
        if self.dense < 0 or self.period < 0:
            raise StepStateError(f"dense = {self.dense}, period = {self.period}: expected 0 or more")
        if self.searches and self.period:
            raise StepStateError("a schedule either searches or refreshes")
        if list(self.searches) != sorted(set(self.searches)) or any(s < self.dense for s in self.searches):
            raise StepStateError(
                f"searches = {self.searches}: expected ascending steps from {self.dense}, the dense prefix"
            )
        if self.searches and self.searches[0] != self.dense:
            raise StepStateError(
                f"searches = {self.searches}: steps {self.dense} to {self.searches[0] - 1} would attend "
                "a layout that is not found yet"
            )

    def phase(self, step: int) -> Phase:
        """The phase at a step, counted from 0."""
        if step < 0:
            raise StepStateError(f"step = {step}: expected 0 or more")
        if step < self.dense:
            return Phase.DENSE
        if step in self.searches:
            return Phase.SEARCH
        if self.period and (step == self.dense or step % self.period == 0):
            return Phase.REFRESH
        return Phase.SPARSE

    def since_collected(self, step: int) -> int:
        """Steps since the last search or refresh at or before `step`; -1 where there was none."""
        for back in range(step + 1):
            if self.phase(step - back) in (Phase.SEARCH, Phase.REFRESH):
                return back
        return -1


def prefix_steps(fraction: float, steps: int) -> int:
    """How many steps a dense share of a request is: floored, as the published scripts do."""
    if not 0.0 <= fraction <= 1.0 or steps < 1:
        raise StepStateError(f"fraction = {fraction}, steps = {steps}: expected 0..1 and at least 1")
    return int(fraction * steps)


class StepClock:
    """Which step of a request a call belongs to, by its timestep value: robust against two calls a step.

    Where several steps of the list have one timestep (second-order samplers evaluate both ends of an
    interval, long lists are rounded to integers), the calls of each branch of guidance are counted.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        """timesteps: of the request's steps, falling or equal; StepStateError for others."""
        values = [float(t) for t in timesteps]
        if not values or not all(a >= b for a, b in zip(values, values[1:], strict=False)):
            raise StepStateError(f"timesteps = {values[:4]}...: expected at least one, none above the last")
        self.timesteps = values
        self._unit: float | None = None
        """What a call's timestep is multiplied with; known from the first call on."""
        self._turns: dict[str, _Turn] = {}
        self._firsts = [0]
        """For each step, the first step of those with its timestep."""
        for i in range(1, len(values)):
            same = values[i - 1] - values[i] <= _SAME * abs(values[0])
            self._firsts.append(self._firsts[-1] if same else i)

    def step(self, timestep: float, branch: str = "") -> int:
        """The step whose timestep is nearest to the given one and within half a unit.

        A sampler may evaluate between two timesteps of its list: that belongs to the earlier one. Of several
        steps with one timestep, a branch's first calls belong to the first, as many as it made for each step
        of the timestep before (1 at the start), and so on. A model that is given thousandths of the list's
        timesteps is known by its first call; then the two may also differ by a rounding to bfloat16.
        StepStateError for a timestep before the first, and for more calls than those steps take.
        """
        if self._unit is None:
            self._unit = self._find_unit(timestep)
        first, steps = self._run(timestep * self._unit)
        turn = self._turns.get(branch, _Turn(first, steps))
        if first != turn.first:
            turn = _Turn(first, steps, max(1, turn.calls // turn.steps))
        self._turns[branch] = turn
        turn.calls += 1
        if steps > 1 and turn.calls > steps * turn.each:
            raise StepStateError(
                f"call {turn.calls} of branch {branch!r} at timestep {timestep}: {steps} steps have it, of "
                f"{turn.each} calls each"
            )
        return first + (turn.calls - 1) // turn.each if steps > 1 else first

    def _find_unit(self, timestep: float) -> float:
        """1000 for a call whose timestep is a thousandth of one of the list, 1 for others."""
        known, whole = self.timesteps, _THOUSAND * timestep

        def among(value: float) -> bool:
            return any(abs(t - value) <= _NEAR * t for t in known)

        begins = abs(known[0] - timestep) > 0.5 and abs(known[0] - whole) <= _NEAR * known[0]
        return _THOUSAND if begins or (timestep <= 1.0 and among(whole) and not among(timestep)) else 1.0

    def _run(self, timestep: float) -> tuple[int, int]:
        """(first step, number of steps) with the timestep that a call's value stands for."""
        off = [abs(t - timestep) for t in self.timesteps]
        at = off.index(min(off))
        near = 0.5 if self._unit == 1.0 else max(0.5, _NEAR * timestep)
        if off[at] <= near:
            return self._firsts[at], self._firsts.count(self._firsts[at])
        above = sum(t >= timestep for t in self.timesteps)
        if not above:
            raise StepStateError(
                f"timestep {timestep} lies before the first of this request, {self.timesteps[0]}"
            )
        return above - 1, 1


@dataclass
class _Turn:
    """The calls of one branch at one timestep so far."""

    first: int
    steps: int
    """Steps that have this timestep, from `first` on."""
    each: int = 1
    """Calls of one step."""
    calls: int = 0


@dataclass
class _Request:
    clock: StepClock
    slots: dict[tuple[str, int, str], torch.Tensor]
    collected: dict[tuple[str, int], int]
    """(branch, layer) -> the step at which its slots were filled."""
    ran: dict[str, list[int]]
    """branch -> the steps that were run since its slots were filled, that one first."""
    missed: dict[str, set[int]]
    """branch -> the steps that left out a stretch of layers."""


class StepState:
    """Tensors by (request, branch, layer, slot name), from `begin` to `end` of a request."""

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        """Bytes that all requests together may hold; None for no limit."""
        self._requests: dict[str, _Request] = {}
        self._lock = threading.Lock()

    def begin(self, request: str, timesteps: Sequence[float]) -> None:
        """Start a request with the timesteps it will run; StepStateError when it runs already."""
        with self._lock:
            if request in self._requests:
                raise StepStateError(f"request {request!r} runs already; end it first")
            self._requests[request] = _Request(StepClock(timesteps), {}, {}, {}, {})

    def end(self, request: str) -> None:
        """Drop everything a request holds."""
        with self._lock:
            self._running(request)
            del self._requests[request]

    def forget(self, request: str) -> None:
        """Drop all slots of a request that goes on: a step that needs them collects first."""
        with self._lock:
            clock = self._running(request).clock
            self._requests[request] = _Request(clock, {}, {}, {}, {})

    def step(self, request: str, timestep: float) -> int:
        """The step that a timestep value belongs to."""
        with self._lock:
            return self._running(request).clock.step(timestep)

    def phase(self, schedule: Schedule, request: str, branch: str, step: int) -> Phase:
        """The schedule's phase, or SEARCH / REFRESH where a step that should have collected was skipped, or
        left out a stretch of layers.

        A cached step that jumps over a refresh thus postpones it instead of losing it.
        """
        phase = schedule.phase(step)
        back = schedule.since_collected(step) if phase is Phase.SPARSE else -1
        if back < 0:
            return phase
        with self._lock:
            held = self._running(request)
            last = max((s for (name, _), s in held.collected.items() if name == branch), default=-1)
            whole = last not in held.missed.get(branch, ())
        return phase if last >= step - back and whole else schedule.phase(step - back)

    @contextmanager
    def call(self, request: str, branch: str, step: int) -> Iterator[None]:
        """Programs that run inside reach the state of this request and branch, as of this step."""
        with self._lock:
            self._running(request)
        token = STATE.set(_Access(self, request, branch, step))
        try:
            yield
        finally:
            STATE.reset(token)

    def put(self, key: Key, step: int, values: Mapping[str, torch.Tensor]) -> None:
        """Replace all slots of a key with those collected at a step; StepStateError beyond the capacity."""
        request, branch, layer = key
        with self._lock:
            held = self._running(request)
            kept = {k: v for k, v in held.slots.items() if k[:2] != (branch, layer)}
            kept.update({(branch, layer, name): value.detach() for name, value in values.items()})
            others = sum(_bytes(r.slots) for name, r in self._requests.items() if name != request)
            if self._capacity is not None and others + _bytes(kept) > self._capacity:
                raise StepStateError(
                    f"state of {others + _bytes(kept)} bytes, the capacity is {self._capacity}: "
                    "run fewer requests at once, or fewer layers with state"
                )
            held.slots, held.collected[branch, layer] = kept, step
            held.ran[branch] = [step]

    def get(self, key: Key, slot: str) -> torch.Tensor:
        """A slot's tensor; StepStateError where nothing was collected for it."""
        request, branch, layer = key
        with self._lock:
            slots = self._running(request).slots
            if (branch, layer, slot) not in slots:
                raise StepStateError(
                    f"request {request!r}, branch {branch!r}, layer {layer} holds no {slot!r}: "
                    "no search or refresh step ran for it"
                )
            return slots[branch, layer, slot]

    def read(self, request: str, branch: str, step: int) -> None:
        """A layer reads its state at this step: it runs, and the step counts for the age."""
        with self._lock:
            ran = self._running(request).ran.setdefault(branch, [])
            if step not in ran:
                ran.append(step)

    def miss(self, request: str, branch: str, step: int) -> None:
        """A stretch of layers is left out at this step: should others collect, the collection has holes."""
        with self._lock:
            self._running(request).missed.setdefault(branch, set()).add(step)

    def age(self, request: str, branch: str) -> int:
        """How many steps ran between the last collection and the present one: 0 at the first sparse step.

        A step that was skipped does not count, nor does a second call of one step.
        """
        with self._lock:
            ran = self._running(request).ran.get(branch, [])
            return max(0, len(ran) - 2)

    def bytes(self) -> int:
        """What all running requests hold."""
        with self._lock:
            return sum(_bytes(r.slots) for r in self._requests.values())

    def running(self) -> list[str]:
        """The requests that have begun and not ended, oldest first."""
        with self._lock:
            return list(self._requests)

    def _running(self, request: str) -> _Request:
        if request not in self._requests:
            raise StepStateError(f"request {request!r} has not begun, or has ended")
        return self._requests[request]


@dataclass(frozen=True)
class _Access:
    """The state of one call; what `contracts.STATE` holds while it runs."""

    state: StepState
    request: str
    branch: str
    step: int

    def get(self, layer: int, slot: str) -> torch.Tensor:
        if not _unwanted():
            self.state.read(self.request, self.branch, self.step)
        if slot == AGE:
            return torch.tensor([self.state.age(self.request, self.branch)], dtype=torch.int32)
        return self.state.get((self.request, self.branch, layer), slot)

    def put(self, layer: int, values: Mapping[str, torch.Tensor]) -> None:
        if not _unwanted():
            self.state.put((self.request, self.branch, layer), self.step, values)

    def left_out(self) -> None:
        self.state.miss(self.request, self.branch, self.step)


def _unwanted() -> bool:
    """Whether the running op belongs to a stretch that is left out: without compiled pieces it runs, and must
    neither change what is kept nor count."""
    reuse = REUSE.get()
    return reuse is not None and reuse.leaves_out()


def _bytes(slots: Mapping[tuple[str, int, str], torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in slots.values())


PRESETS: dict[str, Callable[[int], Schedule]] = {
    "sta": lambda steps: Schedule(dense=prefix_steps(12 / 50, steps)),
    "svg1": lambda steps: Schedule(dense=prefix_steps(0.2, steps)),
    "rettention": lambda steps: Schedule(dense=prefix_steps(0.3, steps), period=5),
    "adaspa": lambda steps: Schedule(
        dense=prefix_steps(0.2, steps), searches=(prefix_steps(0.2, steps), prefix_steps(0.6, steps))
    ),
    "sla": lambda steps: Schedule(),
}
"""Published schedules as functions of the number of steps (counted for 50)."""
