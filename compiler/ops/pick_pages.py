"""The pages that one query may attend to most, with those attended in any case: a choice in one op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright.compiler.ops.paged import page_bounds, top_pages
from tilewright.compiler.ops.registry import define


def forced_pages(places: int, page: int, lengths: Tensor, first: Tensor | None, sink: bool) -> Tensor:
    """bool [B, places]: the page of the newest token and, with `sink`, that of the first."""
    place = torch.arange(places, device=lengths.device)
    forced = place == torch.div(lengths - 1, page, rounding_mode="floor")[:, None]
    if sink:
        begin = torch.zeros_like(lengths) if first is None else first
        forced = forced | (place == torch.div(begin, page, rounding_mode="floor")[:, None])
    return forced


def _fake(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page: int,
    count: int,
    first: Tensor | None = None,
    sink: bool = True,
) -> Tensor:
    if count < 1:
        raise ValueError(f"pick_pages: count = {count} must be positive")
    return q.new_empty((q.shape[0], low.shape[1], min(count, page_table.shape[1])), dtype=torch.int32)


@define(
    "pick_pages(Tensor q, Tensor low, Tensor high, Tensor page_table, Tensor lengths, int page, int count, "
    "Tensor? first=None, bool sink=True) -> Tensor",
    flops=lambda q, low, high, page_table, *_, out, **__: 4 * q.numel() * page_table.shape[1],
    fake=_fake,
)
def pick_pages(
    q: Tensor,
    low: Tensor,
    high: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page: int,
    count: int,
    first: Tensor | None = None,
    sink: bool = True,
) -> Tensor:
    """int32 [B, Hkv, min(count, n)], as `top_pages` of `page_bounds` (the most of each group), but that the
    page of the newest token and, with `sink`, that of the first come before all others."""
    _fake(q, low, high, page_table, lengths, page, count, first, sink)
    bounds = page_bounds.definition(q, low, high, page_table, lengths, page, first)
    forced = forced_pages(page_table.shape[1], page, lengths, first, sink)
    return top_pages.definition(bounds.masked_fill(forced[:, None], math.inf), count)  # type: ignore[no-any-return]
