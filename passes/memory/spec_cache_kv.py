"""Attention over a copy of keys and values in few bits, with the rows that matter most in full precision.

paper: arXiv:2503.16163 (SpeCache). The copy is in fast memory; a guess of the next token tells, a step ahead,
which rows to fetch from slow memory, where all of them lie. The codes are those of arXiv:2402.02750 (KIVI).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.compiler.ops.paged import PAGE_SIZES
from tilewright.compiler.quantizers import IDENTITY_BITS
from tilewright.passes.memory import _few_bits as few_bits
from tilewright.passes.memory._paged_sites import choose_at_sites, decode_inputs, first_of
from tilewright.passes.memory._shadow import attended, marked, shifted


@graph_pass(
    "spec-cache-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2503.16163",
    owns=("attention.cache_policy",),
)
class SpecCacheKV(GraphPass):
    """Attend keys and values rounded to `bits`, but the `budget` rows that a query ranks highest as they are.

    rewrite:
        paged_attention(q, pool, table, lengths)
     -> attention(q, rounded rows | rows ranked highest by attention to the rounded ones | newest rows)

    In a graph the query ranks for itself, as after a right guess, and the pool stays: it says what the policy
    means and saves nothing. The cache of `tilewright.kv_cache` keeps codes, and the rows of this step that
    the guess of the step before ranked: `tilewright.frontends.kv_spec_generate` takes two tokens a step.
    """

    bits: int = 2
    """1, 2, 4 or 8; 16 stands for the exact limit, which changes nothing."""
    group: int = 32
    """Tokens of a channel of keys, or channels of a value, that share a scale: 8 to 128."""
    residual: int = 64
    """Newest tokens that stay as they are, at least: a multiple of `group`."""
    budget: int = 64
    """Rows in full precision, by each key head."""
    heads: Literal["sum", "max"] = "sum"
    """How the query heads of a key head rank a row: by the sum of their shares or by the greatest."""
    on_late: Literal["wait", "lowbit"] = "wait"
    """Rows not fetched in time: wait for them, or attend what is rounded, whichever rows that are."""

    on_wrong: Literal["keep", "again"] = "keep"
    """After a guess that was not the token: keep what it chose and leads to, or guess anew behind the token,
    by a forward more."""

    def validate(self) -> None:
        if self.bits not in (1, 2, 4, 8, IDENTITY_BITS):
            raise self.option_error("bits", f"expected 1, 2, 4, 8 or {IDENTITY_BITS} for none")
        if self.group not in PAGE_SIZES:
            raise self.option_error("group", f"expected one of {', '.join(map(str, PAGE_SIZES))}")
        if self.residual < self.group or self.residual % self.group:
            raise self.option_error("residual", f"expected a multiple of group = {self.group}")
        if self.budget < 1:
            raise self.option_error("budget", "expected 1 row or more")

    def coded(self, count: Any) -> Any:
        """Of `count` tokens, how many are rounded: whole groups behind the newest; 0 or less for none.
        An int or a tensor."""
        return (count - self.residual) // self.group * self.group

    def ranks(self, shares: Tensor) -> Tensor:
        """[..., S]: what rows are ranked by, of the shares [..., G, S] that G query heads give them."""
        return shares.sum(-2) if self.heads == "sum" else shares.amax(-2)

    def attend(self, q, k_pages, v_pages, table, lengths, first, scale):
        """The rewritten attention: (out, lse)."""
        return self._mixed(q, k_pages, v_pages, table, lengths, first, scale, False)

    def _mixed(self, q, k_pages, v_pages, table, lengths, first, scale, plain):
        begin, heads = first_of(lengths, first), k_pages.shape[1]
        k, v = (shifted(pages, table, begin) for pages in (k_pages, v_pages))
        at, count = torch.arange(k.shape[2], device=q.device), (lengths - begin)[:, None, None]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        old, held = at < self.coded(count), at < count
        near_k, near_v = self._rounded_plainly(k, v) if plain else self._rounded(k, v)
        near_k = torch.where(old[..., None], near_k.to(k.dtype), k)
        logits = q @ near_k.repeat_interleave(q.shape[1] // heads, 1).mT * scale
        shares = logits.masked_fill(~held[:, :, None], float("-inf")).softmax(-1)[:, :, 0]
        ranks = self.ranks(shares.unflatten(1, (heads, -1)))
        if plain:
            ranks = ranks.masked_fill(~old, -1.0)
            kept = (ranks[..., None, :] > ranks[..., None]).sum(-1) < self.budget
        else:
            kept = marked(ranks, old.expand_as(ranks), self.budget)
        exact = (kept | ~old)[..., None]
        k, v = torch.where(exact, k, near_k), torch.where(exact, v, near_v.to(v.dtype))
        return attended(q, k, v, held.expand(-1, heads, -1), scale)

    def _rounded(self, k, v):
        size = k.shape[2]
        whole = functional.pad(k, (0, 0, 0, -size % self.group))
        keys = few_bits.encoded_keys(whole, self.group, self.bits)
        values = few_bits.encoded_values(v, self.group, self.bits)
        return few_bits.near_keys(keys, self.bits)[:, :, :size], few_bits.near_values(values, self.bits)

    def _rounded_plainly(self, k, v):
        parts = [few_bits.rounded(part.mT, self.bits).mT for part in k.split(self.group, 2)]
        values = [few_bits.rounded(part, self.bits) for part in v.split(self.group, 3)]
        return torch.cat(parts, 2), torch.cat(values, 3)

    def apply(self, program: Program, log: PassLog) -> None:
        if self.bits == IDENTITY_BITS:
            log.note("16 bits: keys and values stay as they are")
            return
        choose_at_sites(program, log, self.attend, 0, None, self.group)

    def reference(self, program: Program) -> None:
        """Rounding by its formulas, group by group; rows count where few have a greater rank."""
        if self.bits != IDENTITY_BITS:
            choose_at_sites(program, None, self._plain, 0, None, self.group)

    def _plain(self, q, k_pages, v_pages, table, lengths, first, scale):
        return self._mixed(q, k_pages, v_pages, table, lengths, first, scale, True)

    def exact_limit(self) -> SpecCacheKV:
        return replace(self, budget=1 << 40)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict[str, Any], Example]]:
        few = {"group": 8, "residual": 8, "budget": 9}
        inputs = decode_inputs()
        yield few, Example(ops.paged_attention, inputs)
        yield {**few, "bits": 1, "heads": "max"}, Example(lambda *x: ops.paged_attention(*x)[0], inputs[:5])
        yield {**few, "bits": 4, "residual": 24}, Example(ops.paged_attention, inputs)
        yield few, Example(ops.paged_attention, decode_inputs(2), refusal="2 queries at once")
        yield {}, Example(ops.paged_attention, inputs, refusal="groups of 32 do not divide")
