"""The pages of one layer: plain tensors, a free list and reference counts."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

PAGE_SIZES = (8, 16, 32, 64, 128)
"""Tokens of a page."""


class StoreError(ValueError):
    """A store was asked for what it does not have: names the argument, its value and the legal range."""


class PagePool:
    """Pages of keys and values of one layer.

    `k_pages` [N, Hkv, P, D] and `v_pages` [N, Hkv, P, E] are replaced when the pool grows: read them anew for
    every call. With `planes`, `low` and `high` [N, Hkv, D] keep the extremes of the keys of each page; they
    are None otherwise. One caller at a time.
    """

    def __init__(
        self,
        kv_heads: int,
        key_size: int,
        value_size: int | None = None,
        *,
        page: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        planes: bool = False,
        limit: int | None = None,
    ) -> None:
        """limit: pages that the pool may hold at most; None: no limit. value_size: None for `key_size`."""
        if page not in PAGE_SIZES:
            raise StoreError(f"page = {page}: expected one of {', '.join(map(str, PAGE_SIZES))}")
        sizes = {"kv_heads": kv_heads, "key_size": key_size, "value_size": value_size, "limit": limit}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise StoreError(f"{name} = {size}: expected 1 or more")
        self.page = page
        self.limit = limit
        self.k_pages = torch.zeros(0, kv_heads, page, key_size, dtype=dtype, device=device)
        self.v_pages = torch.zeros(0, kv_heads, page, value_size or key_size, dtype=dtype, device=device)
        self.low = self.k_pages.new_zeros(0, kv_heads, key_size) if planes else None
        self.high = self.k_pages.new_zeros(0, kv_heads, key_size) if planes else None
        self._free: list[int] = []
        self._uses: list[int] = []

    @property
    def in_use(self) -> int:
        """Pages that someone holds."""
        return len(self._uses) - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, held or not, without the planes."""
        return self.k_pages.nbytes + self.v_pages.nbytes

    def uses(self, page: int) -> int:
        """How many sequences hold a page."""
        self._check(page)
        return self._uses[page]

    def take(self, count: int) -> list[int]:
        """`count` pages that nobody held, each held once now. Their contents are left over from before."""
        if count < 0:
            raise StoreError(f"count = {count}: expected 0 or more pages")
        if count > len(self._free):
            self._grow(self.in_use + count)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._uses[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """Hold pages once more."""
        pages = list(pages)
        for page in pages:
            self._check(page)
        for page in pages:
            self._uses[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Hold pages once less; a page that nobody holds is free again."""
        for page in pages:
            self._check(page)
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """Make page `target` equal to page `source`, planes included."""
        self._check(source)
        self._check(target)
        for tensor in (self.k_pages, self.v_pages, self.low, self.high):
            if tensor is not None:
                tensor[target] = tensor[source]

    def measure(self, page: int, tokens: int) -> None:
        """Set the planes of a page from its first `tokens` keys."""
        self._check(page)
        if self.low is not None and self.high is not None:
            keys = self.k_pages[page, :, :tokens]
            self.low[page] = keys.amin(1) if tokens else math.inf
            self.high[page] = keys.amax(1) if tokens else -math.inf

    def _check(self, page: int) -> None:
        if not 0 <= page < len(self._uses) or not self._uses[page]:
            raise StoreError(f"page {page} is not held; the pool has {len(self._uses)} pages")

    def _grow(self, needed: int) -> None:
        """At least `needed` pages, twice as many as now where the limit allows."""
        held = len(self._uses)
        if self.limit is not None and needed > self.limit:
            raise StoreError(f"{needed} pages are needed and limit = {self.limit} pages")
        size = max(needed, 2 * held)
        size = size if self.limit is None else min(size, self.limit)

        def larger(old: Tensor) -> Tensor:
            new = old.new_zeros(size, *old.shape[1:])
            new[:held] = old
            return new

        self.k_pages, self.v_pages = larger(self.k_pages), larger(self.v_pages)
        if self.low is not None and self.high is not None:
            self.low, self.high = larger(self.low), larger(self.high)
        self._free.extend(range(size - 1, held - 1, -1))
        self._uses.extend([0] * (size - held))
