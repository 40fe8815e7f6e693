"""Keys that several sequences share are read once for all of them.

paper: arXiv:2402.14808 (RelayAttention). Queries of all sequences attend to the shared keys together, each
sequence to its own, and the two are merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory._paged_sites import SITES, decode_inputs, first_of, replace


@graph_pass(
    "relay-attention",
    stage=Stage.MEMORY,
    exactness=Exactness.ROUNDING,
    paper="arXiv:2402.14808",
    owns=("attention.placement",),
)
class RelayAttention(GraphPass):
    """Attend to the pages that all sequences share once for the batch, to the others for each sequence.

    rewrite:
        paged_attention(q, pool, table, lengths)
     -> merge(paged_attention(queries of the batch, pool, shared pages),
              paged_attention(q, pool, table without them, lengths))

    Which pages are shared is read from the table at every call, so that the rewrite holds for any table. The
    cache of `tilewright.kv_cache` finds them where sequences fork, also those of a part of the batch.
    """

    min_batch: int = 2
    """Fewest sequences that attend together."""
    min_prefix: int = 64
    """Fewest tokens shared: below, one more attention costs more than it saves."""

    def validate(self) -> None:
        if self.min_batch < 2:
            raise self.option_error("min_batch", "expected 2 sequences or more")
        if self.min_prefix < 1:
            raise self.option_error("min_prefix", "expected 1 token or more")

    def attend(self, q, k_pages, v_pages, table, lengths, first, scale):
        """The rewritten attention: (out, lse)."""
        shared = self._shared(table, lengths - q.shape[2], first, k_pages.shape[2])[None]
        everyone = torch.where(shared, table[:1], -1)
        common = attend_together(q, k_pages, v_pages, everyone, scale)
        alone = torch.where(shared, -1, table)
        out, lse = ops.paged_attention(q, k_pages, v_pages, alone, lengths, first, None, scale)
        out, lse = ops.merge_attention(common[0].to(lse.dtype), common[1], out, lse)
        return out.to(q.dtype), lse

    def _shared(self, table: Tensor, ends: Tensor, first: Tensor | None, page: int) -> Tensor:
        """bool [n]: the pages of all sequences, full of tokens that every query sees."""
        place = torch.arange(table.shape[1], device=table.device) * page
        same = (table == table[:1]).all(0) & (table[0] >= 0)
        same = same & (place >= first_of(ends, first).max()) & (place + page <= ends.min())
        return same & (same.sum() * page >= self.min_prefix)

    def apply(self, program: Program, log: PassLog) -> None:
        for node in [n for n in program.graph.nodes if n.target in SITES]:
            given = [*node.args, *(None,) * (8 - len(node.args))]
            if node.meta.get("tw_slots", {}).get("attention.placement") == self.name:
                continue  # a part that was cut before
            if node.target is not ops.paged_attention or given[6] is not None:
                log.refused(node, "what is attended was chosen for each sequence")
            elif (batch := given[0].meta["val"].shape[0]) < self.min_batch:
                log.refused(node, f"a batch of {batch} is below min_batch={self.min_batch}")
            elif log.take(node):
                replace(program, log, node, [*given[:6], given[7]], self.attend)
        log.finish(("paged_attention",))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few = {"min_prefix": 8}
        for queries in (1, 5):
            q, k, v, table, lengths, first = decode_inputs(queries)
            table[1, 3:], lengths[1] = table[0, 3:], 58
            yield few, Example(ops.paged_attention, (q, k, v, table, lengths, first))
            table[1], lengths[1] = table[0], 61
            yield few, Example(lambda *given: ops.paged_attention(*given)[0], (q, k, v, table, lengths))
        yield {}, Example(ops.paged_attention, decode_inputs())
        picked = torch.zeros(2, 1, 1, dtype=torch.int32)
        chosen = Example(ops.paged_attention, (*decode_inputs(), picked), refusal="chosen for each sequence")
        yield few, chosen
        yield {"min_batch": 3}, Example(ops.paged_attention, decode_inputs(), refusal="a batch of 2 is below")


def attend_together(q, k_pages, v_pages, row, scale, attention=ops.paged_attention):
    """(out [B, H, T, E], lse [B, H, T]): the queries q [B, H, T, D] of all sequences over all tokens of the
    pages `row` int32 [1, n], read once. Every query must stand behind them."""
    batch, heads, tokens, _ = q.shape
    rows = q.transpose(0, 1).reshape(1, heads, batch * tokens, -1)
    behind = row.new_full((1,), row.shape[1] * k_pages.shape[2] + batch * tokens, dtype=torch.int64)
    out, lse = attention(rows, k_pages, v_pages, row, behind, None, None, scale)
    out, lse = out.view(heads, batch, tokens, -1), lse.view(heads, batch, tokens)
    return out.transpose(0, 1), lse.transpose(0, 1)
