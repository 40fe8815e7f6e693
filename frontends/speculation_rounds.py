"""What the rounds of `speculate` work on: rows of a batch, what a call of the target gave, and its sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Stop = Callable[[list[int]], bool]
"""Whether a row ends with its latest token; given all its tokens."""


@dataclass
class Statistics:
    """What one generation took."""

    tokens: int = 0
    target_calls: int = 0
    """Without the prompt's."""
    drafted: int = 0
    accepted: int = 0
    drafting_rounds: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    """Without the prompt's."""

    @property
    def tokens_per_call(self) -> float:
        return self.tokens / self.target_calls if self.target_calls else 0.0


@dataclass
class Row:
    tokens: list[int]
    last: int
    """Length at which the row ends."""
    done: bool = False

    def take(self, new: Sequence[int], stop: Stop) -> list[int]:
        """Append up to the end of the row; returns what was appended."""
        taken = []
        for token in new:
            self.tokens.append(token)
            taken.append(token)
            if len(self.tokens) >= self.last or stop(self.tokens):
                self.done = True
                break
        return taken


@dataclass
class Round:
    """What one call of the target gave."""

    new: list[list[int]] = field(default_factory=list)
    """By row."""
    length: int = 0
    """What the target was called for, padding included; 0 for a plain step."""
    drafted: int = 0
    kept: int = 0
    tried: int = 0
    """Drafted tokens up to the first refused one."""


def compiled_graphs() -> int:
    """How many graphs torch has compiled so far: a round in which it did says nothing of what rounds cost."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
