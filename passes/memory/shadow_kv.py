"""Attention over chunks chosen by their mean key, with keys rebuilt from low rank.

paper: arXiv:2410.21465 (ShadowKV). Keys before their rotary embedding are of low rank, values are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory import _shadow as shadows
from tilewright.passes.memory._paged_sites import choose_at_sites, decode_inputs, first_of
from tilewright.passes.memory._shadow import Shadow


@graph_pass(
    "shadow-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2410.21465",
    owns=("attention.cache_policy",),
)
class ShadowKV(GraphPass):
    """Attend the last chunks, outlier chunks, and the `budget` tokens whose chunks' means fit the query.

    rewrite:
        paged_attention(q, pool, table, lengths)
     -> attention(q, [chosen chunks, keys of low rank | outliers | last chunks], their values)

    In a graph all that is held is the prompt, factored at every call. `tilewright.kv_cache` factors it once,
    and what is generated stays exact; it keeps exact keys and all values, with `offload-kv` in its tiers:
    memory then holds `fast_bytes`, keys of low rank, means and outliers.
    """

    theta: float
    """Base of the rotary embedding that the keys carry: that of the model."""
    budget: int = 2048
    """Tokens chosen, by each key head: a multiple of `chunk`."""
    chunk: int = 8
    """Tokens that share a mean key."""
    rank: int = 160
    """Directions that rebuild the keys of all heads; as many as they have, or more: exact keys."""
    local_chunks: int = 4
    """Last chunks, which stay exact."""
    outlier_chunks: int = 48
    """Chunks that stay exact since their mean describes them worst."""
    dense_layers: int = 2
    """First layers that attend to everything."""

    def validate(self) -> None:
        if self.theta <= 1:
            raise self.option_error("theta", "expected more than 1")
        if self.chunk not in (2, 4, 8):
            raise self.option_error("chunk", "expected one of 2, 4, 8")
        if self.budget < self.chunk or self.budget % self.chunk:
            raise self.option_error("budget", f"expected a multiple of chunk = {self.chunk}")
        for name, low in (("rank", 1), ("local_chunks", 1), ("outlier_chunks", 0), ("dense_layers", 0)):
            if getattr(self, name) < low:
                raise self.option_error(name, f"expected {low} or more")

    def shadow(self, keys: Tensor, lengths: Tensor, turn: shadows.Turn = ops.rotate_rows) -> Shadow:
        """Of prompts of int64 [B] tokens, whose keys are [B, Hkv, S, D] from place 0 on."""
        chunks = (torch.div(lengths, self.chunk, rounding_mode="floor") - self.local_chunks).clamp(min=0)
        means = keys.unflatten(2, (-1, self.chunk)).mean(3)
        rest = shadows.outliers(shadows.likeness(keys, means), chunks, self.outlier_chunks)
        return Shadow(shadows.low_rank(keys, lengths, self.rank, self.theta, turn), means, rest, chunks)

    def fits(self, shadow: Shadow) -> Tensor:
        """bool [B]: where every chunk is within the budget: those sequences are attended as they are."""
        return shadow.chunks <= self.budget // self.chunk

    def attention(self, q, k, v, shadow, lengths, scale):
        """(out, lse) of one new token over `lengths` tokens, k, v [B, Hkv, S, D] from place 0 on."""
        size = k.shape[2]
        place = torch.arange(shadow.landmarks.shape[2], device=q.device)
        allowed = (place < shadow.chunks[:, None, None]) & ~shadow.outliers
        picked = shadows.chosen(q, shadow.landmarks, allowed, self.budget // self.chunk, scale)
        picked, exact = (
            functional.pad(x.repeat_interleave(self.chunk, 2), (0, size - shadow.keys.shape[2]))
            for x in (picked, shadow.outliers)
        )
        at = torch.arange(size, device=q.device)
        whole = self.fits(shadow)[:, None, None]
        exact = exact | whole | (at >= shadow.chunks[:, None, None] * self.chunk)
        near = functional.pad(shadow.keys, (0, 0, 0, size - shadow.keys.shape[2]))
        k = torch.where(exact[..., None], k, near)
        return shadows.attended(q, k, v, (picked | exact) & (at < lengths[:, None, None]), scale)

    def attend(self, q, k_pages, v_pages, table, lengths, first, scale):
        """The rewritten attention: (out, lse)."""
        begin = first_of(lengths, first)
        k, v = (shadows.shifted(pages, table, begin) for pages in (k_pages, v_pages))
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return self.attention(q, k, v, self.shadow(k, lengths - begin), lengths - begin, scale)

    def apply(self, program: Program, log: PassLog) -> None:
        choose_at_sites(program, log, self.attend, self.dense_layers, None)

    def reference(self, program: Program) -> None:
        """Singular vectors of the keys; chunks count where few have a greater share or a smaller cosine."""
        choose_at_sites(program, None, self._plain, self.dense_layers, None)

    def _plain(self, q, k_pages, v_pages, table, lengths, first, scale):
        begin, heads, chunk = first_of(lengths, first), k_pages.shape[1], self.chunk
        k, v = (shadows.shifted(pages, table, begin) for pages in (k_pages, v_pages))
        count, at = (lengths - begin)[:, None, None], torch.arange(k.shape[2], device=q.device)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        pace = shadows.pace_of(self.theta, k.shape[3], q.device)
        flat = shadows.unrotated(k, pace, at) * (at < count).mT
        left, values, right = torch.linalg.svd(flat, full_matrices=False)
        values = values * (torch.arange(values.shape[1], device=q.device) < self.rank)
        near = (left * values[:, None]) @ right
        near = ops.rotate_rows(near.unflatten(2, (heads, -1)).transpose(1, 2), at[None, None], pace)
        rows = k.unflatten(2, (-1, chunk))
        mean, place = rows.sum(3) / chunk, torch.arange(k.shape[2] // chunk, device=q.device)
        inside = place < count // chunk - self.local_chunks
        cosine = (rows * mean[:, :, :, None]).sum(-1) / (rows.norm(dim=-1) * mean.norm(dim=-1)[..., None])
        cosine = cosine.amin(3).masked_fill(~inside, float("inf"))
        odd = inside & ((cosine[..., None, :] < cosine[..., None]).sum(-1) < self.outlier_chunks)
        logits = torch.einsum("bhgd,bhnd->bhgn", q[:, :, 0].unflatten(1, (heads, -1)), mean) * scale
        weights = logits.exp() * (inside & ~odd)[:, :, None]
        shares = (weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)).amax(2)
        best = (shares[..., None, :] > shares[..., None]).sum(-1) < self.budget // chunk
        picked = (best & inside & ~odd).repeat_interleave(chunk, 2)
        tail = at >= (count // chunk - self.local_chunks).clamp(min=0) * chunk
        whole = count // chunk - self.local_chunks <= self.budget // chunk
        exact = odd.repeat_interleave(chunk, 2) | tail | whole
        k = torch.where(exact[..., None], k, near)
        return shadows.attended(q, k, v, (picked | exact) & (at < count), scale)

    def exact_limit(self) -> ShadowKV:
        return replace(self, budget=self.chunk << 40)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few = {"theta": 100.0, "budget": 8, "chunk": 4, "rank": 9, "local_chunks": 2, "dense_layers": 0}
        inputs = decode_inputs()
        yield {**few, "outlier_chunks": 2}, Example(ops.paged_attention, inputs)
        yield {**few, "outlier_chunks": 0}, Example(lambda *x: ops.paged_attention(*x)[0], inputs[:5])
        yield (
            {"theta": 10000.0},
            Example(ops.paged_attention, inputs, refusal="layer 0 is one of the first 2"),
        )
