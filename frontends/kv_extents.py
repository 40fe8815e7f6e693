"""One layer's keys and values in extents of which only some are resident, and attention over them.

Attention goes extent by extent, in their order, and merges by log-sum-exp; which extents were resident when
it began, and which were read ahead, changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.ops.block_sparse_attention import merge_attention
from tilewright.kernels.paged.call import callable_for
from tilewright.runtime.kv_store.extents import ExtentLayout
from tilewright.runtime.kv_store.tier import ExtentKey, TierManager

AHEAD = 2
"""Extents that are read while one is attended: the transfer threads have two."""


class ExtentLayer:
    """The rows of one sequence at one layer, appended in order; `tiers` holds at least one extent."""

    def __init__(self, tiers: TierManager, session: int, layer: int, layout: ExtentLayout) -> None:
        """OptionError where the layout's extents are not of the size of the tier's."""
        if layout.extent_bytes != tiers.extent_bytes:
            raise OptionError(
                f"extents of {layout.extent_bytes} bytes do not fit a tier of {tiers.extent_bytes}",
                remedy="make the tier with the extent_bytes of the layout",
            )
        self._tiers, self._session, self._layer, self._layout = tiers, session, layer, layout
        self._table = torch.arange(layout.pages, dtype=torch.int32)[None]
        self.length = 0
        """Tokens held."""

    @property
    def span(self) -> int:
        """Tokens of a full extent."""
        return self._layout.pages * self._layout.page

    @property
    def runs(self) -> int:
        """Extents in use."""
        return -(-self.length // self.span)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add rows k [1, Hkv, T, D] and v [1, Hkv, T, E] of the layout's type."""
        done = 0
        while done < k.shape[2]:
            run, start = divmod(self.length, self.span)
            count = min(k.shape[2] - done, self.span - start)
            rows = [x[:, :, done : done + count].contiguous() for x in (k, v)]
            with self._tiers.edit(self._key(run)) as frame:
                args = (*self._layout.views(frame), self._table, torch.tensor([start]), *rows)
                callable_for("paged_append", args)(*args)
            self.length += count
            done += count

    def attend(self, q: Tensor, runs: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """(attention of q [1, H, 1, D] over `runs`, its log-sum-exp [1, H, 1]); runs None: all, in order.

        Each extent is pinned while it is attended and the next ones are read meanwhile. OptionError for more
        than one query, or runs that are not distinct ones in use.
        """
        runs = range(self.runs) if runs is None else runs
        if q.shape[0] != 1 or q.shape[2] != 1:
            raise OptionError(
                f"q has shape {list(q.shape)}: expected [1, H, 1, D], one query of one sequence"
            )
        if not runs or len(set(runs)) < len(runs) or min(runs) < 0 or max(runs) >= self.runs:
            raise OptionError(f"runs = {list(runs)}: expected distinct numbers from 0 to {self.runs - 1}")
        keys = [self._key(run) for run in runs]
        out, lse = torch.empty(0), torch.empty(0)
        for at, (key, run) in enumerate(zip(keys, runs, strict=True)):
            ticket = self._tiers.fetch([key])  # pinned before the hints below can evict it
            try:
                self._tiers.prefetch(keys[at + 1 : at + 1 + AHEAD])
                self._tiers.wait(ticket)
                held = min(self.span, self.length - run * self.span)
                part = self._attend_one(q, self._tiers.frame(key), held)
            finally:
                self._tiers.release(ticket)
            if at == 0:
                out, lse = part[0].to(part[1].dtype), part[1]  # wide, so that merging rounds only once
            else:
                out, lse = merge_attention.definition(out, lse, *part)
        return out.to(q.dtype), lse

    def _attend_one(self, q: Tensor, frame: Tensor, held: int) -> tuple[Tensor, Tensor]:
        args = (q, *self._layout.views(frame), self._table, torch.tensor([held]))
        out, lse = callable_for("paged_attention", args)(*args)
        return out, lse

    def _key(self, run: int) -> ExtentKey:
        return ExtentKey(self._session, self._layer, run)
