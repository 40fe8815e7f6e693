"""When a diffusion model's blocks are computed and when their last residual is added again.

State is keyed by (request, branch, gate) and written at the end of a call that went well: requests that take
turns never see each other, and a call that raises leaves everything as it was.
"""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tilewright.runtime.contracts import REUSE, STATE, Measure
from tilewright.runtime.step_probe import Kept, fits, room_for


class StepReuseError(Exception):
    """A policy that cannot be, a step that goes backwards, or a request that does not run."""


@dataclass(frozen=True, slots=True)
class Residual:
    """What a stretch added to its entry when it was last computed."""

    tensor: Tensor
    spare: Tensor | None
    """Memory for the next one, that of the one before: fresh pages cost more than the difference. Only on the
    CPU: allocators of other devices keep what is freed."""

    @classmethod
    def of(cls, exit: Tensor, entry: Tensor, before: Residual | None) -> Residual:
        """exit - entry; `before` stays as it is, and is the last that does."""
        exit, entry = exit.detach(), entry.detach()
        if not exit.is_cpu:
            return cls(exit - entry, None)
        same = before is not None and fits(before.tensor, exit)
        room = before.spare if same and before is not None else None
        tensor = torch.sub(exit, entry, out=room_for(exit) if room is None else room)
        return cls(tensor, before.tensor if same and before is not None else None)

    def bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (self.tensor, self.spare) if t is not None)


@dataclass
class Lane:
    """What one gate of one request and branch remembers."""

    residual: Residual | None = None
    beside: dict[int, Residual] = field(default_factory=dict)
    """Residuals of the other streams of coupled blocks, by number from 1."""
    seen: Kept | None = None
    """What its policy keeps."""
    computed: int = -1
    """The last step that was computed; -1 for none."""
    rate: int = 1
    drift: float = 0.0
    motion: float | None = None

    def copy(self) -> Lane:
        """Another lane that remembers the same."""
        found = object.__new__(Lane)
        found.__dict__.update(self.__dict__)  # an eighth of what `replace` takes
        return found


class Policy(Protocol):
    """Decides from what a lane remembers; may change the lane."""

    keeps: ClassVar[str]
    """What a lane remembers besides the residual, as `seen`: the `probe`, or what was `measured` behind the
    stretch at the last computed step."""

    def reuse(self, lane: Lane, step: int, steps: int, seen: Kept | None) -> bool:
        """Whether this step reuses the residual; a lane without one is never asked. seen: the probe of this
        step, None for a policy that keeps what is measured."""

    def computed(self, lane: Lane, step: int, steps: int, seen: Kept, residual: Tensor) -> None:
        """A step was computed, `seen` and `residual` will be kept; `lane` is that of the step before."""


@dataclass(frozen=True)
class Codebook:
    """AdaCache (arXiv:2411.02397): the less a block's residual changed, the more steps are left out.

    rates: (threshold, rate) ascending; the first entry above the change per step says how many steps on the
    next is computed; changes above all take the last. frames > 0 adds motion regularisation: the measured
    residual [B, frames * tokens, C] is compared with itself a frame on, between the shares of `window`.
    """

    keeps: ClassVar[str] = "measured"
    rates: tuple[tuple[float, int], ...]
    frames: int = 0
    window: tuple[float, float] = (0.1, 0.9)
    norm: float = 0.385
    power: float = 8.0
    gradient: float = 10.0

    def __post_init__(self) -> None:
        thresholds, rates = [t for t, _ in self.rates], [r for _, r in self.rates]
        if not rates or thresholds != sorted(set(thresholds)) or thresholds[0] <= 0.0:
            raise StepReuseError(f"codebook {self.rates}: expected ascending thresholds above 0")
        if any(r < 1 for r in rates) or rates != sorted(rates, reverse=True):
            raise StepReuseError(f"codebook {self.rates}: expected falling rates of at least 1")

    def reuse(self, lane: Lane, step: int, steps: int, seen: Kept | None) -> bool:
        return step < min(lane.computed + lane.rate, steps - 2)

    def computed(self, lane: Lane, step: int, steps: int, seen: Kept, residual: Tensor) -> None:
        if lane.seen is None:
            return
        gap = step - lane.computed
        change = seen.change / gap
        if self.frames > 1 and self.window[0] * steps <= step < self.window[1] * steps:
            motion = (_motion(seen.tensor, self.frames) / self.norm) ** self.power
            before = motion if lane.motion is None else lane.motion
            change *= motion + abs(self.gradient * (motion - before) / gap)
            lane.motion = motion
        lane.rate = next((rate for bound, rate in self.rates if change < bound), self.rates[-1][1])
        if not math.isfinite(change):
            lane.rate = 1


def _motion(residual: Tensor, frames: int) -> float:
    if residual.shape[1] % frames:
        raise StepReuseError(f"{residual.shape[1]} tokens are not {frames} frames")
    x = residual.double().unflatten(1, (frames, -1))
    ahead, here = x[:, 1:], x[:, :-1]
    return float((ahead - here).abs().sum() / (ahead.abs().sum() + here.abs().sum()))


@dataclass(frozen=True)
class Accumulated:
    """TeaCache (arXiv:2411.19108): reuse while the summed change of the probe, rescaled by a polynomial
    (highest power first), stays below the threshold. The first and the last step are computed.

    The polynomial is one model's: `runtime.step_fit.Recorded` fits it. limits: the changes it was fitted to;
    beyond, where it may be anything, a change counts as the nearer of them.
    """

    keeps: ClassVar[str] = "probe"
    threshold: float
    coefficients: tuple[float, ...] = (1.0, 0.0)
    limits: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def reuse(self, lane: Lane, step: int, steps: int, seen: Kept | None) -> bool:
        if step >= steps - 1 or seen is None or lane.seen is None:
            return False
        change, scaled = min(max(seen.change, self.limits[0]), self.limits[1]), 0.0
        for c in self.coefficients:
            scaled = scaled * change + c
        lane.drift += max(0.0, scaled) if math.isfinite(seen.change) else math.inf
        lane.seen = seen
        return lane.drift < self.threshold

    def computed(self, lane: Lane, step: int, steps: int, seen: Kept, residual: Tensor) -> None:
        lane.drift = 0.0


@dataclass(frozen=True)
class FirstBlock:
    """First-block cache: reuse while the probe, the first blocks' residual, is close to that of the last
    computed step. At most `longest` steps in a row are left out (0: no limit)."""

    keeps: ClassVar[str] = "probe"
    threshold: float
    warmup: int = 0
    longest: int = 0

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def reuse(self, lane: Lane, step: int, steps: int, seen: Kept | None) -> bool:
        if step < self.warmup or (self.longest and step - lane.computed > self.longest):
            return False
        return seen is not None and seen.change < self.threshold

    def computed(self, lane: Lane, step: int, steps: int, seen: Kept, residual: Tensor) -> None:
        """The probe of a computed step is kept for every policy."""


def _check_threshold(value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise StepReuseError(f"threshold = {value}: expected 0 (never reuse) or more")


@dataclass(slots=True)
class _Branch:
    """What a request remembers of one branch of guidance."""

    lanes: dict[int, Lane] = field(default_factory=dict)
    latest: int = -1
    """The step of its latest call."""
    busy: threading.Lock = field(default_factory=threading.Lock)
    """Held by the call that runs: there is one at a time."""
    computed: int = 0
    reused: int = 0


@dataclass(slots=True)
class _Request:
    steps: int
    branches: dict[str, _Branch] = field(default_factory=dict)

    def counts(self) -> tuple[int, int]:
        branches = list(self.branches.values())
        return sum(b.computed for b in branches), sum(b.reused for b in branches)


class StepReuse:
    """The lanes of all running requests under one policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._requests: dict[str, _Request] = {}
        self._lock = threading.Lock()

    def begin(self, request: str, steps: int) -> None:
        """Start a request of `steps` steps."""
        with self._lock:
            if request in self._requests or steps < 1:
                raise StepReuseError(f"request {request!r} of {steps} steps: it runs already, or has no step")
            self._requests[request] = _Request(steps)

    def end(self, request: str) -> tuple[int, int]:
        """Drop all a request holds; (gates computed, gates reused)."""
        with self._lock:
            held = self.running(request)
            del self._requests[request]
            return held.counts()

    def forget(self, request: str) -> None:
        """Drop all residuals of a request that goes on; its counts and latest steps stay."""
        for branch in list(self.running(request).branches.values()):
            branch.lanes = {}

    def counts(self, request: str) -> tuple[int, int]:
        """(gates computed, gates reused) of a request so far."""
        return self.running(request).counts()

    def call(self, request: str, branch: str, step: int) -> AbstractContextManager[None]:
        """Programs that run inside decide for this request, branch and step (from 0)."""
        return _Access(self, request, branch, step)

    def bytes(self) -> int:
        """What all running requests hold."""
        with self._lock:
            branches = [b for r in self._requests.values() for b in list(r.branches.values())]
        lanes = [lane for branch in branches for lane in list(branch.lanes.values())]
        held = [x for lane in lanes for x in (lane.residual, lane.seen, *lane.beside.values())]
        return sum(x.bytes() for x in held if x is not None)

    def running(self, request: str) -> _Request:
        """A request between its begin and its end; StepReuseError for any other."""
        found = self._requests.get(request)
        if found is None:
            raise StepReuseError(f"request {request!r} has not begun, or has ended")
        return found


@dataclass(slots=True)
class _Gate:
    """A gate in one call."""

    lane: Lane
    seen: Kept | None
    reuses: bool


class _Access:
    """One call, from enter to exit; changes are made on copies of the lanes and written by a good exit."""

    __slots__ = (
        "_again", "_branch", "_gates", "_inside", "_owner", "_place", "_policy", "_probes", "_step", "_steps",
        "_token",
    )  # fmt: skip

    def __init__(self, owner: StepReuse, request: str, branch: str, step: int) -> None:
        self._owner, self._place, self._step = owner, (request, branch), step

    def __enter__(self) -> None:
        (request, name), step, owner = self._place, self._step, self._owner
        held = owner.running(request)
        branch = held.branches.get(name)
        if branch is None:
            branch = held.branches.setdefault(name, _Branch())
        if not branch.busy.acquire(blocking=False):
            raise StepReuseError(f"request {request!r}, branch {name!r} is in a call already")
        latest = branch.latest
        if not latest <= step < held.steps or step < 0:
            branch.busy.release()
            raise StepReuseError(
                f"request {request!r}, branch {name!r}: step {step} of {held.steps} after step {latest}"
            )
        self._branch, self._steps, self._policy = branch, held.steps, owner.policy
        self._probes = owner.policy.keeps == "probe"
        self._again = step == latest
        """A second evaluation of one step (Heun): computed, and nothing is learnt from it."""
        self._gates: dict[int, _Gate] = {}
        self._inside = False
        """Between the begin and the end of a gate that reuses."""
        self._token = REUSE.set(self)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        REUSE.reset(self._token)
        branch = self._branch
        if failed is None and not self._again:
            for number, gate in self._gates.items():
                branch.lanes[number] = gate.lane
                if gate.reuses:
                    branch.reused += 1
                else:
                    branch.computed += 1
            branch.latest = self._step
        branch.busy.release()

    def decide(self, gate: int, entry: Tensor, probe: Tensor, measure: Measure) -> bool:
        before = self._branch.lanes.get(gate)
        kept = None if before is None else before.residual
        known = kept is not None and fits(kept.tensor, entry)
        lane = Lane() if before is None or not known else before.copy()
        # What is kept is copied: a compiled program may use the memory again.
        seen = Kept(probe, lane.seen, measure) if self._probes else None
        reuses = known and not self._again and self._policy.reuse(lane, self._step, self._steps, seen)
        self._gates[gate] = _Gate(lane, seen, reuses)
        self._inside = reuses
        if reuses:
            state = STATE.get()
            if state is not None:
                state.left_out()
        return reuses

    def reuses(self, gate: int) -> bool:
        found = self._gates.get(gate)
        return found is not None and found.reuses

    def leaves_out(self) -> bool:
        return self._inside

    def residual(self, gate: int) -> Tensor:
        self._inside = False  # asked at the end of the stretch
        kept = self._gates[gate].lane.residual
        if kept is None:
            raise StepReuseError(f"gate {gate} holds no residual")
        return kept.tensor

    def keep(self, gate: int, exit: Tensor, entry: Tensor, measured: Tensor, measure: Measure) -> None:
        if self._again:
            return
        lane, seen = self._gates[gate].lane, self._gates[gate].seen
        seen = seen or Kept(measured, lane.seen, measure)
        residual = Residual.of(exit, entry, lane.residual)
        self._policy.computed(lane, self._step, self._steps, seen, residual.tensor)
        lane.residual, lane.computed, lane.seen = residual, self._step, seen

    def residual_beside(self, gate: int, stream: int, entry: Tensor) -> Tensor:
        kept = self._gates[gate].lane.beside.get(stream)
        if kept is None or kept.tensor.shape != entry.shape:
            shown = None if kept is None else list(kept.tensor.shape)
            raise StepReuseError(
                f"gate {gate}, stream {stream} of {list(entry.shape)} with a kept residual of {shown}: a "
                "request keeps its sizes"
            )
        return kept.tensor

    def keep_beside(self, gate: int, stream: int, exit: Tensor, entry: Tensor) -> None:
        if not self._again:
            lane = self._gates[gate].lane
            residual = Residual.of(exit, entry, lane.beside.get(stream))
            lane.beside = {**lane.beside, stream: residual}


FAST_30 = Codebook(((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (math.inf, 1)))
SLOW_30 = Codebook(((0.08, 3), (0.16, 2), (math.inf, 1)))
"""AdaCache's published codebooks for 30 steps."""
