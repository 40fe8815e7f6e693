"""Attention over one set of tokens for all heads, chosen at few layers and reused by those that follow.

paper: arXiv:2508.07101 (LessIsMore). The layers that choose attend to everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory import _early_choice as early
from tilewright.passes.memory._paged_sites import SITES, decode_inputs, first_of, replace


@graph_pass(
    "lessismore-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2508.07101",
    owns=("attention.cache_policy",),
)
class LessIsMoreKV(GraphPass):
    """Attend `budget` tokens: the newest, the first, and those that the heads of an earlier layer ranked
    highest.

    rewrite:
        paged_attention(q, pool, table, lengths)
     -> token_attention(q, pool, table, lengths, positions chosen at an earlier layer)

    A layer that chooses ranks the raw logits of every query head; the best of each head are taken in turn,
    rank by rank and each token once. Layers before the first that chooses attend to everything.
    """

    budget: int = 2048
    """Tokens attended."""
    recent: float = 0.25
    """Share of the budget for the newest tokens, the sinks among them."""
    sinks: int = 4
    """First tokens that stay, taken from the newest tokens' share; none where that share is smaller."""
    select_layers: tuple[int, ...] = ()
    """Layers that choose, ascending; empty: 2 and half of the layers."""

    def validate(self) -> None:
        if self.budget < 1:
            raise self.option_error("budget", "expected 1 token or more")
        if not 0.0 <= self.recent <= 1.0:
            raise self.option_error("recent", "expected 0 to 1")
        if not 0 <= self.sinks <= 1024:
            raise self.option_error("sinks", "expected 0 to 1024 tokens")
        if list(self.select_layers) != sorted({abs(layer) for layer in self.select_layers}):
            raise self.option_error("select_layers", "expected distinct layers, ascending from 0")

    def choosing(self, layers: int) -> tuple[int, ...]:
        """The layers that choose, of a model of `layers`."""
        if self.select_layers:
            return self.select_layers
        return tuple(sorted({min(2, layers - 1), max(layers // 2, min(2, layers - 1))}))

    def shares(self) -> tuple[int, int, int]:
        """(sinks, newest tokens, ranked tokens); their sum is the budget."""
        ranked = int(self.budget * (1 - self.recent))
        newest = self.budget - ranked
        sinks = self.sinks if newest >= self.sinks else 0
        return sinks, newest - sinks, ranked

    def positions(self, logits: Tensor, lengths: Tensor, first: Tensor | None) -> Tensor:
        """int32 [B, 1, m]: the tokens attended, from raw logits [B, H, S] (-inf where none is held); -1 for
        unused entries."""
        size, (sinks, newest, ranked) = logits.shape[2], self.shares()
        begin, end = first_of(lengths, first)[:, None], lengths[:, None]
        at = torch.arange(size, device=logits.device)
        middle = (at >= begin + sinks) & (at < end - newest)
        logits = logits.masked_fill(~middle[:, None], float("-inf"))
        best, order = logits.topk(min(ranked, size), 2)
        chosen = early.in_turn(order, best > float("-inf"), size, ranked)
        return self.with_edges(chosen, size, lengths, first)

    def with_edges(self, chosen: Tensor, size: int, lengths: Tensor, first: Tensor | None) -> Tensor:
        """int32 [B, 1, m]: the tokens attended, from int64 [B, k] ranked ones, -1 for unused entries."""
        begin, end = first_of(lengths, first)[:, None], lengths[:, None]
        sinks, newest, _ = self.shares()
        head = begin + torch.arange(min(sinks, size), device=chosen.device)
        head = torch.where(head < end - newest, head, -1)
        window = min(newest, size)
        tail = end - window + torch.arange(window, device=chosen.device)
        tail = torch.where(tail >= begin, tail, -1)
        return torch.cat([head, chosen, tail], 1).to(torch.int32)[:, None]

    def apply(self, program: Program, log: PassLog) -> None:
        self._rewrite(program, log, self._choose, self._reuse)

    def reference(self, program: Program) -> None:
        """Masked attention over all keys, of the tokens that are first in turn."""
        self._rewrite(program, None, partial(early.choose_masked, self), early.reuse_masked)

    def _choose(self, q, k_pages, v_pages, table, lengths, first, scale):
        out, lse = ops.paged_attention(q, k_pages, v_pages, table, lengths, first, None, scale)
        return out, lse, self.positions(early.raw_logits(q, k_pages, table), lengths, first)

    def _reuse(self, q, k_pages, v_pages, table, lengths, first, scale, positions):
        return ops.token_attention(q, k_pages, v_pages, table, lengths, positions, first, scale)

    def _rewrite(self, program: Program, log: PassLog | None, choose: Any, reuse: Any) -> None:
        sites = [n for n in program.graph.nodes if n.target in SITES]
        inputs = [[*node.args, *(None,) * (8 - len(node.args))] for node in sites]
        choosing = self.choosing(len(sites))
        reasons = [early.why_not(sites, layer, inputs[layer], choosing) for layer in range(len(sites))]
        chosen: list[fx.Node] = []
        for layer, (node, given, reason) in enumerate(zip(sites, inputs, reasons, strict=True)):
            if layer in choosing:
                chosen = []
                end = min([c for c in choosing if c > layer], default=len(sites))
                if not reason and all(reasons[layer + 1 : end]):
                    reason = "no layer would reuse its choice"
            elif not reason and not chosen:
                reason = "no layer before it chose tokens"
            if reason:
                if log is not None:
                    log.refused(node, reason)
            elif log is None or log.take(node):
                pool, make = [*given[:6], given[7]], choose if layer in choosing else reuse
                more = replace(program, log, node, [*pool, *chosen], make)
                chosen = more if layer in choosing else chosen
        if log is not None:
            log.finish(("paged_attention",))

    def exact_limit(self) -> LessIsMoreKV:
        return changed(self, budget=1 << 40)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few: dict[str, Any] = {"budget": 17, "sinks": 2, "select_layers": (0, 2)}
        inputs = decode_inputs()
        yield few, Example(early.chain(4), inputs, count=4)
        yield few, Example(early.chain(2), inputs[:5], count=2)
        yield few, Example(early.chain(3), inputs, count=2)
        yield few, Example(early.chain(1), inputs, refusal="no layer would reuse its choice")
        yield {"budget": 16, "recent": 0.0, "select_layers": (1,)}, Example(early.chain(3), inputs, count=2)
        yield {}, Example(early.chain(2), inputs, refusal="layer 0 is one of the first 1")
        yield few, Example(ops.paged_attention, decode_inputs(2), refusal="2 queries at once")
        picked = torch.zeros(2, 1, 1, dtype=torch.int32)
        yield few, Example(ops.paged_attention, (*inputs, picked), refusal="chosen before")
