"""Sequences over the pages of one layer: who holds which page, how many tokens, and where padding ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright.runtime.kv_store.pages import PagePool, StoreError

GIVEN_UP = -1
"""In a page table: no page is held for these positions."""


class Sequences:
    """B sequences in one pool. They grow together, and are cut back and share pages one by one.

    `table` int32 [B, n], `lengths` int64 [B] and `first` int64 [B] or None (no padding) are what the paged
    ops take: position i of sequence b is slot i mod P of page table[b, i // P]. They are replaced, never
    written: what was read before a change stays what it was.
    """

    def __init__(self, pool: PagePool, batch: int, first: Tensor | None = None) -> None:
        """first: position of the first token of each sequence that is no padding."""
        if batch < 1:
            raise StoreError(f"batch = {batch}: expected 1 or more sequences")
        self.pool = pool
        self.device = pool.k_pages.device
        self.first: Tensor | None = None
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._counts = [0] * batch
        self._freed = False
        self._refresh()
        if first is not None:
            self.pad(first)

    @property
    def batch(self) -> int:
        return len(self._pages)

    @property
    def counts(self) -> list[int]:
        """`lengths` as numbers."""
        return list(self._counts)

    @property
    def longest(self) -> int:
        return max(self._counts)

    def pages(self, row: int) -> list[int]:
        """The pages of a sequence in order; `GIVEN_UP` where one was dropped."""
        return list(self._pages[row])

    def pad(self, first: Tensor) -> None:
        """Say where the padding of each sequence ends: int64 [B]."""
        self._check_open()
        if first.shape != (self.batch,) or first.dtype != torch.int64 or bool((first < 0).any()):
            raise StoreError(
                f"first is {list(first.shape)} {first.dtype}: expected int64 [{self.batch}] of 0 or more"
            )
        self.first = first.to(self.device) if bool(first.any()) else None

    def reserve(self, tokens: int) -> Tensor:
        """Make room for `tokens` more of every sequence; returns int64 [B], where each one's go.

        `lengths` counts them at once: write them before anything is read. A page that another sequence reads
        is copied first. Nothing changes where the pool has too few pages.
        """
        self._check_open()
        if tokens < 1:
            raise StoreError(f"tokens = {tokens}: expected 1 or more")
        size, starts = self.pool.page, self.lengths
        shared = [row for row in range(self.batch) if self._ends_shared(row)]
        missing = [
            -(-(count + tokens) // size) - len(pages)
            for count, pages in zip(self._counts, self._pages, strict=True)
        ]
        if shared or any(missing):
            fresh = self.pool.take(len(shared) + sum(missing))
            for row in shared:
                self._own_last(row, fresh.pop())
            for pages, count in zip(self._pages, missing, strict=True):
                pages.extend(fresh.pop() for _ in range(count))
        self._counts = [count + tokens for count in self._counts]
        if shared or any(missing):
            self._refresh()
        else:
            self.lengths = starts + tokens
        return starts

    def crop(self, counts: Sequence[int]) -> None:
        """Forget all but the first counts[b] tokens of each sequence, as if the others had never come."""
        self._check_open()
        if len(counts) != self.batch:
            raise StoreError(f"{len(counts)} counts for {self.batch} sequences")
        size = self.pool.page
        for row, (count, held) in enumerate(zip(counts, self._counts, strict=True)):
            if not 0 <= count <= held:
                raise StoreError(f"counts[{row}] = {count}: expected 0 to {held}")
            if count < held and count % size and self._pages[row][count // size] == GIVEN_UP:
                raise StoreError(f"counts[{row}] = {count}: the tokens before it were given up")
        for row, count in enumerate(counts):
            if count < self._counts[row]:
                self._cut(row, count)
        self._refresh()

    def drop(self, row: int, places: Sequence[int]) -> None:
        """Give up whole pages of one sequence, named by their place in the table; the newest one stays."""
        self._check_open()
        pages = self._pages[row]
        for place in places:
            if not 0 <= place < len(pages) - 1:
                raise StoreError(f"place {place} of sequence {row}: expected 0 to {len(pages) - 2}")
        self.pool.release(pages[place] for place in set(places) if pages[place] != GIVEN_UP)
        for place in places:
            pages[place] = GIVEN_UP
        self._refresh()

    def fork(self, rows: Sequence[int], counts: Sequence[int] | None = None) -> Sequences:
        """New sequences that start as the given ones, up to `counts` tokens of each; pages are shared.

        A shared page that is not full is copied when one of its holders writes.
        """
        self._check_open()
        for row in rows:
            if not 0 <= row < self.batch:
                raise StoreError(f"sequence {row}: expected 0 to {self.batch - 1}")
        made = Sequences(self.pool, len(rows))
        made._counts = [self._counts[row] for row in rows]
        made._pages = [self.pages(row) for row in rows]
        for pages in made._pages:
            self.pool.retain(page for page in pages if page != GIVEN_UP)
        made._refresh()
        if self.first is not None:
            made.first = self.first[torch.tensor(list(rows), device=self.device)]
        if counts is not None:
            try:
                made.crop(counts)
            except StoreError:
                made.free()
                raise
        return made

    def free(self) -> None:
        """Give all pages back; the sequences cannot be used any more. Twice is once."""
        for pages in self._pages:
            self.pool.release(page for page in pages if page != GIVEN_UP)
            pages.clear()
        self._counts = [0] * self.batch
        self._freed = True

    def _ends_shared(self, row: int) -> bool:
        """Whether the next token of a sequence goes into a page that others read."""
        return bool(self._counts[row] % self.pool.page) and self.pool.uses(self._pages[row][-1]) > 1

    def _own_last(self, row: int, fresh: int) -> None:
        old = self._pages[row][-1]
        self.pool.copy(old, fresh)
        self.pool.release([old])
        self._pages[row][-1] = fresh

    def _cut(self, row: int, count: int) -> None:
        size, pages = self.pool.page, self._pages[row]
        kept = -(-count // size)
        self.pool.release(page for page in pages[kept:] if page != GIVEN_UP)
        del pages[kept:]
        self._counts[row] = count
        if self.pool.low is not None and count % size:
            # The extremes of the page still count the forgotten keys; those of a page that others read stay.
            if self._ends_shared(row):
                self._own_last(row, self.pool.take(1)[0])
            self.pool.measure(pages[-1], count % size)

    def _refresh(self) -> None:
        width = max(map(len, self._pages))
        rows = [pages + [GIVEN_UP] * (width - len(pages)) for pages in self._pages]
        table = (
            torch.tensor(rows, dtype=torch.int32) if width else torch.zeros(self.batch, 0, dtype=torch.int32)
        )
        self.table = table.to(self.device)
        self.lengths = torch.tensor(self._counts, dtype=torch.int64, device=self.device)

    def _check_open(self) -> None:
        if self._freed:
            raise StoreError("these sequences were freed")
