"""How many layers a program with early exits has run: `with counting_exits() as counts: model(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tilewright.runtime.contracts import EXITS


@dataclass
class ExitCounts:
    """Sums over the calls that were counted."""

    calls: int = 0
    tokens: int = 0
    left: dict[int, int] = field(default_factory=dict)
    """Gate -> tokens that had left by then."""
    layers: dict[int, int] = field(default_factory=dict)
    """Gate -> the layers behind it, up to the next gate."""
    skipped: dict[int, int] = field(default_factory=dict)
    """Gate -> calls in which no token went on, so that its layers were not computed."""

    def reached(self, gate: int, layers: int, active: Any) -> None:
        """One call at one gate; active: bool [B, S]."""
        if gate == 0:
            self.calls += 1
            self.tokens += active.numel()
        going_on = int(active.sum())
        self.layers[gate] = layers
        self.left[gate] = self.left.get(gate, 0) + active.numel() - going_on
        self.skipped[gate] = self.skipped.get(gate, 0) + (going_on == 0)

    @property
    def layers_left_out(self) -> float:
        """Mean per token: layers that it did not go through, whether or not others of its call did."""
        total = sum(n * self.layers[gate] for gate, n in self.left.items())
        return total / self.tokens if self.tokens else 0.0

    @property
    def layers_saved(self) -> float:
        """Mean per call: layers that nobody went through."""
        total = sum(n * self.layers[gate] for gate, n in self.skipped.items())
        return total / self.calls if self.calls else 0.0


@contextmanager
def counting_exits() -> Iterator[ExitCounts]:
    """Count the calls made inside, in this thread."""
    counts = ExitCounts()
    token = EXITS.set(counts)
    try:
        yield counts
    finally:
        EXITS.reset(token)
