"""When a diffusion model's blocks are computed and when their last residual is added again.

State is keyed by (request, branch, gate) and written at the end of a call that went well: requests that take
turns never see each other, and a call that raises leaves everything as it was.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tilewright.runtime.contracts import REUSE, STATE


class StepReuseError(Exception):
    """A policy that cannot be, a step that goes backwards, or a request that does not run."""


@dataclass
class Lane:
    """What one gate of one request and branch remembers."""

    residual: Tensor | None = None
    beside: dict[int, Tensor] = field(default_factory=dict)
    """Residuals of the other streams of coupled blocks, by number from 1."""
    measured: Tensor | None = None
    """Of the last computed step."""
    probe: Tensor | None = None
    computed: int = -1
    """The last step that was computed; -1 for none."""
    rate: int = 1
    drift: float = 0.0
    motion: float | None = None


class Policy(Protocol):
    """Decides from what a lane remembers; may change the lane."""

    keeps: ClassVar[str]
    """What a lane remembers besides the residual: `probe` or `measured`."""

    def reuse(self, lane: Lane, step: int, steps: int, probe: Tensor) -> bool:
        """Whether this step reuses the residual; a lane without one is never asked."""

    def computed(self, lane: Lane, step: int, steps: int, probe: Tensor, measured: Tensor) -> None:
        """A step was computed; `lane` is still that of the step before."""


def relative_change(new: Tensor, old: Tensor) -> float:
    """L1 norm of the difference over that of `old`, of the sample of the batch where it is greatest."""
    pairs = zip(_sizes(new - old), _sizes(old), strict=True)
    shares = [change / size if size > 0.0 else math.inf for change, size in pairs]
    return max(math.inf if math.isnan(share) else share for share in shares)


_FEW = 1 << 16
"""Elements up to which a sum in float32 is off by less than 2e-5 of itself."""


def _sizes(x: Tensor) -> list[float]:
    """L1 norm of each sample. In few calls: at decode's sizes one costs more than what it computes."""
    if x.shape[0] == 1 and x.numel() <= _FEW:
        short = None if x.dtype in (torch.float32, torch.float64) else torch.float32
        return [float(torch.linalg.vector_norm(x, 1, dtype=short))]
    sums: list[float] = torch.linalg.vector_norm(x, 1, tuple(range(1, x.dim())), dtype=torch.float64).tolist()
    return sums


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

    def reuse(self, lane: Lane, step: int, steps: int, probe: Tensor) -> bool:
        return step < min(lane.computed + lane.rate, steps - 2)

    def computed(self, lane: Lane, step: int, steps: int, probe: Tensor, measured: Tensor) -> None:
        if lane.measured is None:
            return
        gap = step - lane.computed
        change = relative_change(measured, lane.measured) / gap
        if self.frames > 1 and self.window[0] * steps <= step < self.window[1] * steps:
            motion = (_motion(measured, self.frames) / self.norm) ** self.power
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
    (highest power first), stays below the threshold. The first and the last step are computed."""

    keeps: ClassVar[str] = "probe"
    threshold: float
    coefficients: tuple[float, ...] = (1.0, 0.0)

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def reuse(self, lane: Lane, step: int, steps: int, probe: Tensor) -> bool:
        if step >= steps - 1 or lane.probe is None:
            return False
        change, scaled = relative_change(probe, lane.probe), 0.0
        for c in self.coefficients:
            scaled = scaled * change + c
        lane.drift += max(0.0, scaled)
        lane.probe = probe
        return lane.drift < self.threshold

    def computed(self, lane: Lane, step: int, steps: int, probe: Tensor, measured: Tensor) -> None:
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

    def reuse(self, lane: Lane, step: int, steps: int, probe: Tensor) -> bool:
        if step < self.warmup or lane.probe is None or (self.longest and step - lane.computed > self.longest):
            return False
        return relative_change(probe, lane.probe) < self.threshold

    def computed(self, lane: Lane, step: int, steps: int, probe: Tensor, measured: Tensor) -> None:
        """The probe of a computed step is kept for every policy."""


def _check_threshold(value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise StepReuseError(f"threshold = {value}: expected 0 (never reuse) or more")


@dataclass
class _Request:
    steps: int
    lanes: dict[tuple[str, int], Lane] = field(default_factory=dict)
    latest: dict[str, int] = field(default_factory=dict)
    """Branch -> the step of its latest call."""
    active: set[str] = field(default_factory=set)
    computed: int = 0
    reused: int = 0


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
            held = self._running(request)
            del self._requests[request]
            return held.computed, held.reused

    def counts(self, request: str) -> tuple[int, int]:
        """(gates computed, gates reused) of a request so far."""
        with self._lock:
            held = self._running(request)
            return held.computed, held.reused

    @contextmanager
    def call(self, request: str, branch: str, step: int) -> Iterator[None]:
        """Programs that run inside decide for this request, branch and step (from 0)."""
        with self._lock:
            held = self._running(request)
            latest = held.latest.get(branch, -1)
            if not 0 <= step < held.steps or step < latest:
                raise StepReuseError(
                    f"request {request!r}, branch {branch!r}: step {step} of {held.steps} after step {latest}"
                )
            if branch in held.active:
                raise StepReuseError(f"request {request!r}, branch {branch!r} is in a call already")
            held.active.add(branch)
        access = _Access(self.policy, held, branch, step, again=step == latest)
        token = REUSE.set(access)
        try:
            yield
            with self._lock:
                access.commit()
                held.latest[branch] = step
        finally:
            REUSE.reset(token)
            with self._lock:
                held.active.discard(branch)

    def bytes(self) -> int:
        """What all running requests hold."""
        with self._lock:
            lanes = [lane for r in self._requests.values() for lane in r.lanes.values()]
        tensors: Sequence[Any] = [
            t for lane in lanes for t in (lane.residual, lane.measured, lane.probe, *lane.beside.values())
        ]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _running(self, request: str) -> _Request:
        if request not in self._requests:
            raise StepReuseError(f"request {request!r} has not begun, or has ended")
        return self._requests[request]


class _Access:
    """One call; changes are made on copies of the lanes until `commit`."""

    def __init__(self, policy: Policy, held: _Request, branch: str, step: int, again: bool) -> None:
        self._policy, self._held, self._branch, self._step = policy, held, branch, step
        self._again = again
        """A second evaluation of one step (Heun): computed, and nothing is learnt from it."""
        self._lanes: dict[int, Lane] = {}
        self._reused: dict[int, bool] = {}
        self._probes: dict[int, Tensor] = {}
        self._inside = False
        """Between the begin and the end of a gate that reuses."""

    def decide(self, gate: int, entry: Tensor, probe: Tensor) -> bool:
        lane = replace(self._held.lanes.get((self._branch, gate), Lane()))
        kept = lane.residual
        fits = kept is not None and (kept.shape, kept.dtype, kept.device) == (
            entry.shape, entry.dtype, entry.device,
        )  # fmt: skip
        if kept is not None and not fits:
            lane = Lane()
        # What is kept is copied: a compiled program may use the memory again.
        kept_probe = probe.detach().clone() if self._policy.keeps == "probe" else probe
        self._lanes[gate], self._probes[gate] = lane, kept_probe
        reuse = fits and not self._again
        self._reused[gate] = reuse and self._policy.reuse(
            lane, self._step, self._held.steps, self._probes[gate]
        )
        self._inside, state = self._reused[gate], STATE.get()
        if self._inside and state is not None:
            state.left_out()
        return self._reused[gate]

    def reuses(self, gate: int) -> bool:
        return self._reused.get(gate, False)

    def leaves_out(self) -> bool:
        return self._inside

    def residual(self, gate: int) -> Tensor:
        self._inside = False  # asked at the end of the stretch
        kept = self._lanes[gate].residual
        if kept is None:
            raise StepReuseError(f"gate {gate} holds no residual")
        return kept

    def keep(self, gate: int, residual: Tensor, measured: Tensor) -> None:
        if self._again:
            return
        lane, probe = self._lanes[gate], self._probes[gate]
        self._policy.computed(lane, self._step, self._held.steps, probe, measured)
        lane.residual, lane.computed = residual.detach(), self._step
        if self._policy.keeps == "probe":
            lane.probe = probe
        else:
            lane.measured = measured.detach().clone()

    def residual_beside(self, gate: int, stream: int, entry: Tensor) -> Tensor:
        kept = self._lanes[gate].beside.get(stream)
        if kept is None or kept.shape != entry.shape:
            shown = None if kept is None else list(kept.shape)
            raise StepReuseError(
                f"gate {gate}, stream {stream} of {list(entry.shape)} with a kept residual of {shown}: a "
                "request keeps its sizes"
            )
        return kept

    def keep_beside(self, gate: int, stream: int, residual: Tensor) -> None:
        if not self._again:
            lane = self._lanes[gate]
            lane.beside = {**lane.beside, stream: residual.detach()}

    def commit(self) -> None:
        """Write what this call changed."""
        if self._again:
            return
        for gate, lane in self._lanes.items():
            self._held.lanes[self._branch, gate] = lane
        self._held.reused += sum(self._reused.values())
        self._held.computed += len(self._reused) - sum(self._reused.values())


FAST_30 = Codebook(((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (math.inf, 1)))
SLOW_30 = Codebook(((0.08, 3), (0.16, 2), (math.inf, 1)))
"""AdaCache's published codebooks for 30 steps."""
