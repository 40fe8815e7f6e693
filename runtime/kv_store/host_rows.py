"""Rows of keys and values in host memory, read one by one: the slow tier of policies that fetch tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.links import SimLink


class HostRows:
    """Rows [H, n, W] of one sequence and layer, H heads; written once, in order.

    Reads of rows that were written may run on another thread while rows are added.
    """

    label = "host memory"

    def __init__(self, heads: int, width: int, dtype: torch.dtype) -> None:
        self._memory = torch.empty(heads, 0, width, dtype=dtype)
        self.length = 0
        """Rows of each head."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one head."""
        return self._memory.shape[2] * self._memory.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory taken, spare rows included."""
        return self._memory.numel() * self._memory.element_size()

    def append(self, rows: Tensor) -> None:
        """Add rows [H, m, W] of any device."""
        end = self.length + rows.shape[1]
        if end > self._memory.shape[1]:
            old, (heads, size, width) = self._memory, self._memory.shape
            # A read under way keeps the old memory, which holds all that it may ask for.
            self._memory = old.new_empty(heads, max(end, size + size // 2), width)
            self._memory[:, : self.length] = old[:, : self.length]
        self._memory[:, self.length : end] = rows
        self.length = end

    def read(self, index: Tensor) -> Tensor:
        """[H, k, W]: rows index[h, i] of head h; int64 [H, k] in host memory. KVStoreError for a row that
        was not written."""
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.length:
            raise KVStoreError(f"rows {index.tolist()}: expected 0 to {self.length - 1}")
        memory = self._memory
        return memory.gather(1, index[:, :, None].expand(-1, -1, memory.shape[2]))


class LinkedRows(HostRows):
    """EMULATION of a slow tier: host memory behind a link that these rows may share with others."""

    def __init__(self, heads: int, width: int, dtype: torch.dtype, link: SimLink) -> None:
        super().__init__(heads, width, dtype)
        self._link, self.label = link, link.label

    def append(self, rows: Tensor) -> None:
        """As HostRows.append, over the link."""
        super().append(rows)
        self._link.carry(rows.numel() * rows.element_size())

    def read(self, index: Tensor) -> Tensor:
        """As HostRows.read, over the link."""
        found = super().read(index)
        self._link.carry(found.numel() * found.element_size())
        return found
