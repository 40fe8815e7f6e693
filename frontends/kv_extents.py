"""One layer's keys and values in extents of which only some are resident, and attention over them.

Each extent is attended for itself and all are merged by log-sum-exp; which extents were resident when
it began, and which were read ahead, changes no bit of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
RANKED = 1 << 19
"""Bytes of keys that are copied at a time to be ranked; the keys of one extent at least."""


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(attention [1, H, T, D], its log-sum-exp) over all keys, from those over disjoint sets of them, each
    [n, H, T, ...]; 0 and -inf where there is none. One sum: it does not tell how the parts were grouped."""
    args = [torch.cat(some) if len(parts) > 1 else some[0] for some in zip(*parts, strict=True)]
    out, lse = callable_for("merge_parts", args)(*args)
    return out, lse


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
        self.starts = runs.long() * span
        """int64 [n]: the first token of each."""


class ExtentLayer:
    """The rows of one sequence at one layer, appended in order; `tiers` holds at least one extent.

    Rows that come one at a time may gather in a page of memory, the tail, until it is full: no extent changes
    meanwhile. Where attention reads a page changes no bit of the result.
    """

    def __init__(
        self,
        tiers: TierManager,
        session: int,
        layer: int,
        layout: ExtentLayout,
        ahead: int = 2,
        tail: int | None = None,
    ) -> None:
        """ahead: extents that are read while one is attended. tail: the entry of a page in the pool of the
        tier's frames that is this layer's alone; None: every row goes to its extent. OptionError where the
        layout's extents are not of the size of the tier's."""
        if layout.extent_bytes != tiers.extent_bytes:
            raise OptionError(
                f"extents of {layout.extent_bytes} bytes do not fit a tier of {tiers.extent_bytes}",
                remedy="make the tier with the extent_bytes of the layout",
            )
        self._tiers, self._session, self._layer, self._layout = tiers, session, layer, layout
        self._table = torch.arange(layout.pages, dtype=torch.int32)[None]
        self._pool = layout.pool(tiers.memory) if layout.one_size else None
        self._tail = -1 if tail is None else tail
        self._kept = 0
        """Of the newest tokens those in the tail and in no extent: from a page's begin on, a page at most."""
        self._ahead = ahead
        self._keys: list[ExtentKey] = []
        self._calls: dict[tuple[object, ...], Callable[..., Any]] = {}
        self._wanted: tuple[Picked | None, int, list[ExtentKey]] = None, 0, []
        self.length = 0
        """Tokens held."""

    @property
    def span(self) -> int:
        """Tokens of a full extent."""
        return self._layout.pages * self._layout.page

    @property
    def runs(self) -> int:
        """Extents in use."""
        return -(-(self.length - self._kept) // self.span)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add rows k [1, Hkv, T, D] and v [1, Hkv, T, E] of the layout's type."""
        tokens, page = k.shape[2], self._layout.page
        if self._kept and (tokens > 1 or self._kept == page):
            self._settle()
        at_end = tokens == 1 and self.length % page == self._kept  # not within a page that an extent has
        if at_end and self._pool is not None and self._tail >= 0:
            table = torch.tensor([[self._tail]], dtype=torch.int32)
            here = (self._pool.k, self._pool.v, table, torch.tensor([self._kept]), k, v)
            self._call("paged_append", here, ())
            self._kept += 1
            self.length += 1
            return
        done = 0
        while done < tokens:
            run, start = divmod(self.length, self.span)
            count = min(tokens - done, self.span - start)
            rows = [x[:, :, done : done + count].contiguous() for x in (k, v)]
            with self._tiers.edit(self._key(run)):
                args = (*self._pages([self._key(run)], [run]), torch.tensor([start]), *rows)
                callable_for("paged_append", args)(*args)
            self.length += count
            done += count

    def _settle(self) -> None:
        """Write the tail to its extent."""
        if self._kept and self._pool is not None:
            run, at = divmod(self.length - self._kept, self.span)
            with self._tiers.edit(self._key(run)) as frame:
                views = self._layout.views(frame)
                for extent, pages in zip(views, (self._pool.k, self._pool.v), strict=True):
                    extent[at // self._layout.page] = pages[self._tail]
            self._kept = 0

    def crop(self, length: int) -> None:
        """Take back the rows from `length` on."""
        before, kept = self.runs, max(0, length - self.length + self._kept)
        self.length, self._kept = length, kept
        for run in range(self.runs, before):
            self._tiers.drop(self._key(run))

    def pick(self, positions: Tensor) -> Picked:
        """Where int32 [m] tokens of this sequence lie, -1 for unused entries. OptionError for positions that
        are not held."""
        return Picked(positions, self.length, self.span)

    def wanted(self, picked: Picked | None = None) -> list[ExtentKey]:
        """The extents that hold what was picked; None: all; in order. Those not held yet are left out."""
        runs = self.runs
        if self._wanted[0] is not picked or self._wanted[1] != runs:
            while len(self._keys) < runs:
                self._keys.append(ExtentKey(self._session, self._layer, len(self._keys)))
            named = range(runs) if picked is None else picked.runs
            self._wanted = picked, runs, [self._keys[run] for run in named if run < runs]
        return self._wanted[2]

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
        if q.shape[2] > 1 or rank is not None:
            self._settle()
        parts: list[tuple[Tensor, Tensor]] = []
        done, keys, each = 0, self.wanted(picked), max(1, RANKED // self._layout.k_bytes)
        runs = range(-(-self.length // self.span)) if picked is None else picked.runs
        for some in self._in_turn(keys, then, self._at_once if q.shape[2] == 1 else 1):
            end = done + len(some) if done + len(some) < len(keys) else len(runs)  # the tail's needs no frame
            parts.append(self._attend_some(q, some, runs[done:end], first, scale, done, picked))
            if rank is not None:
                for at in range(0, len(some), each):
                    start = some[at].run * self.span
                    rank(self._products(q, some[at : at + each])[:, : self.length - start], start)
            if q.shape[2] > 1:
                parts = [merged(parts)]
            done = end
        out, lse = merged(parts) if q.shape[2] == 1 else parts[0]
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
        for at in range(0, max(1, len(keys)), size):
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
        runs: Sequence[int],
        first: Tensor | None,
        scale: float | None,
        begin: int,
        picked: Picked | None,
    ) -> tuple[Tensor, Tensor]:
        """(attention [n, H, T, D], its log-sum-exp) over each of n runs of pages, whose extents are pinned:
        of everything, or of what was picked, whose runs from `begin` on these are. Tokens are counted from
        the first of a run."""
        span, end = self.span, begin + len(runs)
        starts = torch.arange(begin, end) * span if picked is None else picked.starts[begin:end]
        k, v, table = self._pages(keys, runs)
        pooled = (q.expand(len(runs), -1, -1, -1), k, v, table, self.length - starts)
        padding = None if first is None else first - starts
        if picked is None:
            args: tuple[object, ...] = (*pooled, padding, None, scale)
            out, lse = self._call("paged_attention", args, (first is None, scale))
            return out, lse
        args = (*pooled, picked.places[begin:end], padding, scale)
        out, lse = self._call("token_attention", args, (first is None, scale))
        return out, lse

    def _call(self, op: str, args: Sequence[object], how: tuple[object, ...]) -> Any:
        """An op by its fastest callable, which `how` decides on among all calls of this op here."""
        found = self._calls.get((op, *how))
        if found is None:
            found = self._calls[(op, *how)] = callable_for(op, args)
        return found(*args)

    def _pages(self, keys: list[ExtentKey], runs: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, values, table) of runs of pages whose extents are pinned, the last one's perhaps in the tail
        alone; of one where no pool holds them all."""
        if self._pool is None:
            (key,) = keys
            return (*self._layout.views(self._tiers.frame(key)), self._table)
        frames = self._tiers.places(keys)
        table = self._pool.table([*frames, *[0] * (len(runs) - len(frames))])
        if self._kept:
            run, at = divmod(self.length - self._kept, self.span)
            if runs[-1] == run:
                table[-1, at // self._layout.page] = self._tail
        return self._pool.k, self._pool.v, table

    def gather(self, part: int, places: Tensor) -> Tensor:
        """Copies [Hkv, m, D or E] of the keys (part = 0) or values (1) of int64 [Hkv, m] places, all held."""
        if self._kept and bool((places >= self.length - self._kept).any()):
            self._settle()
        heads = torch.arange(self._layout.heads)[:, None].expand_as(places)
        size = (self._layout.size, self._layout.value_size)[part]
        rows = torch.empty(*places.shape, size, dtype=self._layout.dtype)
        runs = torch.div(places, self.span, rounding_mode="floor").unique().tolist()
        for key in itertools.chain.from_iterable(self._in_turn([self._key(run) for run in runs], (), 1)):
            here = places - key.run * self.span
            inside = (here >= 0) & (here < self.span)
            held, at = self._layout.views(self._tiers.frame(key))[part], here[inside]
            page = torch.div(at, self._layout.page, rounding_mode="floor")
            rows[inside] = held[page, heads[inside], at % self._layout.page]
        return rows

    def _products(self, q: Tensor, keys: list[ExtentKey]) -> Tensor:
        """float32 [H, n * span] of n extents."""
        if self._pool is None:
            held = self._layout.views(self._tiers.frame(keys[0]))[0]
        else:
            held = self._pool.k[self._pool.table(self._tiers.places(keys)).flatten()]
        rows = q[0, :, 0].float().unflatten(0, (1, held.shape[1], -1))
        found: Tensor = (rows @ held.float().mT).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
        return found

    def _key(self, run: int) -> ExtentKey:
        return ExtentKey(self._session, self._layer, run)
