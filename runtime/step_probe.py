"""What a policy of step reuse looks at, kept from call to call, and how much it changed since."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright.runtime.contracts import Measure


class Kept:
    """A copy of a tensor [B, ...] and how much it differs from the one kept before it.

    Two copies take turns in the same memory, since fresh pages cost more than a copy: a copy made beside
    another takes the place of the one before that. Whoever keeps a copy makes the next one beside it.
    """

    __slots__ = ("_other", "change", "tensor")

    def __init__(self, x: Tensor, beside: Kept | None, measure: Measure) -> None:
        x = x.detach()
        self._other: Tensor | None = None
        self.change = math.inf
        """L1 norm of the difference over that of the tensor beside, of the sample of the batch where it is
        greatest; infinite without one, or where it cannot be told."""
        if beside is None or not fits(beside.tensor, x):
            self.tensor: Tensor = room_for(x).copy_(x)
            return
        if beside._other is None:
            beside._other = room_for(x)
        self.tensor, self._other = beside._other, beside.tensor
        far, size = measure(x, beside.tensor, self.tensor).tolist()
        self.change = max(map(share_of, far, size))

    def bytes(self) -> int:
        """Memory held, that of the next copy included."""
        held = self.tensor.numel() * self.tensor.element_size()
        return held if self._other is None else 2 * held


def share_of(change: float, size: float) -> float:
    """change / size; infinite where it cannot be told."""
    share = change / size if size > 0.0 else math.inf
    return math.inf if math.isnan(share) else share


def fits(room: Tensor, x: Tensor) -> bool:
    """Whether x can be written there."""
    return room.shape == x.shape and room.dtype == x.dtype and room.device == x.device


def room_for(x: Tensor) -> Tensor:
    """Contiguous memory for tensors like x, that may be written in and outside of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
