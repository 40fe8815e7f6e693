"""What policies that give tokens up have in common: which tokens stay, and attentions that follow each other.

Scores are float32 [B, Hkv, n], one for every token that a head still holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import PassLog, Program, ops
from tilewright.passes.memory._paged_sites import SITES, decode_inputs, first_of, replace, too_early

Step = Callable[..., Any]
"""step(layer, q, k_pages, v_pages, table, lengths, first, scale, *state) -> (out, lse, *state)."""


def worth(scores: Tensor, positions: Tensor, first: Tensor | None, recent_from: Tensor) -> Tensor:
    """By what tokens stay: inf for those from recent_from[b] on; below 0 for padding, its last token the
    least, so that what is left of it stays in front. Scores are 0 or more."""
    kept = scores.masked_fill(positions >= recent_from[:, None, None], float("inf"))
    if first is None:
        return kept
    return torch.where(positions < first[:, None, None], -1.0 - positions.to(kept.dtype), kept)


def most(worths: Tensor, positions: Tensor, count: int) -> Tensor:
    """int64 [B, Hkv, min(count, n)]: where the greatest are, by ascending position. Of equal ones the later
    stay."""
    in_time = positions.argsort(2)
    order = worths.gather(2, in_time).argsort(dim=2, stable=True)[..., max(0, worths.shape[2] - count) :]
    return in_time.gather(2, order.sort(2).values)


def least(worths: Tensor, positions: Tensor) -> Tensor:
    """int64 [B, Hkv]: where the least is; of equal ones the earliest."""
    lowest = worths == worths.amin(2, keepdim=True)
    return positions.masked_fill(~lowest, 1 << 60).argmin(2)


def places(table: Tensor, k_pages: Tensor) -> Tensor:
    """int64 [S]: the positions that a table has room for."""
    return torch.arange(table.shape[1] * k_pages.shape[2], device=table.device)


def keys_of(k_pages: Tensor, table: Tensor) -> Tensor:
    """[B, Hkv, S, D]: the keys of each sequence in order; those of a page that is not held are anything."""
    return k_pages[table.clamp(min=0).long()].transpose(1, 2).flatten(2, 3)


def received(
    q: Tensor, k_pages: Tensor, table: Tensor, lengths: Tensor, first: Tensor | None, lse: Tensor, scale: Any
) -> Tensor:
    """[B, Hkv, S]: `attention_mass` of keys in pages, where sequences may end anywhere in the table."""
    at = places(table, k_pages)
    shift = at.shape[0] - lengths  # the op has all sequences end together
    source = (at - shift[:, None]).clamp(min=0)[:, None].expand(-1, k_pages.shape[1], -1)
    keys = keys_of(k_pages, table)
    keys = keys.gather(2, source[..., None].expand(-1, -1, -1, keys.shape[3]))
    mass: Tensor = ops.attention_mass(q, keys, lse, first_of(lengths, first) + shift, scale)
    back = (at + shift[:, None]).clamp(max=at.shape[0] - 1)[:, None].expand_as(source)
    return mass.gather(2, back).masked_fill((at >= lengths[:, None])[:, None], 0.0)


def keep(worths: Tensor, kept: Tensor, lengths: Tensor, count: int) -> Tensor:
    """bool [B, Hkv, S] over all positions: the `count` greatest of those `kept`, and all that are to come."""
    at = torch.arange(kept.shape[2], device=kept.device)
    held = kept & (at < lengths[:, None, None])
    worths = worths.masked_fill(~held, float("-inf"))
    chosen = most(worths, at.expand_as(worths), count)
    return torch.zeros_like(held).scatter(2, chosen, held.gather(2, chosen)) | (at >= lengths[:, None, None])


def attend_kept(q, k_pages, v_pages, table, lengths, first, scale, kept: Tensor | None):
    """(out, lse) of the tokens that each head still holds; None: all."""
    if kept is None:
        return ops.paged_attention(q, k_pages, v_pages, table, lengths, first, None, scale)
    positions = torch.where(kept, places(table, k_pages), -1).to(torch.int32)
    return ops.token_attention(q, k_pages, v_pages, table, lengths, positions, first, scale)


def rewrite_steps(program: Program, log: PassLog | None, step: Step, dense_layers: int) -> None:
    """Make every attention over a pool a step of the same sequences: what one gives up, no later one sees."""
    layers: dict[Any, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target in SITES:
            layers.setdefault(node.args[1], []).append(node)
    for layer, sites in enumerate(layers.values()):
        inputs = [[*node.args, *(None,) * (8 - len(node.args))] for node in sites]
        reason = too_early(layer, dense_layers)
        chosen = [
            n for n, g in zip(sites, inputs, strict=True) if n.target is not SITES[0] or g[6] is not None
        ]
        if chosen:
            reason = "what is attended was chosen before"
        elif len(sites) == 1:
            reason = "no other attention over this pool follows, for which tokens could be given up"
        state: list[fx.Node] = []
        for node, given in zip(sites, inputs, strict=True):
            if reason:
                if log is not None:
                    log.refused(node, reason)
            elif log is None or log.take(node):
                given = [*given[:6], given[7], *state]
                state = replace(program, log, node, given, partial(step, layer))
    if log is not None:
        log.finish(("paged_attention",))


def decode_steps(counts: tuple[int, ...]) -> Callable[..., Tensor]:
    """A program of attentions over one pool of sequences that grow by counts[1], counts[2], ... tokens."""

    def model(
        q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, *first: Any
    ) -> Tensor:
        outs, start = [], 0
        for i, count in enumerate(counts):
            lengths = lengths + (count if i else 0)
            out, _ = ops.paged_attention(
                q[:, :, start : start + count], k_pages, v_pages, table, lengths, *first
            )
            outs.append(out)
            start += count
        return torch.cat(outs, 2)

    return model


def grown(queries: int) -> tuple[Tensor, ...]:
    """Inputs for `decode_steps` with so many queries: what comes after the first 8 fits the pool."""
    q, *pool, lengths, first = decode_inputs(queries)
    return q, *pool, lengths + 8 - queries, first


def masked_step(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, first: Tensor | None,
    scale: float | None, kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, probabilities [B, Hkv, G, T, S], held bool [B, Hkv, S]) by masks: what steps are held to."""
    k, v = keys_of(k_pages, table), keys_of(v_pages, table)
    at, tokens = places(table, k_pages), q.shape[2]
    query = lengths[:, None] - tokens + torch.arange(tokens, device=q.device)
    held = (at >= first_of(lengths, first)[:, None]) & (at < lengths[:, None])
    held = held[:, None].expand(-1, k.shape[1], -1)
    held = held if kept is None else held & kept
    seen = held[:, :, None] & (at <= query[:, :, None])[:, None]
    rows = q.unflatten(1, (k.shape[1], -1))
    logits = rows @ k[:, :, None].transpose(-1, -2) * (q.shape[3] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    shares = logits.softmax(-1).nan_to_num(0.0)
    return (shares @ v[:, :, None]).flatten(1, 2), logits.logsumexp(-1).flatten(1, 2), shares, held


def better(scores: Tensor, held: Tensor, newest: Tensor, count: int) -> Tensor:
    """bool [B, Hkv, S]: the held tokens that fewer than `count` held ones surpass; ties go to the later."""
    scores = scores.masked_fill(newest[:, None], float("inf")).masked_fill(~held, float("-inf"))
    at = torch.arange(scores.shape[2], device=scores.device)
    others, own = scores[:, :, None], scores[:, :, :, None]
    above = (others > own) | ((others == own) & (at > at[:, None]))
    return held & (above.sum(3) < count)
