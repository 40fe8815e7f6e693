"""What a policy of step reuse looks at, kept from call to call, and how much it changed since."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_FEW = 1 << 16
"""Elements up to which a sum in float32 is off by less than 2e-5 of itself."""


def relative_change(new: Tensor, old: Tensor) -> float:
    """L1 norm of the difference over that of `old`, of the sample of the batch where it is greatest."""
    pairs = zip(_sizes(new - old), _sizes(old), strict=True)
    shares = [_share(change, size) for change, size in pairs]
    return max(shares)


def _sizes(x: Tensor) -> list[float]:
    sums: list[float] = torch.linalg.vector_norm(x, 1, tuple(range(1, x.dim())), dtype=torch.float64).tolist()
    return sums


def _share(change: float, size: float) -> float:
    share = change / size if size > 0.0 else math.inf
    return math.inf if math.isnan(share) else share


@dataclass(frozen=True, slots=True)
class _Rows:
    """Room for two copies of few elements, and zeros: distances of rows are their difference and sizes."""

    flat: Tensor
    """[3, elements] in float32 or float64; the last row is 0."""
    views: tuple[Tensor, Tensor]
    """The first two in the shape of what is copied."""
    dtype: torch.dtype
    """Of what is copied."""

    @classmethod
    def like(cls, x: Tensor) -> _Rows | None:
        """Room for tensors like x; None for a batch, for many elements, and off the CPU."""
        few = x.device.type == "cpu" and x.shape[0] == 1 and 0 < x.numel() <= _FEW
        if not few or not x.dtype.is_floating_point:
            return None
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):  # written again outside of it
            flat = torch.zeros(3, x.numel(), dtype=wide)
            return cls(flat, (flat[0].view(x.shape), flat[1].view(x.shape)), x.dtype)

    def fits(self, x: Tensor) -> bool:
        return self.dtype == x.dtype and self.views[0].shape == x.shape and x.is_cpu


class Kept:
    """A copy of a tensor [B, ...], measured against the one kept before it.

    At decode's sizes a call costs more than what it computes, so two copies of one small sample lie in rows
    of one buffer and one call finds all three norms. A copy made beside another takes the place of the one
    before that: whoever keeps a copy makes the next one beside it.
    """

    __slots__ = ("_at", "_rows", "tensor")

    def __init__(self, x: Tensor, beside: Kept | None = None) -> None:
        rows: _Rows | None = None if beside is None else beside._rows
        if rows is None or beside is None or not rows.fits(x):
            rows, self._at = _Rows.like(x), 0
        else:
            self._at = 1 - beside._at
        self._rows: _Rows | None = rows
        if x.requires_grad:
            x = x.detach()
        self.tensor: Tensor = x.clone() if rows is None else rows.views[self._at].copy_(x)

    def change(self, old: Kept) -> float:
        """`relative_change` of this tensor since `old`."""
        rows = self._rows
        if rows is None or rows is not old._rows or self._at == old._at:
            return relative_change(self.tensor, old.tensor)
        distances: list[float] = torch.nn.functional.pdist(rows.flat, 1.0).tolist()
        return _share(distances[0], distances[1 + old._at])

    def bytes(self) -> int:
        """Memory held, that of the next copy included."""
        held = self.tensor if self._rows is None else self._rows.flat
        return held.numel() * held.element_size()
