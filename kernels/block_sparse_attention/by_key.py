"""The entries of a layout listed by key block, for gradients of keys, which sum over query blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_by_key(
    row_ptr: Tensor, col: Tensor, flag: Tensor | None, key_blocks: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """CSR of the transposed layout: (key_ptr [G, nK + 1], row [G, C], flag [G, C] or None), int32.

    row_ptr [G, nQ + 1], col and flag [G, C] as in `BlockLayout`. Entries key_ptr[g, c] to key_ptr[g, c + 1]
    of row[g] are the query blocks, ascending, that attend to key block c. Plain tensor ops with static shapes
    that never wait for data: in a traced backward, layers that share a layout share this.
    """
    groups, rows = row_ptr.shape[0], row_ptr.shape[1] - 1
    places = torch.arange(col.shape[1], device=col.device, dtype=row_ptr.dtype).expand(groups, -1)
    row = torch.searchsorted(row_ptr[:, 1:].contiguous(), places.contiguous(), right=True)
    used = row < rows
    order_by = torch.where(used, col.long() * rows + row, key_blocks * rows)
    sorted_by, order = torch.sort(order_by, dim=1)
    starts = torch.arange(key_blocks + 1, device=col.device) * rows
    key_ptr = torch.searchsorted(sorted_by, starts.expand(groups, -1).contiguous())
    moved = None if flag is None else flag.gather(1, order)
    return key_ptr.to(torch.int32), (sorted_by % max(1, rows)).to(torch.int32), moved


def row_sums(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """delta [B, H, S] float32 = sum(dout * out) - dlse, which the gradient of every score subtracts."""
    delta = (dout.float() * out).sum(-1)
    return delta if dlse is None else delta - dlse
