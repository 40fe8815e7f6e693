"""Plain frozen data shared by every layer: the bottom of the import order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Refusal:
    """A reasoned "no": the one way any part of Tilewright declines to do something.

    `reason` completes the sentence "X did not apply at NODE: ..."; lower case, no full stop, values included.
    """

    reason: str
    node: str = ""
    """Name of the graph node to blame, empty when there is none."""

    def __str__(self) -> str:
        return f"{self.reason} (at {self.node})" if self.node else self.reason

    def __bool__(self) -> bool:
        raise TypeError("a Refusal has no truth value; test with `isinstance(x, Refusal)`")


@dataclass(frozen=True)
class Target:
    """What code is generated for: `kind` is cpu, cuda or hip; `arch` is avx2, avx512, sm_80, gfx942, ..."""

    kind: str
    arch: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}"


@dataclass(frozen=True)
class KernelKey:
    """Names one specialised kernel: equal keys generate equal source."""

    op: str
    """Semantic op, e.g. `add_rms_norm`."""
    target: Target
    dtype: str
    """Storage dtype of the activations: float32, bfloat16 or float16."""
    config: tuple[tuple[str, Any], ...] = field(default=())
    """Sorted (name, value) pairs that specialise the source; values are ints, bools or names from our own
    tables."""


class StateAccess(Protocol):
    """What a program reaches its state between steps through: that of one request, branch and step."""

    def get(self, layer: int, slot: str) -> Any:
        """The tensor of a slot."""

    def put(self, layer: int, values: Mapping[str, Any]) -> None:
        """Replace the slots of a layer."""

    def left_out(self) -> None:
        """A stretch of this call is not computed: what its layers would put is missing."""


class ScratchState:
    """State of one caller, without requests: for running a program once or twice in a test."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, str], Any] = {}

    def get(self, layer: int, slot: str) -> Any:
        """The value of a slot; KeyError where nothing was put."""
        return self.slots[layer, slot]

    def put(self, layer: int, values: Mapping[str, Any]) -> None:
        """Replace slots of a layer."""
        self.slots.update({(layer, slot): value for slot, value in values.items()})

    def left_out(self) -> None:
        """Nothing to remember: there are no steps."""


STATE: ContextVar[StateAccess | None] = ContextVar("tilewright_state", default=None)
"""The state of the call that is running, None outside of any request."""


Measure = Callable[[Any, Any, Any], Any]
"""What computes the op `measured_copy`: (x [B, ...], before, into) -> sums [2, B]; `into` becomes x."""


class ReuseAccess(Protocol):
    """What a program asks whether a stretch of blocks is computed at this step, and keeps its residual in."""

    def decide(self, gate: int, entry: Any, probe: Any, measure: Measure) -> bool:
        """Whether the kept residual is added instead; asked once a call, before the stretch."""

    def reuses(self, gate: int) -> bool:
        """What was decided in this call."""

    def leaves_out(self) -> bool:
        """Whether the call is between a decision to reuse and the reading of the residual: unwanted work."""

    def residual(self, gate: int) -> Any:
        """The residual of the stretch, from the last step that computed it."""

    def keep(self, gate: int, exit: Any, entry: Any, measured: Any, measure: Measure) -> None:
        """Take in exit - entry of a computed stretch, and what the next decisions may measure."""

    def residual_beside(self, gate: int, stream: int, entry: Any) -> Any:
        """The residual of another stream of the stretch, to be added to `entry`."""

    def keep_beside(self, gate: int, stream: int, exit: Any, entry: Any) -> None:
        """Take in the residual exit - entry of another stream of a computed stretch."""


REUSE: ContextVar[ReuseAccess | None] = ContextVar("tilewright_reuse", default=None)
"""Of the call that is running; None: every step is computed."""


class ExitAccess(Protocol):
    """Who counts how many layers tokens went through."""

    def reached(self, gate: int, layers: int, active: Any) -> None:
        """A call came to a stretch of so many layers; `active`: bool [B, S], the tokens that go through."""


EXITS: ContextVar[ExitAccess | None] = ContextVar("tilewright_exits", default=None)
"""Of the call that is running; None: nobody counts."""
