"""Sequences of one layer over a pool: page tables, lengths, appending, taking back, sharing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.pool import PagePool

Write = Callable[..., Any]
"""paged_append(k_pages, v_pages, page_table, starts, k, v, low, high): writes rows into the pages."""
TABLE_STEP = 16
"""Columns by which a page table grows."""


class LayerView:
    """B sequences of one layer. Position p of sequence b lies in page `table[b, p // P]`, slot p % P.

    `lengths[b]` counts positions, those of pages that were given up included. Several views may refer to the
    same pages; a page that is written while another view refers to it is copied first.
    """

    def __init__(self, pool: PagePool, batch: int, write: Write) -> None:
        if batch < 1:
            raise KVStoreError(f"batch = {batch}: expected 1 or more")
        self.pool, self.batch, self._write = pool, batch, write
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._held = [0] * batch
        self._table = torch.full((batch, TABLE_STEP), -1, dtype=torch.int32)
        self._lengths = torch.zeros(batch, dtype=torch.int64)
        self._open = True
        # Sequences whose last page holds keys behind their end: its extremes count keys that are not theirs.
        self._loose: set[int] = set()

    @property
    def lengths(self) -> list[int]:
        """Positions of every sequence."""
        return list(self._held)

    def tables(self) -> tuple[Tensor, Tensor]:
        """(page table int32 [B, n], lengths int64 [B]) on the pool's device; n covers the longest sequence.
        They are the view's own and change with the next append."""
        self._check_open()
        longest = max(len(row) for row in self._pages)
        device = self.pool.k_pages.device
        return self._table[:, :longest].to(device), self._lengths.to(device)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add k [B, Hkv, T, D], v [B, Hkv, T, E] to the ends. KVStoreError for other shapes or dtypes;
        OutOfPages leaves the view as it was."""
        self._check_open()
        pool = self.pool
        want = (self.batch, pool.k_pages.shape[1])
        shapes = (*want, k.shape[2] if k.dim() == 4 else -1)
        for name, x, size in (("k", k, pool.sizes[0]), ("v", v, pool.sizes[1])):
            if tuple(x.shape) != (*shapes, size) or x.dtype != pool.dtype:
                raise KVStoreError(
                    f"{name} is {list(x.shape)} {x.dtype}; expected [{want[0]}, {want[1]}, T, {size}] "
                    f"{pool.dtype}"
                )
        tokens = k.shape[2]
        if not tokens:
            return
        self._reserve(tokens)
        starts = self._lengths.to(pool.k_pages.device)
        longest = max(len(row) for row in self._pages)
        table = self._table[:, :longest].to(pool.k_pages.device)
        self._write(pool.k_pages, pool.v_pages, table, starts, k, v, pool.low, pool.high)
        self._held = [length + tokens for length in self._held]
        self._lengths += tokens

    def crop(self, lengths: Sequence[int]) -> None:
        """Take back the positions from lengths[b] on. KVStoreError beyond what is held."""
        self._check_open()
        if len(lengths) != self.batch or any(
            not 0 <= new <= old for new, old in zip(lengths, self._held, strict=False)
        ):
            raise KVStoreError(f"crop to {list(lengths)}: expected {self.batch} lengths up to {self._held}")
        for row, length in enumerate(lengths):
            if length < self._held[row]:
                self._loose.add(row)
            count = -(-length // self.pool.page)
            for page in self._pages[row][count:]:
                if page >= 0:
                    self.pool.release(page)
            del self._pages[row][count:]
            self._table[row, count:] = -1
        self._held = list(lengths)
        self._lengths = torch.tensor(self._held, dtype=torch.int64)

    def drop(self, row: int, places: Iterable[int]) -> None:
        """Give up whole pages of a sequence, by their place in the table; given up twice is fine."""
        self._check_open()
        for place in places:
            if not 0 <= place < self._held[row] // self.pool.page:
                raise KVStoreError(
                    f"page {place} of sequence {row} cannot be given up: it has "
                    f"{self._held[row] // self.pool.page} full pages"
                )
            page = self._pages[row][place]
            if page >= 0:
                self.pool.release(page)
                self._pages[row][place] = -1
                self._table[row, place] = -1

    def fork(self, rows: Sequence[int], lengths: Sequence[int] | None = None) -> LayerView:
        """A view whose sequence i starts with the first lengths[i] positions of sequence rows[i], in the
        same pages."""
        self._check_open()
        wanted = [self._held[row] for row in rows] if lengths is None else list(lengths)
        if len(wanted) != len(rows) or any(
            not 0 <= length <= self._held[row] for row, length in zip(rows, wanted, strict=False)
        ):
            raise KVStoreError(f"fork of {list(rows)} at {wanted}: the view holds {self._held}")
        new = LayerView(self.pool, len(rows), self._write)
        for i, (row, length) in enumerate(zip(rows, wanted, strict=True)):
            pages = self._pages[row][: -(-length // self.pool.page)]
            for page in pages:
                if page >= 0:
                    self.pool.retain(page)
            new._pages[i] = list(pages)
            if length < self._held[row] or row in self._loose:
                new._loose.add(i)
        new._held = wanted
        new._lengths = torch.tensor(wanted, dtype=torch.int64)
        new._fill_table()
        return new

    def pages(self, row: int) -> list[int]:
        """The pages of a sequence by their place in its table, -1 where one was given up."""
        return list(self._pages[row])

    def adopt(self, pages: Sequence[Sequence[int]]) -> None:
        """Begin every sequence of an empty view with full pages that the pool holds, one reference more.

        Sequences with fewer pages than the longest have a gap behind them: all have its length.
        KVStoreError where the view is not empty, or a page is not held.
        """
        self._check_open()
        if any(self._held) or len(pages) != self.batch:
            raise KVStoreError(
                f"pages of {len(pages)} sequences for a view of {self.batch} that holds {self._held}"
            )
        for page in (page for row in pages for page in row):
            self.pool.references(page)  # all are held, before any is retained
        for page in (page for row in pages for page in row):
            self.pool.retain(page)
        longest = max(len(row) for row in pages)
        self._pages = [[*row, *[-1] * (longest - len(row))] for row in pages]
        self._held = [longest * self.pool.page] * self.batch
        self._lengths = torch.tensor(self._held, dtype=torch.int64)
        self._fill_table()

    def rows(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """(positions [S], keys [Hkv, S, D], values [Hkv, S, E]) that sequence `row` still holds, copied, as
        the pool keeps them."""
        self._check_open()
        page, held = self.pool.page, self._held[row]
        kept = [place for place, number in enumerate(self._pages[row]) if number >= 0]
        numbers = torch.tensor([self._pages[row][place] for place in kept], dtype=torch.int64)
        at = torch.tensor(kept, dtype=torch.int64)[:, None] * page + torch.arange(page)
        inside = at.flatten() < held
        k, v = (
            pages[numbers.to(pages.device)].transpose(0, 1).flatten(1, 2)[:, inside]
            for pages in (self.pool.k_pages, self.pool.v_pages)
        )
        return at.flatten()[inside], k, v

    def free(self) -> None:
        """Release every page; the view holds nothing and takes nothing any more. Twice is fine."""
        if self._open:
            self.crop([0] * self.batch)
            self._open = False

    def _check_open(self) -> None:
        if not self._open:
            raise KVStoreError("the view was freed")

    def _reserve(self, tokens: int) -> None:
        """Pages for `tokens` more positions, of this view alone where they are written; all or nothing."""
        page = self.pool.page
        taken: list[list[int]] = []
        copies: list[tuple[int, int]] = []
        try:
            for row, held in enumerate(self._held):
                last = held // page
                if held % page and self._pages[row][last] < 0:
                    raise KVStoreError(f"the last page of sequence {row} was given up")
                if held % page and self.pool.references(self._pages[row][last]) > 1:
                    copies.append((row, self.pool.copy(self._pages[row][last])))
                need = -(-(held + tokens) // page) - len(self._pages[row])
                taken.append([])
                for _ in range(need):
                    taken[-1].append(self.pool.allocate())
        except KVStoreError:
            for number in [n for pages in taken for n in pages] + [n for _, n in copies]:
                self.pool.release(number)
            raise
        for row, number in copies:
            self.pool.release(self._pages[row][-1])
            self._pages[row][-1] = number
        for row in self._loose:
            if self._held[row] % page:  # a page begun anew measures itself
                self.pool.measure(self._pages[row][-1], self._held[row] % page)
        self._loose.clear()
        for row, pages in enumerate(taken):
            self._pages[row] += pages
        if copies or any(taken):
            self._fill_table([row for row, _ in copies] + [row for row, new in enumerate(taken) if new])

    def _fill_table(self, rows: Iterable[int] | None = None) -> None:
        longest = max(len(row) for row in self._pages)
        if longest > self._table.shape[1]:
            # Doubling keeps the cost of an append constant on average.
            wide = max(-(-longest // TABLE_STEP) * TABLE_STEP, 2 * self._table.shape[1])
            self._table = torch.full((self.batch, wide), -1, dtype=torch.int32)
            rows = None
        for row in range(self.batch) if rows is None else rows:
            self._table[row, : len(self._pages[row])] = torch.tensor(self._pages[row], dtype=torch.int32)
