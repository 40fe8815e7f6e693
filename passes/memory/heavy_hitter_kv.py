"""A cache of constant size: the tokens that got the most attention so far, and the newest.

paper: arXiv:2306.14048 (H2O). Keys keep their own positions. Scores are sums over the query heads of a group,
for each sequence of a batch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory import _evictions as evictions


@graph_pass(
    "heavy-hitter-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2306.14048",
    owns=("attention.cache_policy",),
)
class HeavyHitterKV(GraphPass):
    """Keep `budget` tokens of each key head: the newest `recent`, and those that got the most attention.

    rewrite:
        paged_attention(q, pool, table, lengths), ... of later tokens over the same pool
     -> paged_attention(q, pool, table, lengths), token_attention(..., tokens kept), ...

    A token's score is the sum of the probabilities that it got from all queries so far; what is given up
    never comes back. As the policy of `tilewright.kv_cache` it frees the memory of what is given up.
    """

    budget: int = 1024
    """Tokens kept of each key head."""
    recent: int = 512
    """Newest tokens that stay, whatever their score."""
    dense_layers: int = 2
    """First layers that keep everything."""

    def validate(self) -> None:
        if self.recent < 1:
            raise self.option_error("recent", "expected 1 token or more")
        if self.budget < self.recent:
            raise self.option_error("budget", f"expected recent = {self.recent} tokens or more")
        if self.dense_layers < 0:
            raise self.option_error("dense_layers", "expected 0 layers or more")

    def worth(self, scores: Tensor, positions: Tensor, lengths: Tensor, first: Tensor | None) -> Tensor:
        """By what tokens stay, of sequences of so many tokens: [B, Hkv, n]."""
        return evictions.worth(scores, positions, first, lengths - self.recent)

    def apply(self, program: Program, log: PassLog) -> None:
        evictions.rewrite_steps(program, log, self._step, self.dense_layers)

    def _step(self, _layer, q, k_pages, v_pages, table, lengths, first, scale, kept=None, scores=None):
        out, lse = evictions.attend_kept(q, k_pages, v_pages, table, lengths, first, scale, kept)
        new = evictions.received(q, k_pages, table, lengths, first, lse, scale)
        if kept is None:
            kept, scores = torch.ones_like(new, dtype=torch.bool), torch.zeros_like(new)
        scores = scores + new.masked_fill(~kept, 0.0)
        at = evictions.places(table, k_pages).expand_as(scores)
        worth = self.worth(scores, at, lengths, first)
        return out, lse, evictions.keep(worth, kept, lengths, self.budget), scores

    def reference(self, program: Program) -> None:
        """Masked attention over all keys, scores from its probabilities, ranks by comparison of all pairs."""
        evictions.rewrite_steps(program, None, self._masked, self.dense_layers)

    def _masked(self, _layer, q, k_pages, v_pages, table, lengths, first, scale, kept=None, scores=None):
        given = (q, k_pages, v_pages, table, lengths, first, scale, kept)
        out, lse, shares, held = evictions.masked_step(*given)
        scores = shares.sum((2, 3)) + (0.0 if scores is None else scores)
        at = evictions.places(table, k_pages)
        stay = evictions.better(scores, held, at >= lengths[:, None] - self.recent, self.budget)
        return out, lse, stay | (at >= lengths[:, None, None]), scores

    def exact_limit(self) -> HeavyHitterKV:
        return replace(self, budget=1 << 40)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few = {"budget": 9, "recent": 4, "dense_layers": 0}
        grown = evictions.grown(11)
        yield few, Example(evictions.decode_steps((8, 1, 1, 1)), grown, count=4)
        yield {**few, "recent": 9}, Example(evictions.decode_steps((8, 2, 1)), grown[:5], count=3)
        yield few, Example(ops.paged_attention, grown, refusal="no other attention")
        yield {}, Example(evictions.decode_steps((8, 3)), grown, refusal="layer 0 is one of the first 2")
        picked = torch.zeros(2, 1, 1, dtype=torch.int32)
        yield few, Example(ops.paged_attention, (*grown, picked), refusal="chosen before")
