"""Attention over the blocks that a layout names, and the merge of two attentions over disjoint keys.

This is the one lowered op of every attention sparsification; `compiler/block_layout.py` describes its layout
arguments. Systems bring layouts, index maps, predicates and epilogues, never another op:

* Sliding tile, spatial-temporal, AdaSpa, SLA, VSA, SpargeAttn: whole blocks; the layouts of several windows
  or of every head are groups, an online top-k is `rows_from_block_mask` of a selection, with groups per
  (batch, head) through `head_group` [B, H].
* SVG2 (clusters by content): src_q and src_k are the sort by label of each head, q_off and k_off the
  cumulative cluster sizes (empty clusters are blocks of size 0); prompt and padding are two more clusters.
* Sparse-vDiT: a group per (layer, head) pattern; diagonals are BAND, in token-major order through src_q and
  src_k; vertical stripes are USER with a mask of one query row; a skipped head is a group without entries.
* PAROAttention: a group per axis order, src_q and src_k hold the six orders; its low-precision products are
  ops of their own, `block_sparse_attention_int8` and `_fp8`: other functions, which a pass must choose.
* VMoBA (per-token selection): key-stationary, i.e. this op on the queries gathered per key block (src_q, one
  group per block) and `merge_attention` with the part of the token's own block.
* Linear attention (SANA-Video, LiT, SLA's second branch): ordinary tensor programs beside this op, added to
  its result; nothing to sparsify. Re-ttention: rho * out + R from this op's lse.
* Windows with sinks over a cache, ring parallelism, relay and tree attention: `merge_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.block_layout import (
    Kind,
    Predicate,
    check_predicates,
    index_predicate,
    unflatten,
)
from tilewright.compiler.ops.registry import define

ROWS = 256
"""Query rows at a time: no tensor of the definition is larger than ROWS x keys per head."""
LAYOUT = (
    "Tensor row_ptr, Tensor col, Tensor q_off, Tensor k_off, Tensor head_group, Tensor? flag=None, "
    "int[] predicates=[], Tensor? k_valid=None, Tensor? q_valid=None, Tensor? limit=None, "
    "Tensor? src_q=None, Tensor? src_k=None, Tensor? mask=None, float? scale=None"
)
LAYOUT_NAMES = tuple(part.split()[1].split("=")[0] for part in LAYOUT.split(", "))


def pair_flops(
    q: Any, k: Any, v: Any, row_ptr: Any, col: Any, q_off: Any, k_off: Any, *_: Any, out: Any
) -> Any:
    """As if every entry of `col` were a block of mean size; lists may hold fewer."""
    queries, keys = q.shape[-2], k.shape[-2]
    share = col.shape[1] * queries * keys // max(1, (row_ptr.shape[1] - 1) * (k_off.shape[1] - 1))
    return q.shape[0] * q.shape[1] * share * (2 * q.shape[-1] + 2 * v.shape[-1] + 5)


class _Layout:
    """The op's layout arguments with what the definition derives from them once per call."""

    def __init__(self, q: Tensor, k: Tensor, arguments: tuple[Any, ...]) -> None:
        given = dict(zip(LAYOUT_NAMES, arguments, strict=False))
        self.row_ptr, self.col, self.q_off, self.k_off = (given[n].long() for n in LAYOUT_NAMES[:4])
        self.heads = given["head_group"].long()
        self.rules: list[Predicate] = unflatten(given.get("predicates") or [])
        self.k_valid, self.q_valid, self.limit = (given.get(n) for n in ("k_valid", "q_valid", "limit"))
        self.src_q, self.src_k = given.get("src_q"), given.get("src_k")
        self.mask: Tensor | None = given.get("mask")
        scale = given.get("scale")
        self.scale: float = q.shape[-1] ** -0.5 if scale is None else scale
        check_predicates(self.rules, self.limit is not None, self.mask is not None)
        self.queries = q.shape[-2] if self.src_q is None else self.src_q.shape[1]
        self.keys = k.shape[-2] if self.src_k is None else self.src_k.shape[1]
        self.map = self._block_map(given.get("flag"))
        self.q_block = _block_of(self.q_off, self.queries)
        self.k_block = _block_of(self.k_off, self.keys)

    def _block_map(self, flag: Tensor | None) -> Tensor:
        """[G, nQ + 1, nK + 1]: the flag of a listed block, -1 elsewhere and in the last row and column."""
        groups, rows, blocks = self.row_ptr.shape[0], self.row_ptr.shape[1] - 1, self.k_off.shape[1] - 1
        places = torch.arange(self.col.shape[1], device=self.col.device).expand(groups, -1)
        row = torch.searchsorted(self.row_ptr[:, 1:].contiguous(), places.contiguous(), right=True)
        used = row < rows
        at = torch.where(used, row * (blocks + 1) + self.col, rows * (blocks + 1) + blocks)
        value = torch.zeros_like(self.col) if flag is None else flag.long()
        found = torch.full((groups, (rows + 1) * (blocks + 1)), -1, device=self.col.device)
        found = found.scatter(1, at, torch.where(used, value, -1))
        return found.view(groups, rows + 1, blocks + 1)

    def allowed(self, start: int, end: int) -> Tensor:
        """bool [1 or B, H, end - start, keys]: what query slots start .. end - 1 attend to."""
        groups, device = self.map.shape[0], self.map.device
        q_block = self.q_block[:, start:end].expand(groups, -1)
        lines = torch.gather(self.map, 1, q_block[:, :, None].expand(-1, -1, self.map.shape[2]))
        flags = torch.gather(lines, 2, self.k_block.expand(groups, -1)[:, None].expand(-1, end - start, -1))
        flags = flags[self.heads]
        i, j = torch.arange(start, end, device=device), torch.arange(self.keys, device=device)
        kept: Tensor = flags == 0
        for p, rule in enumerate(self.rules, 1):
            kept = kept | ((flags == p) & self._predicate(rule, i, j))
        if self.k_valid is not None:
            kept = kept & (j < self.k_valid[:, None, None, None])
        if self.q_valid is not None:
            kept = kept & (i[:, None] < self.q_valid[:, None, None, None])
        return kept

    def _predicate(self, rule: Predicate, i: Tensor, j: Tensor) -> Tensor:
        if rule.kind is Kind.USER:
            assert self.mask is not None, "checked when the layout was read"
            return self.mask if self.mask.shape[2] == 1 else self.mask[:, :, i]
        if rule.kind is Kind.PAD_SELF:
            assert self.limit is not None, "checked when the layout was read"
            limit = self.limit[:, None, None, None]
            same: Tensor = ((i + rule.shift)[:, None] < limit) == (j < limit)
            return same
        return index_predicate(rule, i, j)

    def places(self, src: Tensor | None, batch: int) -> Tensor | None:
        """[B, H, slots]: the token in each slot, None when slots are tokens."""
        if src is None:
            return None
        each = (
            src.long()[self.heads]
            if src.shape[0] > 1
            else src.long()[None].expand(1, self.heads.shape[1], -1)
        )
        return each.expand(batch, -1, -1)


def _block_of(off: Tensor, slots: int) -> Tensor:
    """[1 or G, slots]: the block of each slot; past the last block, their number."""
    at = torch.arange(slots, device=off.device).expand(off.shape[0], -1).contiguous()
    return torch.searchsorted(off[:, 1:].contiguous(), at, right=True)


def _take(x: Tensor, heads: int, places: Tensor | None) -> Tensor:
    """x [B, Hkv, N, D] in at least float32, as [B, H, slots, D]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    if places is None:
        return x
    return torch.gather(x, 2, places[..., None].expand(-1, -1, -1, x.shape[-1]))


def _put(x: Tensor, places: Tensor | None, tokens: int, rest: float = 0.0) -> Tensor:
    """Inverse of `_take` for [B, H, slots, ...]: back to tokens; tokens that no slot holds get `rest`."""
    if places is None:
        return x
    index = places if x.dim() == 3 else places[..., None].expand_as(x)
    return x.new_full((*x.shape[:2], tokens, *x.shape[3:]), rest).scatter(2, index, x)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, head_group: Tensor) -> None:
    """Raise ValueError for q, k, v and head_group that do not fit each other."""
    fits = q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0]
    fits = fits and q.shape[3] == k.shape[3] and k.shape[1:3] == v.shape[1:3] and q.shape[1] % k.shape[1] == 0
    if not fits or head_group.dim() != 2 or head_group.shape[1] != q.shape[1]:
        raise ValueError(
            f"block_sparse_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must be "
            f"[B, H, S, D], [B, Hkv, T, D], [B, Hkv, T, E] with H a multiple of Hkv, "
            f"and head_group {list(head_group.shape)} [1 or B, H]"
        )


def fake_pair(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    _check_shapes(q, k, v, layout[4])
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return v.new_empty((*q.shape[:3], v.shape[3]), dtype=q.dtype), lse


def _fake_backward(dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@define(
    "block_sparse_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {LAYOUT}) -> (Tensor, Tensor, Tensor)",
    flops=lambda dout, dlse, q, k, v, out_, lse, *layout, out: 5 * pair_flops(q, k, v, *layout, out=out) // 2,
    fake=_fake_backward,
)
def block_sparse_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *layout: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v from those of out and lse (None: zero); probabilities are computed again.

    With P = exp(scores - lse): dV = P^T dout, dS = P (dout V^T - sum(dout out) + dlse), dQ = scale dS K,
    dK = scale dS^T Q.
    """
    lay, (batch, heads) = _Layout(q, k, layout), q.shape[:2]
    q_at, k_at = lay.places(lay.src_q, batch), lay.places(lay.src_k, batch)
    ks, vs = _take(k, heads, k_at), _take(v, heads, k_at)
    qs, gs, os = (_take(x, heads, q_at) for x in (q, dout, out))
    ls = lse if q_at is None else torch.gather(lse, 2, q_at)
    delta = (gs * os).sum(-1)
    if dlse is not None:
        delta = delta - (dlse if q_at is None else torch.gather(dlse, 2, q_at))
    dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
    for start in range(0, lay.queries, ROWS):
        end = min(start + ROWS, lay.queries)
        rows = slice(start, end)
        scores = qs[:, :, rows] @ ks.transpose(-1, -2) * lay.scale - ls[:, :, rows, None]
        p = torch.where(lay.allowed(start, end), scores.exp(), 0.0)
        dv += p.transpose(-1, -2) @ gs[:, :, rows]
        ds = p * (gs[:, :, rows] @ vs.transpose(-1, -2) - delta[:, :, rows, None]) * lay.scale
        dq[:, :, rows] = ds @ ks
        dk += ds.transpose(-1, -2) @ qs[:, :, rows]
    found = []
    for x, dx, at in ((q, dq, q_at), (k, dk, k_at), (v, dv, k_at)):
        dx = _put(dx, at, x.shape[2])
        if x.shape[1] != heads:
            dx = dx.unflatten(1, (x.shape[1], -1)).sum(2)
        found.append(dx.to(x.dtype).contiguous())
    return found[0], found[1], found[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*[a for a in (*inputs, *output) if isinstance(a, Tensor)])
    ctx.plan = [None if isinstance(a, Tensor) else (a,) for a in (*inputs, *output)]


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    *inputs, out, lse = [next(saved) if constant is None else constant[0] for constant in ctx.plan]
    dout = torch.zeros_like(out) if dout is None else dout
    rest: tuple[Any, ...] = (None,) * (len(inputs) - 3)
    call = block_sparse_attention_backward.overload
    return (*call(dout, dlse, *inputs[:3], out, lse, *inputs[3:]), *rest)


@define(
    f"block_sparse_attention(Tensor q, Tensor k, Tensor v, {LAYOUT}) -> (Tensor, Tensor)",
    flops=pair_flops,
    fake=fake_pair,
    backward=(_save, _gradient),
)
def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    """(softmax over the pairs of the layout of (scale q k^T) v, natural log of the softmax's denominator).

    q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, E], H a multiple of Hkv, one dtype -> out [B, H, S, E] in
    that dtype and lse [B, H, S] in float32 (float64 for float64). `layout` is `BlockLayout.arguments()`,
    then scale (None: 1/sqrt(D)). The softmax runs in float32. A query with no key gives 0 and -inf; so does a
    query that no slot holds. Layouts are validated where they are built; here only shapes are.
    """
    _check_shapes(q, k, v, layout[4])
    lay, (batch, heads) = _Layout(q, k, layout), q.shape[:2]
    q_at, k_at = lay.places(lay.src_q, batch), lay.places(lay.src_k, batch)
    qs, ks, vs = _take(q, heads, q_at), _take(k, heads, k_at), _take(v, heads, k_at)
    outs, sums = [], []
    for start in range(0, lay.queries, ROWS):
        end = min(start + ROWS, lay.queries)
        scores = qs[:, :, start:end] @ ks.transpose(-1, -2) * lay.scale
        scores = scores.masked_fill(~lay.allowed(start, end), float("-inf"))
        lse = torch.logsumexp(scores, -1)
        empty = lse == float("-inf")
        outs.append(torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None]) @ vs)
        sums.append(lse)
    out = torch.cat(outs, 2) if outs else vs.new_zeros((batch, heads, 0, v.shape[3]))
    total = torch.cat(sums, 2) if sums else vs.new_zeros((batch, heads, 0))
    out, total = _put(out, q_at, q.shape[2]), _put(total, q_at, q.shape[2], float("-inf"))
    return out.to(q.dtype).contiguous(), total.contiguous()


@define(
    "merge_attention(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) -> (Tensor, Tensor)",
    flops=lambda out1, lse1, out2, lse2, *, out: 3 * out1.numel() + 10 * lse1.numel(),
)
def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the attentions over each.

    out1, out2 [..., S, E], lse1, lse2 [..., S] natural log -> lse = log(e^lse1 + e^lse2) and
    out = e^(lse1 - lse) out1 + e^(lse2 - lse) out2, in the dtype of out1. A row empty on both sides stays 0
    and -inf, also in the gradient.
    """
    top = torch.maximum(lse1, lse2).detach()
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    w1, w2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = w1 + w2
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    out = (w1 / safe)[..., None] * out1.to(w1.dtype) + (w2 / safe)[..., None] * out2.to(w2.dtype)
    lse = torch.where(empty, torch.full_like(total, float("-inf")), top + torch.log(safe))
    return out.to(out1.dtype), lse
