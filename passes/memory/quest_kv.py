"""Attention over the pages that may matter to the query; nothing is given up.

paper: arXiv:2406.10774 (Quest). The extremes of the keys of a page bound the logits of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.compiler.ops.pick_pages import forced_pages
from tilewright.passes.memory._paged_sites import (
    choose_at_sites,
    decode_inputs,
    first_of,
    masked_attention,
)


@graph_pass(
    "quest-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2406.10774",
    owns=("attention.cache_policy",),
)
class QuestKV(GraphPass):
    """Attend the pages with the greatest bounds, the page of the newest token always among them.

    rewrite:
        paged_attention(q, pool, table, lengths)
     -> paged_attention(q, pool, table, lengths, picked=pages of the greatest bounds)

    In a graph the extremes are computed from the pages at every call, which reads all keys: it says what the
    policy means. The cache of `tilewright.kv_cache` keeps them up to date instead.
    """

    budget: int = 1024
    """Tokens attended: a multiple of `page`."""
    page: int = 16
    """Tokens of a page of the pool."""
    sink_page: bool = True
    """Always attend the first page, too."""
    dense_layers: int = 2
    """First layers that attend to everything."""

    def validate(self) -> None:
        if self.page not in (8, 16, 32, 64, 128):
            raise self.option_error("page", "expected one of 8, 16, 32, 64, 128")
        if self.budget < 3 * self.page or self.budget % self.page:
            raise self.option_error("budget", f"expected a multiple of page, {3 * self.page} or more")
        if self.dense_layers < 0:
            raise self.option_error("dense_layers", "expected 0 layers or more")

    def picked(self, bounds: Tensor, lengths: Tensor, first: Tensor | None) -> Tensor:
        """int32 [B, Hkv, m]: the places of the pages attended, from `page_bounds` [B, Hkv, n]."""
        forced = forced_pages(bounds.shape[2], self.page, lengths, first, self.sink_page)
        bounds = bounds.masked_fill(forced[:, None], float("inf"))
        found: Tensor = ops.top_pages(bounds, self.budget // self.page)
        return found

    def attend(self, q, k_pages, v_pages, table, lengths, first, scale):
        """The rewritten attention: (out, lse)."""
        planes, count = (k_pages.amin(2), k_pages.amax(2)), self.budget // self.page
        chosen = ops.pick_pages(q, *planes, table, lengths, self.page, count, first, self.sink_page)
        return ops.paged_attention(q, k_pages, v_pages, table, lengths, first, chosen, scale)

    def apply(self, program: Program, log: PassLog) -> None:
        choose_at_sites(program, log, self.attend, self.dense_layers, self.page)

    def reference(self, program: Program) -> None:
        """Masked attention over all keys; a page counts where few have a greater bound."""
        choose_at_sites(program, None, self._masked, self.dense_layers, self.page)

    def _masked(self, q, k_pages, v_pages, table, lengths, first, scale):
        begin, places = first_of(lengths, first)[:, None], table.shape[1]
        keys = k_pages[table.clamp(min=0).long()].transpose(1, 2)
        rows = q.unflatten(1, (k_pages.shape[1], -1))
        least, most = keys.amin(3)[:, :, None], keys.amax(3)[:, :, None]
        bounds = torch.maximum(rows * least, rows * most).sum(-1).amax(2)
        page = torch.arange(places, device=q.device)
        held = (page >= begin // self.page) & (page * self.page < lengths[:, None])
        forced = page == (lengths[:, None] - 1) // self.page
        if self.sink_page:
            forced = forced | (page == begin // self.page)
        bounds = bounds.masked_fill(forced[:, None], float("inf")).masked_fill(~held[:, None], float("-inf"))
        others, own = bounds[:, :, None], bounds[:, :, :, None]
        before = (others > own) | ((others == own) & (page < page[:, None]))
        kept = held[:, None] & (before.sum(3) < self.budget // self.page)
        at = torch.arange(places * self.page, device=q.device)
        inside = (at >= begin) & (at < lengths[:, None])
        kept = kept.repeat_interleave(self.page, 2) & inside[:, None]
        return masked_attention(q, k_pages, v_pages, table, kept, scale)

    def exact_limit(self) -> QuestKV:
        return replace(self, budget=self.page << 40)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few = {"budget": 32, "page": 8, "dense_layers": 0}
        inputs = decode_inputs()
        yield few, Example(ops.paged_attention, inputs)
        yield {**few, "sink_page": False}, Example(lambda *given: ops.paged_attention(*given)[0], inputs[:5])
        yield {"page": 8}, Example(ops.paged_attention, inputs, refusal="layer 0 is one of the first 2")
        wide = {**few, "page": 16, "budget": 64}
        yield wide, Example(ops.paged_attention, inputs, refusal="the policy is for 16")
