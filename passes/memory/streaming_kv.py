"""Attention over the first tokens of a sequence and a window of its newest.

paper: arXiv:2309.17453 (StreamingLLM). Keys keep their own positions: within the trained context this is the
paper's rule, beyond it the paper moves the first keys closer, which is not done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory._paged_sites import (
    choose_at_sites,
    decode_inputs,
    first_of,
    masked_attention,
)


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

    def validate(self) -> None:
        if not 0 <= self.sinks <= 1024:
            raise self.option_error("sinks", "expected 0 to 1024 tokens")
        if self.window < 1:
            raise self.option_error("window", "expected 1 token or more")
        if self.dense_layers < 0:
            raise self.option_error("dense_layers", "expected 0 layers or more")

    def positions(self, lengths: Tensor, first: Tensor | None, size: int) -> Tensor:
        """int32 [B, 1, m]: what is attended of sequences of at most `size` tokens; -1 for unused entries."""
        begin, window = first_of(lengths, first)[:, None], min(self.window, size)
        recent = lengths[:, None] - window + torch.arange(window, device=lengths.device)
        sinks = begin + torch.arange(min(self.sinks, size), device=lengths.device)
        sinks = torch.where(sinks < lengths[:, None] - window, sinks, -1)
        recent = torch.where(recent >= begin, recent, -1)
        return torch.cat([sinks, recent], 1).to(torch.int32)[:, None]

    def given_up(self, length: int, first: int, page: int) -> range:
        """Places of the pages that no later token attends, of one sequence of `length` tokens."""
        return range(-(-(first + self.sinks) // page), (length + 1 - self.window) // page)

    def attend(self, q, k_pages, v_pages, table, lengths, first, scale):
        """The rewritten attention: (out, lse)."""
        positions = self.positions(lengths, first, table.shape[1] * k_pages.shape[2])
        return ops.token_attention(q, k_pages, v_pages, table, lengths, positions, first, scale)

    def apply(self, program: Program, log: PassLog) -> None:
        choose_at_sites(program, log, self.attend, self.dense_layers, None)

    def reference(self, program: Program) -> None:
        """Masked attention over all keys."""

        def masked(q, k_pages, v_pages, table, lengths, first, scale):
            begin = first_of(lengths, first)
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
        yield few, Example(lambda *given: ops.paged_attention(*given)[0], inputs[:5])
        yield {}, Example(ops.paged_attention, inputs, refusal="layer 0 is one of the first 2")
        yield few, Example(ops.paged_attention, decode_inputs(2), refusal="2 queries at once")
        picked = torch.zeros(2, 1, 1, dtype=torch.int32)
        yield few, Example(ops.paged_attention, (*inputs, picked), refusal="chosen before")
