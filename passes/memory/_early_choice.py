"""What `lessismore-kv` is made of: logits, the sites it may change, and what it is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import ops
from tilewright.passes.memory._paged_sites import first_of, masked_attention, refusal, too_early

LAST = 1 << 40
"""Rank of a token that no head ranked."""
_NO_TOKEN = (1 << 32) - 1


def chain(count: int) -> Callable[..., Tensor]:
    """A program of `count` attentions over one pool, each with the results of those before in its query."""

    def model(q: Tensor, *pool: Any) -> Tensor:
        for _ in range(count):
            q = q + ops.paged_attention(q, *pool)[0]
        return q

    return model


def raw_logits(q: Tensor, k_pages: Tensor, table: Tensor) -> Tensor:
    """[B, H, S]: products of one query of each head, q [B, H, 1, D], and the keys; -inf without a page."""
    keys = k_pages[table.clamp(min=0).long()].transpose(1, 2).flatten(2, 3)
    rows = q.squeeze(2).unflatten(1, (k_pages.shape[1], -1))
    logits = (rows @ keys.transpose(2, 3)).flatten(1, 2)
    absent = (table < 0).repeat_interleave(k_pages.shape[2], 1)
    masked: Tensor = logits.masked_fill(absent[:, None], float("-inf"))
    return masked


def reuse_masked(q, k_pages, v_pages, table, lengths, first, scale, kept):
    return masked_attention(q, k_pages, v_pages, table, kept, scale)


def in_turn(order: Tensor, valid: Tensor, size: int, count: int) -> Tensor:
    """int64 [B, m]: up to `count` of `size` tokens, rank by rank and each once, from [B, H, k] of each head,
    the best first, of which some are `valid`; -1 for unused entries."""
    batch, heads, most = order.shape
    turn = torch.arange(most, device=order.device) * heads
    turns = (turn + torch.arange(heads, device=order.device)[:, None]).expand(batch, -1, -1)
    turns = turns.masked_fill(~valid, LAST).flatten(1)
    ranks = torch.full((batch, size), LAST, device=order.device)
    ranks = ranks.scatter_reduce(1, order.flatten(1), turns, "amin")
    taken, chosen = ranks.topk(min(count, size), 1, largest=False)
    return torch.where(taken < LAST, chosen, -1)


class Ranking:
    """The greatest logits of each head of one sequence, met part by part: of a whole row in memory that keeps
    a few times `count`. Of equal ones the first is greater, so that the parts do not show."""

    def __init__(self, count: int, begin: int, end: int) -> None:
        """count: kept of each head; only tokens from `begin` to before `end` are ranked."""
        self.count, self.begin, self.end = count, begin, end
        self._parts: list[Tensor] = []

    def add(self, logits: Tensor, start: int) -> None:
        """Logits float32 [H, n] of tokens from `start` on."""
        at = torch.arange(start, start + logits.shape[1], device=logits.device)
        bits = logits.contiguous().view(torch.int32)
        ascending = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)  # as the numbers are
        self._parts.append((ascending << 32 | (_NO_TOKEN - at))[:, (at >= self.begin) & (at < self.end)])
        if sum(part.shape[1] for part in self._parts) > 5 * self.count:
            self._parts = [self._best()]

    def order(self) -> Tensor:
        """int64 [H, k]: the tokens of each head, the best first; all that were ranked, up to `count`."""
        return _NO_TOKEN - (self._best() & _NO_TOKEN)

    def _best(self) -> Tensor:
        found = torch.cat(self._parts, 1)
        return found.topk(min(self.count, found.shape[1]), 1).values


def why_not(sites: list[fx.Node], layer: int, given: list[Any], choosing: tuple[int, ...]) -> str:
    """Why a site stays as it is; empty where it may choose or reuse."""
    if sites[layer].target is not ops.paged_attention:
        return "the tokens that are attended were chosen before"
    same = [n for n in sites if n.args[0] is given[0] and n.args[1] is given[1]]
    if len(same) > 1:  # cut by offload-kv
        return "one of several parts of an attention: choose tokens before placing them"
    return refusal(given, None) or too_early(layer, choosing[0])


def choose_masked(policy, q, k_pages, v_pages, table, lengths, first, scale):
    logits = raw_logits(q, k_pages, table)
    begin, end = first_of(lengths, first)[:, None], lengths[:, None]
    at = torch.arange(logits.shape[2], device=q.device)
    held = (at >= begin) & (at < end)
    sinks, newest, ranked = policy.shares()
    middle = held & (at >= begin + sinks) & (at < end - newest)
    order = logits.masked_fill(~middle[:, None], float("-inf")).argsort(2, True)
    in_turn = order[:, :, :ranked].transpose(1, 2).flatten(1)
    before = torch.tril((in_turn[:, :, None] == in_turn[:, None]).long(), -1).sum(2)
    new = (before == 0) & middle.gather(1, in_turn)
    taken = new & (new.cumsum(1) <= ranked)
    chosen = torch.zeros_like(held).scatter_reduce(1, in_turn, taken, "amax")
    kept = held & (chosen | ~middle)
    dense = masked_attention(q, k_pages, v_pages, table, held[:, None], scale)
    return *dense, kept[:, None]
