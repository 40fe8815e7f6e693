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


class ExtentLayer:
    """The rows of one sequence at one layer, appended in order; `tiers` holds at least one extent."""

    def __init__(
        self, tiers: TierManager, session: int, layer: int, layout: ExtentLayout, ahead: int = 2
    ) -> None:
        """ahead: extents that are read while one is attended. OptionError where the layout's extents are not
        of the size of the tier's."""
        if layout.extent_bytes != tiers.extent_bytes:
            raise OptionError(
                f"extents of {layout.extent_bytes} bytes do not fit a tier of {tiers.extent_bytes}",
                remedy="make the tier with the extent_bytes of the layout",
            )
        self._tiers, self._session, self._layer, self._layout = tiers, session, layer, layout
        self._table = torch.arange(layout.pages, dtype=torch.int32)[None]
        self._ahead = ahead
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

    def crop(self, length: int) -> None:
        """Take back the rows from `length` on."""
        before, self.length = self.runs, length
        for run in range(self.runs, before):
            self._tiers.drop(self._key(run))

    def wanted(self, positions: Tensor | None = None) -> list[ExtentKey]:
        """The extents that hold `positions`, int32 [m] with -1 for unused entries; None: all; in order.

        Positions that are not held yet count for nothing.
        """
        if positions is None:
            return [self._key(run) for run in range(self.runs)]
        held = positions[(positions >= 0) & (positions < self.length)]
        return [self._key(int(run)) for run in torch.div(held, self.span, rounding_mode="floor").unique()]

    def attend(
        self,
        q: Tensor,
        first: Tensor | None = None,
        scale: float | None = None,
        positions: Tensor | None = None,
        then: Sequence[ExtentKey] = (),
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(attention of the newest tokens q [1, H, T, D], its log-sum-exp [1, H, T]).

        first: int64 [1], where the padding ends. positions: int32 [m], the tokens that are attended, -1 for
        unused entries; None: all. then: extents that will be wanted next. logits: float32 [H, S], filled with
        the products of one query and the keys held.
        Each extent is pinned while it is attended and the next ones are read meanwhile. OptionError for
        positions that are not held.
        """
        if positions is not None and not (
            bool((positions >= 0).any()) and int(positions.max()) < self.length
        ):
            raise OptionError(f"positions: expected at least one, all from 0 to {self.length - 1}")
        keys = self.wanted(positions)
        coming = [*keys, *then]
        out, lse = torch.empty(0), torch.empty(0)
        for at, key in enumerate(keys):
            ticket = self._tiers.fetch([key])  # pinned before the hints below can evict it
            try:
                self._tiers.prefetch(coming[at + 1 : at + 1 + self._ahead])
                self._tiers.wait(ticket)
                frame = self._tiers.frame(key)
                part = self._attend_one(q, frame, key.run * self.span, first, scale, positions)
                if logits is not None:
                    self._rank_one(q, frame, key.run * self.span, logits)
            finally:
                self._tiers.release(ticket)
            if at == 0:
                out, lse = part[0].to(part[1].dtype), part[1]  # wide, so that merging rounds only once
            else:
                out, lse = merge_attention.definition(out, lse, *part)
        return out.to(q.dtype), lse

    def _attend_one(
        self,
        q: Tensor,
        frame: Tensor,
        start: int,
        first: Tensor | None,
        scale: float | None,
        positions: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Over the extent whose first token is `start`; places are counted from there."""
        pool = (q, *self._layout.views(frame), self._table, torch.tensor([self.length - start]))
        begin = None if first is None else first - start
        if positions is None:
            args: tuple[object, ...] = (*pool, begin, None, scale)
            out, lse = callable_for("paged_attention", args)(*args)
            return out, lse
        here = positions[(positions >= start) & (positions < start + self.span)] - start
        args = (*pool, here[None, None], begin, scale)
        out, lse = callable_for("token_attention", args)(*args)
        return out, lse

    def _rank_one(self, q: Tensor, frame: Tensor, start: int, logits: Tensor) -> None:
        keys = self._layout.views(frame)[0].transpose(0, 1).flatten(1, 2)[:, : self.length - start].float()
        rows = q[0, :, 0].float().unflatten(0, (keys.shape[0], -1))
        logits[:, start : start + keys.shape[1]] = (rows @ keys.mT).flatten(0, 1)

    def _key(self, run: int) -> ExtentKey:
        return ExtentKey(self._session, self._layer, run)
