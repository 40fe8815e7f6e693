"""Attention over the first tokens of a sequence and a window of its newest.

paper: arXiv:2309.17453 (StreamingLLM). With positions=cache tokens count their positions among those that are
kept, as in the paper: the window moves as a whole, with the query, and only the distance to the first keys
changes. A rotary embedding sees distances alone: the query is turned back for these keys, and keys stay as
they are. With positions=original, the default, every token keeps its own position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory._paged_sites import (
    choose_at_sites,
    decode_inputs,
    first_of,
    masked_attention,
)
from tilewright.passes.memory._shadow import pace_of


@graph_pass(
    "streaming-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2309.17453",
    owns=("attention.cache_policy",),
)
class StreamingKV(GraphPass):
    """Attend the first `sinks` tokens that are no padding, and the newest `window`.

    rewrite:
        paged_attention(q, pool, table, lengths)
     -> token_attention(q, pool, table, lengths, sinks and window)

    As the policy of `tilewright.kv_cache` it also gives up the pages in between.
    """

    sinks: int = 4
    """First tokens that stay."""
    window: int = 1020
    """Newest tokens that stay."""
    dense_layers: int = 2
    """First layers that attend to everything."""
    positions: Literal["original", "cache"] = "original"
    """Whether distances are counted between all tokens or between those that are kept."""
    theta: float = 0.0
    """Of the model's rotary embedding (halves), which positions=cache needs; else 0."""

    def validate(self) -> None:
        if not 0 <= self.sinks <= 1024:
            raise self.option_error("sinks", "expected 0 to 1024 tokens")
        if self.window < 1:
            raise self.option_error("window", "expected 1 token or more")
        if self.dense_layers < 0:
            raise self.option_error("dense_layers", "expected 0 layers or more")
        if (self.theta <= 1) if self.positions == "cache" else (self.theta != 0):
            raise self.option_error("theta", "expected more than 1 with positions=cache, else 0")

    def kept(self, lengths: Tensor, first: Tensor | None, size: int) -> Tensor:
        """int32 [B, 1, m]: what is attended of sequences of at most `size` tokens, the sinks first; -1 for
        unused entries."""
        begin, window = first_of(lengths, first)[:, None], min(self.window, size)
        recent = lengths[:, None] - window + torch.arange(window, device=lengths.device)
        sinks = begin + torch.arange(min(self.sinks, size), device=lengths.device)
        sinks = torch.where(sinks < lengths[:, None] - window, sinks, -1)
        recent = torch.where(recent >= begin, recent, -1)
        return torch.cat([sinks, recent], 1).to(torch.int32)[:, None]

    def given_up(self, length: int, first: int, page: int) -> range:
        """Places of the pages that no later token attends, of one sequence of `length` tokens."""
        return range(-(-(first + self.sinks) // page), (length + 1 - self.window) // page)

    def nearer(self, lengths: Tensor, first: Tensor | None) -> Tensor:
        """int64 [B]: by how many positions the sinks of each sequence come nearer to its newest token."""
        return (lengths - first_of(lengths, first) - self.sinks - self.window).clamp(min=0)

    def attend(
        self, q, k_pages, v_pages, table, lengths, first, scale,
        attention=ops.token_attention, turn=ops.rotate_rows,
    ):  # fmt: skip
        """(out, lse). `attention`: what computes `token_attention`, `turn`: `rotate_rows`."""
        pages, size = (k_pages, v_pages, table, lengths), table.shape[1] * k_pages.shape[2]
        kept = self.kept(lengths, first, size)
        if self.positions == "original" or not self.sinks:
            return attention(q, *pages, kept, first, scale)
        sinks, recent = kept.tensor_split([min(self.sinks, size)], 2)
        back = self.nearer(lengths, first)[:, None, None]
        turned = turn(q, -back, pace_of(self.theta, q.shape[3], q.device))
        out, lse = attention(q, *pages, recent.contiguous(), first, scale)
        part, total = attention(turned, *pages, sinks.contiguous(), first, scale)
        out, lse = ops.merge_attention(out.to(lse.dtype), lse, part.to(lse.dtype), total)
        return out.to(q.dtype), lse

    def apply(self, program: Program, log: PassLog) -> None:
        choose_at_sites(program, log, self.attend, self.dense_layers, None)

    def reference(self, program: Program) -> None:
        """Masked attention over all keys, the sinks moved by positions=cache."""

        def masked(q, k_pages, v_pages, table, lengths, first, scale):
            begin = first_of(lengths, first)
            if self.positions == "cache":
                pace, by = pace_of(self.theta, q.shape[3], q.device), self.nearer(lengths, first)
                moved = ops.rotate_rows(k_pages, by[:, None, None], pace, table)
                moved = moved.unflatten(2, (table.shape[1], -1)).transpose(1, 2)
                k_pages, v_pages = (pages[table.clamp(min=0).long()] for pages in (k_pages, v_pages))
                place = torch.arange(table.numel() // len(table) * k_pages.shape[3], device=q.device)
                sink = place.view(k_pages.shape[1], 1, -1, 1) < begin[:, None, None, None, None] + self.sinks
                k_pages, v_pages = torch.where(sink, moved, k_pages).flatten(0, 1), v_pages.flatten(0, 1)
                table = torch.arange(table.numel(), device=q.device).view_as(table)
            at = torch.arange(table.shape[1] * k_pages.shape[2], device=q.device)
            kept = (at < begin[:, None] + self.sinks) | (at >= lengths[:, None] - self.window)
            kept = kept & (at >= begin[:, None]) & (at < lengths[:, None])
            return masked_attention(q, k_pages, v_pages, table, kept[:, None], scale)

        choose_at_sites(program, None, masked, self.dense_layers, None)

    def exact_limit(self) -> StreamingKV:
        return replace(self, window=1 << 40)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few = {"sinks": 3, "window": 9, "dense_layers": 0}
        inputs = decode_inputs()
        yield few, Example(ops.paged_attention, inputs)
        yield {**few, "positions": "cache", "theta": 100.0}, Example(ops.paged_attention, inputs)
        yield few, Example(lambda *given: ops.paged_attention(*given)[0], inputs[:5])
        yield {}, Example(ops.paged_attention, inputs, refusal="layer 0 is one of the first 2")
        yield few, Example(ops.paged_attention, decode_inputs(2), refusal="2 queries at once")
        picked = torch.zeros(2, 1, 1, dtype=torch.int32)
        yield few, Example(ops.paged_attention, (*inputs, picked), refusal="chosen before")
