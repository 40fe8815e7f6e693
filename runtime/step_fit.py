"""TeaCache's polynomial, fitted to a model: how much its residual changes by how much the probe does."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from tilewright.runtime.step_probe import Kept, share_of
from tilewright.runtime.step_reuse import Accumulated, Lane, StepReuseError


class Recorded:
    """A policy that computes every step and records changes of all requests and branches that run under it.

    Run a few prompts with `StepReuse(recorded)`; `recorded.fitted(threshold)` is then the policy of others.
    TeaCache (arXiv:2411.19108) fits the change of the stretch's output; here it is that of the residual,
    since that is what is added again.
    """

    keeps: ClassVar[str] = "probe"

    def __init__(self) -> None:
        self.changes: list[tuple[float, float]] = []
        """Relative L1 changes from a step to the next: (of the probe, of the residual)."""

    def reuse(self, lane: Lane, step: int, steps: int, seen: Kept | None) -> bool:
        return False

    def computed(self, lane: Lane, step: int, steps: int, seen: Kept, residual: Tensor) -> None:
        before = lane.residual
        if before is None or step != lane.computed + 1:
            return
        sizes = [
            float(torch.linalg.vector_norm(x, 1, dtype=torch.float64))
            for x in (residual - before.tensor, before.tensor)
        ]
        change = share_of(*sizes)
        if math.isfinite(seen.change) and math.isfinite(change):
            self.changes.append((seen.change, change))

    def fitted(self, threshold: float, degree: int = 4) -> Accumulated:
        """The policy whose polynomial of this degree has the least squared error over what was recorded.

        StepReuseError for a degree below 1 and for fewer different changes than it has coefficients.
        """
        x, y = torch.tensor(self.changes, dtype=torch.float64).reshape(-1, 2).unbind(1)
        different = len(set(x.tolist()))
        if degree < 1 or different <= degree:
            raise StepReuseError(
                f"degree = {degree}: expected 1 or more, and below the {different} different changes recorded"
            )
        unit = float(x.max())  # powers of small changes would be lost beside 1
        powers = torch.arange(degree, -1, -1, dtype=torch.float64)
        solved = torch.linalg.lstsq((x[:, None] / unit) ** powers, y[:, None], driver="gelsd").solution[:, 0]
        coefficients = (solved / unit**powers).tolist()
        return Accumulated(threshold, tuple(coefficients), (float(x.min()), unit))
