"""One layer's keys and values in extents of which only some are resident, and attention over them.

Attention goes extent by extent, in their order, and merges by log-sum-exp; which extents were resident when
it began, and which were read ahead, changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.ops.block_sparse_attention import merge_attention
from tilewright.kernels.paged.call import callable_for
from tilewright.runtime.kv_store.extents import ExtentLayout
from tilewright.runtime.kv_store.tier import ExtentKey, TierManager


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from (out, lse) over disjoint sets of them; without a key 0 and -inf."""
    if len(parts) == 1:
        return parts[0]
    outs, each = (torch.stack(x) for x in zip(*parts, strict=True))
    lse = each.logsumexp(0)
    weights = torch.exp(each - lse.masked_fill(lse == float("-inf"), 0.0))
    return (weights[..., None] * outs).sum(0), lse


class ChosenRows:
    """Rows of keys and values at some positions, copied out of extents as these come by.

    Attention is computed when all are there: its result depends neither on where they lay nor on how many
    extents were resident at a time.
    """

    def __init__(self, positions: Tensor, first: Tensor | None, layout: ExtentLayout) -> None:
        """positions: int32 [m], -1 for unused entries; those before `first`, int64 [1], are left out."""
        begin = 0 if first is None else max(0, int(first))
        held = positions[positions >= begin].long().sort().values
        span, page, heads = layout.pages * layout.page, layout.page, layout.heads
        runs, counts = torch.div(held, span, rounding_mode="floor").unique_consecutive(return_counts=True)
        self.runs: list[int] = runs.tolist()
        """Extents that hold any of the positions, ascending."""
        self._counts = dict(zip(self.runs, (counts * heads).tolist(), strict=True))
        at = held % span
        block = torch.div(at, page, rounding_mode="floor")[:, None] * heads + torch.arange(heads)
        self._rows = (block * page + at[:, None] % page).flatten()
        self._heads, self._layout, self._done = heads, layout, 0
        self._k = torch.empty(len(self._rows), layout.size, dtype=layout.dtype)
        self._v = torch.empty(len(self._rows), layout.value_size, dtype=layout.dtype)

    def collect(self, runs: Sequence[int], places: Sequence[int], memory: Tensor) -> None:
        """Copy the rows of the next extents: runs[i] lies in frame places[i] of uint8 [frames, extent_bytes].

        All of `runs` come once, in their order.
        """
        counts = torch.tensor([self._counts[run] for run in runs])
        end = self._done + int(counts.sum())
        rows, frames = self._rows[self._done : end], torch.tensor(places).repeat_interleave(counts)
        for pool, out in zip(self._layout.rows(memory), (self._k, self._v), strict=True):
            per_extent = self._layout.extent_bytes // (pool.shape[1] * pool.element_size())
            torch.index_select(pool, 0, rows + frames * per_extent, out=out[self._done : end])
        self._done = end

    def attend(self, q: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """(attention of q [1, H, 1, D], its log-sum-exp [1, H, 1]); without a row 0 and -inf."""
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = (x.view(-1, self._heads, x.shape[1]).transpose(0, 1).to(wide) for x in (self._k, self._v))
        rows = q[0, :, 0].to(wide).unflatten(0, (self._heads, -1))
        scores = rows @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
        lse = scores.logsumexp(2, keepdim=True)
        out = torch.exp(scores - lse) @ v
        return out.flatten(0, 1)[None, :, None], lse.flatten(0, 1)[None]


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
        A few extents are pinned at a time, at most half of the fast tier, and the next ones are read
        meanwhile. OptionError for positions that are not held, or with more than one query.
        """
        if positions is not None and not (
            bool((positions >= 0).any()) and int(positions.max()) < self.length
        ):
            raise OptionError(f"positions: expected at least one, all from 0 to {self.length - 1}")
        if positions is not None and q.shape[2] != 1:
            raise OptionError(f"q: {q.shape[2]} queries at once, expected 1 where positions are given")
        chosen = None if positions is None else ChosenRows(positions, first, self._layout)
        keys = self.wanted() if chosen is None else [self._key(run) for run in chosen.runs]
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in self._in_turn(keys, then):
            if chosen is not None:
                chosen.collect([key.run for key in batch], self._tiers.places(batch), self._tiers.memory)
                continue
            for key in batch:
                frame = self._tiers.frame(key)
                parts.append(self._attend_one(q, frame, key.run * self.span, first, scale))
                if logits is not None:
                    self._rank_one(q, frame, key.run * self.span, logits)
                if q.shape[2] > 1 and len(parts) == 2:  # one part of many queries at a time: they are large
                    parts = [merge_attention.definition(*parts[0], *parts[1])]
            if q.shape[2] > 1 and len(parts) == 1:
                parts = [(parts[0][0].to(parts[0][1].dtype), parts[0][1])]  # wide: merging rounds only once
        out, lse = merged(parts) if chosen is None else chosen.attend(q, scale)
        return out.to(q.dtype), lse

    def _in_turn(self, keys: list[ExtentKey], then: Sequence[ExtentKey]) -> Iterator[list[ExtentKey]]:
        """A few extents at a time, pinned until the next; what follows is read meanwhile."""
        coming, hinted = [*keys, *then], 0
        size = max(1, min(self._ahead, self._tiers.frames // 2))
        for at in range(0, len(keys), size):
            batch = keys[at : at + size]
            ticket = self._tiers.fetch(batch)  # pinned before the hints below can evict it
            try:
                end = at + len(batch) + self._ahead
                self._tiers.prefetch(coming[max(hinted, at + len(batch)) : end])
                hinted = end
                self._tiers.wait(ticket)
                yield batch
            finally:
                self._tiers.release(ticket)

    def _attend_one(
        self, q: Tensor, frame: Tensor, start: int, first: Tensor | None, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Over the extent whose first token is `start`; places are counted from there."""
        pool = (q, *self._layout.views(frame), self._table, torch.tensor([self.length - start]))
        args = (*pool, None if first is None else first - start, None, scale)
        out, lse = callable_for("paged_attention", args)(*args)
        return out, lse

    def _rank_one(self, q: Tensor, frame: Tensor, start: int, logits: Tensor) -> None:
        keys = self._layout.views(frame)[0].transpose(0, 1).flatten(1, 2)[:, : self.length - start].float()
        rows = q[0, :, 0].float().unflatten(0, (keys.shape[0], -1))
        logits[:, start : start + keys.shape[1]] = (rows @ keys.mT).flatten(0, 1)

    def _key(self, run: int) -> ExtentKey:
        return ExtentKey(self._session, self._layer, run)
