"""A prompt is compressed once, to what its last tokens attend; what is generated stays.

paper: arXiv:2404.14469 (SnapKV). Keys keep their own positions. Neighbours are those by position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory import _evictions as evictions


@graph_pass(
    "snap-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2404.14469",
    owns=("attention.cache_policy",),
)
class SnapKV(GraphPass):
    """Keep `budget` tokens of a prompt: its last `window`, and those that they attend most.

    rewrite:
        paged_attention(q, pool, table, lengths), ... of later tokens over the same pool
     -> paged_attention(q, pool, table, lengths), token_attention(..., tokens kept), ...

    What a token gets from the last `window` queries is pooled over `kernel` neighbours, then summed over the
    query heads of a group. An attention of `window` queries or more is one of a prompt. As the policy of
    `tilewright.kv_cache` it frees the memory of what is given up.
    """

    budget: int = 1024
    """Tokens kept of a prompt, by each key head."""
    window: int = 32
    """Last tokens of the prompt: they choose, and stay."""
    kernel: int = 5
    """Neighbours that are pooled, an odd number."""
    pool: Literal["avg", "max"] = "avg"
    """How they are pooled."""
    dense_layers: int = 2
    """First layers that keep everything."""

    def validate(self) -> None:
        if self.window < 1:
            raise self.option_error("window", "expected 1 token or more")
        if self.budget <= self.window:
            raise self.option_error("budget", f"expected more than window = {self.window} tokens")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise self.option_error("kernel", "expected an odd number")
        if self.dense_layers < 0:
            raise self.option_error("dense_layers", "expected 0 layers or more")

    def worth(self, mass: Tensor, heads: int, lengths: Tensor, first: Tensor | None) -> Tensor:
        """[B, Hkv, S]: by what tokens stay, for Hkv = heads, from what each position of sequences of so many
        tokens gets from the window, [B, H, S]; 0 for what was given up before."""
        at = torch.arange(mass.shape[2], device=mass.device)
        observed = mass.masked_fill(at >= lengths[:, None, None] - self.window, 0.0)
        smooth = functional.avg_pool1d if self.pool == "avg" else functional.max_pool1d
        pooled = smooth(observed, self.kernel, stride=1, padding=self.kernel // 2)
        scores = pooled.unflatten(1, (heads, -1)).sum(2)
        return evictions.worth(scores, at.expand_as(scores), first, lengths - self.window)

    def apply(self, program: Program, log: PassLog) -> None:
        evictions.rewrite_steps(program, log, self._step, self.dense_layers)

    def _step(self, _layer, q, k_pages, v_pages, table, lengths, first, scale, kept=None):
        out, lse = evictions.attend_kept(q, k_pages, v_pages, table, lengths, first, scale, kept)
        heads, places = k_pages.shape[1], evictions.places(table, k_pages).shape[0]
        if kept is None:
            kept = torch.ones(q.shape[0], heads, places, dtype=torch.bool, device=q.device)
        if q.shape[2] < self.window:
            return out, lse, kept
        group = q.shape[1] // heads
        last = (q[:, :, -self.window :], k_pages.repeat_interleave(group, 1), table, lengths, first)
        mass = evictions.received(*last, lse[:, :, -self.window :], scale)
        mass = mass.masked_fill(~kept.repeat_interleave(group, 1), 0.0)
        return out, lse, evictions.keep(self.worth(mass, heads, lengths, first), kept, lengths, self.budget)

    def reference(self, program: Program) -> None:
        """Masked attention over all keys, scores from its probabilities, pools by sliding windows."""
        evictions.rewrite_steps(program, None, self._masked, self.dense_layers)

    def _masked(self, _layer, q, k_pages, v_pages, table, lengths, first, scale, kept=None):
        given = (q, k_pages, v_pages, table, lengths, first, scale, kept)
        out, lse, shares, held = evictions.masked_step(*given)
        at = evictions.places(table, k_pages)
        if q.shape[2] < self.window:
            return out, lse, held | (at >= lengths[:, None, None])
        newest, edge = at >= lengths[:, None] - self.window, self.kernel // 2
        observed = shares[:, :, :, -self.window :].sum(3) * ~newest[:, None, None]
        near = functional.pad(observed, (edge, edge)).unfold(3, self.kernel, 1)
        scores = (near.mean(4) if self.pool == "avg" else near.amax(4)).sum(2)
        stay = evictions.better(scores, held, newest, self.budget)
        return out, lse, stay | (at >= lengths[:, None, None])

    def exact_limit(self) -> SnapKV:
        return replace(self, budget=1 << 40)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few = {"budget": 11, "window": 4, "kernel": 3, "dense_layers": 0}
        grown = evictions.grown(16)
        yield few, Example(evictions.decode_steps((8, 1, 1, 6)), grown, count=4)
        yield {**few, "pool": "max"}, Example(evictions.decode_steps((8, 2, 5, 1)), grown[:5], count=4)
        yield few, Example(ops.paged_attention, grown, refusal="no other attention")
        yield {}, Example(evictions.decode_steps((8, 3)), grown, refusal="layer 0 is one of the first 2")
        picked = torch.zeros(2, 1, 1, dtype=torch.int32)
        yield few, Example(ops.paged_attention, (*grown, picked), refusal="chosen before")
