"""One layer's keys and values in extents of which only some are resident, and attention over them.

Each extent is attended for itself and all are merged by log-sum-exp; which extents were resident when
it began, and which were read ahead, changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.kernels.paged.call import callable_for
from tilewright.kernels.paged.cpp_core import CHUNK
from tilewright.runtime.kv_store.extents import ExtentLayout
from tilewright.runtime.kv_store.tier import TierManager
from tilewright.runtime.kv_store.tier_state import ExtentKey

WHOLE = 8 * CHUNK
"""Tokens; the kernels cut no run of so few among threads, whatever else they compute."""


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(attention [1, H, T, D], its log-sum-exp) over all keys, from those over disjoint sets of them, each
    [n, H, T, ...]; 0 and -inf where there is none. One sum: it does not tell how the parts were grouped."""
    outs, each = (torch.cat(some) if len(parts) > 1 else some[0] for some in zip(*parts, strict=True))
    most = each.amax(0, keepdim=True).clamp(min=torch.finfo(each.dtype).min)
    weights = torch.exp(each - most)
    total = weights.sum(0, keepdim=True)
    out = (weights[..., None] * outs.to(each.dtype)).sum(0, keepdim=True)
    return out / total.clamp(min=1.0)[..., None], most + total.log()  # the greatest weight is 1


class Picked:
    """Which extents hold some tokens of a sequence, and where in each: the same at every layer."""

    def __init__(self, positions: Tensor, length: int, span: int) -> None:
        """positions: int32 [m], -1 for unused entries; length: tokens held; span: tokens of an extent.
        OptionError for positions that are not held."""
        held = positions[positions >= 0].sort().values
        if not len(held) or int(held[-1]) >= length:
            raise OptionError(f"positions: expected at least one, all from 0 to {length - 1}")
        runs, which, counts = torch.div(held, span, rounding_mode="floor").unique_consecutive(
            return_inverse=True, return_counts=True
        )
        self.length = length
        self.runs: list[int] = runs.tolist()
        """The extents, ascending."""
        self.places = torch.full((len(runs), 1, int(counts.max())), -1, dtype=torch.int32)
        """int32 [n, 1, m]: of each extent, its places that are attended, ascending; -1 for unused entries."""
        at = torch.arange(len(held)) - (counts.cumsum(0) - counts)[which]
        self.places[which, 0, at] = held - runs.to(torch.int32)[which] * span


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
        one_size = layout.size == layout.value_size
        self._pool = layout.pool(tiers.memory) if one_size else None
        self._ahead = ahead
        self._keys: list[ExtentKey] = []
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
            with self._tiers.edit(self._key(run)):
                args = (*self._pages([self._key(run)]), torch.tensor([start]), *rows)
                callable_for("paged_append", args)(*args)
            self.length += count
            done += count

    def crop(self, length: int) -> None:
        """Take back the rows from `length` on."""
        before, self.length = self.runs, length
        for run in range(self.runs, before):
            self._tiers.drop(self._key(run))

    def pick(self, positions: Tensor) -> Picked:
        """Where int32 [m] tokens of this sequence lie, -1 for unused entries. OptionError for positions that
        are not held."""
        return Picked(positions, self.length, self.span)

    def wanted(self, picked: Picked | None = None) -> list[ExtentKey]:
        """The extents that hold what was picked; None: all; in order. Those not held yet are left out."""
        while len(self._keys) < self.runs:
            self._keys.append(ExtentKey(self._session, self._layer, len(self._keys)))
        if picked is None:
            return self._keys[: self.runs]
        return [self._keys[run] for run in picked.runs if run < self.runs]

    def attend(
        self,
        q: Tensor,
        first: Tensor | None = None,
        scale: float | None = None,
        picked: Picked | None = None,
        then: Sequence[ExtentKey] = (),
        rank: Callable[[Tensor, int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(attention of the newest tokens q [1, H, T, D], its log-sum-exp [1, H, T]).

        first: int64 [1], where the padding ends. picked: the tokens that are attended; None: all. then:
        extents that will be wanted next. rank: is given the products of one query and the keys of each
        extent, float32 [H, n], and its first token.
        With one query a few extents are pinned and attended by one call, at most half of the fast tier; with
        more, one at a time, as their parts are large. The next ones are read meanwhile. OptionError where
        tokens were picked that are not held.
        """
        if picked is not None and picked.length > self.length:
            raise OptionError(f"tokens were picked of {picked.length}: {self.length} are held")
        parts: list[tuple[Tensor, Tensor]] = []
        done = 0
        for keys in self._in_turn(self.wanted(picked), then, self._at_once if q.shape[2] == 1 else 1):
            places = None if picked is None else picked.places[done : done + len(keys)]
            parts.append(self._attend_some(q, keys, first, scale, places))
            if rank is not None:
                for key in keys:
                    start = key.run * self.span
                    rank(self._products(q, key)[:, : self.length - start], start)
            if q.shape[2] > 1:
                parts = [merged(parts)]
            done += len(keys)
        out, lse = merged(parts)
        return out.to(q.dtype), lse

    @property
    def _at_once(self) -> int:
        """Extents of one call: their number must not change a bit, so a kernel may cut none of them."""
        if self._pool is None or self.span > WHOLE:
            return 1
        return max(1, self._tiers.frames // 2)

    def _in_turn(
        self, keys: list[ExtentKey], then: Sequence[ExtentKey], size: int
    ) -> Iterator[list[ExtentKey]]:
        """Up to `size` extents at a time, pinned until the next; what follows is read meanwhile."""
        coming, hinted = [*keys, *then], 0
        for at in range(0, len(keys), size):
            some = keys[at : at + size]
            end = at + len(some)
            ticket = self._tiers.fetch(some)  # pinned before the hints below can evict it
            try:
                start = max(hinted, end)
                hinted = start + len(self._tiers.prefetch(coming[start : end + self._ahead]).keys)
                self._tiers.wait(ticket)
                yield some
            finally:
                self._tiers.release(ticket)

    def _attend_some(
        self,
        q: Tensor,
        keys: list[ExtentKey],
        first: Tensor | None,
        scale: float | None,
        places: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(attention [n, H, T, D], its log-sum-exp) over each of n pinned extents, or over int32 [n, 1, m]
        places of each; tokens are counted from the first of an extent."""
        starts = torch.tensor([key.run * self.span for key in keys])
        pooled = (q.expand(len(keys), -1, -1, -1), *self._pages(keys), self.length - starts)
        begin = None if first is None else first - starts
        if places is None:
            args: tuple[object, ...] = (*pooled, begin, None, scale)
            out, lse = callable_for("paged_attention", args)(*args)
            return out, lse
        args = (*pooled, places, begin, scale)
        out, lse = callable_for("token_attention", args)(*args)
        return out, lse

    def _pages(self, keys: list[ExtentKey]) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, values, table) of pinned extents: of one alone where no pool holds them all."""
        if self._pool is None:
            (key,) = keys
            return (*self._layout.views(self._tiers.frame(key)), self._table)
        return self._pool.k, self._pool.v, self._pool.table(self._tiers.places(keys))

    def gather(self, part: int, places: Tensor) -> Tensor:
        """Copies [Hkv, m, D or E] of the keys (part = 0) or values (1) of int64 [Hkv, m] places, all held."""
        heads = torch.arange(self._layout.heads)[:, None].expand_as(places)
        size = (self._layout.size, self._layout.value_size)[part]
        rows = torch.empty(*places.shape, size, dtype=self._layout.dtype)
        runs = torch.div(places, self.span, rounding_mode="floor").unique().tolist()
        for (key,) in self._in_turn([self._key(run) for run in runs], (), 1):
            here = places - key.run * self.span
            inside = (here >= 0) & (here < self.span)
            held, at = self._layout.views(self._tiers.frame(key))[part], here[inside]
            page = torch.div(at, self._layout.page, rounding_mode="floor")
            rows[inside] = held[page, heads[inside], at % self._layout.page]
        return rows

    def _products(self, q: Tensor, key: ExtentKey) -> Tensor:
        """float32 [H, span]."""
        keys = self._layout.views(self._tiers.frame(key))[0].float()  # [pages, Hkv, P, D], where they lie
        rows = q[0, :, 0].float().unflatten(0, (1, keys.shape[1], -1))
        found: Tensor = (rows @ keys.mT).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
        return found

    def _key(self, run: int) -> ExtentKey:
        return ExtentKey(self._session, self._layer, run)
