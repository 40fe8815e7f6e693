"""The pages of one layer: tensors that grow by doubling, reference counts, a list of free pages."""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor

from tilewright.runtime.kv_store.errors import KVStoreError, OutOfPages

FIRST_PAGES = 8
"""Pages of a pool when it first holds anything."""


class PagePool:
    """k_pages [N, Hkv, P, D] and v_pages [N, Hkv, P, E] of one layer, `low` and `high` [N, Hkv, D] if asked.

    Rows come with `sizes` channels of `dtype`. A packed pool keeps them as bytes, uint8 [N, Hkv, P, W]: what
    the bytes mean is between those who write and who read.

    The tensors are replaced when the pool grows: fetch them anew for every call. A page that nobody refers
    to is given out again, lowest number first, so that equal schedules use equal pages.
    """

    def __init__(
        self,
        heads: int,
        size: int,
        value_size: int,
        *,
        page: int,
        dtype: torch.dtype,
        device: torch.device,
        limit: int | None = None,
        extremes: bool = False,
        packed: tuple[int, int] | None = None,
    ) -> None:
        """limit: most pages ever held; None for no limit. packed: bytes of a row of keys and of values; None:
        rows are kept as they come. KVStoreError for sizes below 1."""
        for name, value in dict(heads=heads, size=size, value_size=value_size, page=page).items():
            if value < 1:
                raise KVStoreError(f"{name} = {value}: expected 1 or more")
        if limit is not None and limit < 1:
            raise KVStoreError(f"limit = {limit}: expected 1 page or more, or None")
        if packed is not None and (extremes or min(packed) < 1):
            raise KVStoreError(f"packed = {packed}: expected 1 byte or more of each, and no extremes")
        self.page, self.limit = page, limit
        self.sizes, self.dtype = (size, value_size), dtype
        widths, kept = (self.sizes, dtype) if packed is None else (packed, torch.uint8)
        self.k_pages = torch.zeros(0, heads, page, widths[0], dtype=kept, device=device)
        self.v_pages = self.k_pages.new_zeros(0, heads, page, widths[1])
        self.low: Tensor | None = self.k_pages.new_zeros(0, heads, size) if extremes else None
        self.high: Tensor | None = self.k_pages.new_zeros(0, heads, size) if extremes else None
        self._references: list[int] = []
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Pages that something refers to."""
        return len(self._references) - len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page."""
        rows: int = math.prod(self.k_pages.shape[1:]) + math.prod(self.v_pages.shape[1:])
        return rows * self.k_pages.element_size()

    def references(self, page: int) -> int:
        """How many views refer to a page."""
        self._check(page)
        return self._references[page]

    def allocate(self) -> int:
        """A page with one reference; its contents are what they were. OutOfPages at the limit."""
        if not self._free:
            self._grow()
        page = heapq.heappop(self._free)
        self._references[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more reference to a page that is held."""
        self._check(page)
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One reference less; the page is free after the last."""
        self._check(page)
        self._references[page] -= 1
        if not self._references[page]:
            heapq.heappush(self._free, page)

    def copy(self, page: int) -> int:
        """A new page with the contents of `page`."""
        self._check(page)
        new = self.allocate()
        for plane in self._planes():
            plane[new] = plane[page]
        return new

    def measure(self, page: int, tokens: int) -> None:
        """Set the extremes of a page to those of its first `tokens` keys, 1 or more."""
        self._check(page)
        if self.low is not None and self.high is not None:
            keys = self.k_pages[page, :, :tokens]
            self.low[page], self.high[page] = keys.amin(1), keys.amax(1)

    def _planes(self) -> list[Tensor]:
        return [x for x in (self.k_pages, self.v_pages, self.low, self.high) if x is not None]

    def _check(self, page: int) -> None:
        if not 0 <= page < len(self._references) or not self._references[page]:
            raise KVStoreError(f"page {page} is not held")

    def _grow(self) -> None:
        old = len(self._references)
        new = max(FIRST_PAGES, 2 * old)
        if self.limit is not None:
            new = min(new, self.limit)
        if new <= old:
            raise OutOfPages(f"all {old} pages are in use; the limit is {self.limit}")
        for name in ("k_pages", "v_pages", "low", "high"):
            plane: Tensor | None = getattr(self, name)
            if plane is not None:
                grown = plane.new_zeros(new, *plane.shape[1:])
                grown[:old] = plane
                setattr(self, name, grown)
        self._references += [0] * (new - old)
        for page in range(old, new):
            heapq.heappush(self._free, page)
