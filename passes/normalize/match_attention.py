"""Raise attention, as one aten op or spelled out in products and a softmax, to one `attention` op.

The spelled-out chain is: product of q and k; scale; softcap; mask; softmax over keys; product with v. Each link is
optional and has several spellings; every constant in it is matched, bound, or refused. What k and v are is taken
from the products themselves, so no permutation of axes is assumed: k is whatever was transposed into the product.

A row whose keys are all masked with -inf gives NaN in the spelled-out form and 0 in ours; equality is demanded
wherever the original is defined. Masks that fill with the lowest finite number keep their meaning on such rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tilewright.compiler import (
    ACCEPT,
    Exactness,
    Example,
    Match,
    Rewrite,
    Stage,
    Tensor,
    Verdict,
    either,
    free,
    known_equal,
    ops,
    refuse,
    rewrite_pass,
)
from tilewright.passes.normalize._attention_terms import (
    LOWEST,
    key_of,
    last_two_kept,
    late_of,
    one_mask,
    probabilities,
    scale_of,
    scores,
    sink_probabilities,
)

aten = torch.ops.aten


@rewrite_pass("match-attention", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchAttention(Rewrite):
    """Recognise softmax(scale * q k^T + mask) v.

    rewrite:
        aten.scaled_dot_product_attention(q, k, v, ...)  |  matmul(softmax(matmul(q, kt) ... + mask, -1), v)
     -> attention(q, k, v, mask, scale, causal, softcap, sinks)
    """

    largest_first = True
    near_miss_depth = 3

    @staticmethod
    def pattern(q, k, v, mask, mask2, bias, sinks):
        yield (
            "sdpa",
            aten.scaled_dot_product_attention(
                q, k, v, mask, free("rate"), free("causal"), scale=free("by"), enable_gqa=free("gqa")
            ),
        )
        p = probabilities(scores(q, k, bias, mask, mask2))
        with_sinks = sink_probabilities(scores(q, k, bias, mask, mask2), sinks)
        yield "spelled", either("last", matmul=aten.matmul(p, v), bmm=aten.bmm(p, v))
        yield "sinks", aten.matmul(with_sinks, v)

    def where(self, m: Match) -> Verdict:
        if m["rate"] is not None and m["rate"] != 0.0 and m["train"] is not False:
            return refuse(f"dropout is {m['rate']}")
        for name in ("q", "k", "v"):
            if not m.is_tensor(name) or m.val(name).dim() < 2:
                return refuse(f"{name} is not a matrix", at=m[name])
        if (no := m.same_dtype("q", "k", "v")) is not None:
            return no
        if m.form == "sdpa":
            return self._where_sdpa(m)
        for reason in (self._numbers(m), self._groups(m), self._masks(m), self._sinks(m)):
            if reason is not None:
                return refuse(reason)
        made = m.root.meta["val"]
        if made.dtype != m.dtype("q"):
            return refuse(f"the result is {made.dtype}, q is {m.dtype('q')}", at=m.root)
        return ACCEPT

    def _where_sdpa(self, m: Match) -> Verdict:
        if type(m["causal"]) is not bool:
            return refuse(f"is_causal is {m['causal']}, expected a constant")
        if m["by"] is not None and type(m["by"]) not in (int, float):
            return refuse(f"scale is {m['by']}, expected a constant")
        reason = _heads(m.shape("q"), m.shape("k"), m.shape("v"))
        return ACCEPT if reason is None else refuse(reason)

    def _numbers(self, m: Match) -> str | None:
        if m["product"] == "baddbmm" and m["beta"] != 1:
            return f"beta is {m['beta']}: the bias is scaled"
        if m["cap"] == "tanh" and (not m["softcap"] > 0 or m["late"] != "none"):
            return f"softcap is {m['softcap']} and what follows it is scaled again"
        if m["late"] != "none" and not (m["by_late"] > 0 and math.isfinite(late_of(m.bound.get))):
            return f"the masked scores are scaled by {m['by_late']}"
        if m["softmax_dtype"] not in (None, torch.float32, m.dtype("q")) or (
            m["softmax_dtype"] == torch.float32 and m.dtype("q") == torch.float64
        ):
            return f"softmax is taken in {m['softmax_dtype']} for {m.dtype('q')}"
        if m["wide"] == "cast" and torch.promote_types(m["wide_dtype"], m.dtype("q")) != m["wide_dtype"]:
            return f"scores are narrowed to {m['wide_dtype']}"
        if m["down"] == "cast" and m["down_dtype"] != m.dtype("q"):
            return f"probabilities are cast to {m['down_dtype']}, q is {m.dtype('q')}"
        return None

    def _groups(self, m: Match) -> str | None:
        q, v, made = m.shape("q"), m.shape("v"), m.root.meta["val"].shape
        k = key_of(m.val("k"), m.bound.get).shape
        if not known_equal(q[-1], k[-1]) or not known_equal(k[-2], v[-2]):
            return f"q {tuple(q)}, k {tuple(k)} and v {tuple(v)} do not fit"
        regrouped = False
        for name in ("regroup", "regroup_back", "regroup_early", "regroup_last"):
            if m[name] in (None, "none"):
                continue
            sizes = m["sizes" + name.removeprefix("regroup")]
            if not last_two_kept(sizes, q[-2], k[-2]):
                return f"scores {q[-2]} x {k[-2]} are regrouped to {list(sizes)}"
            regrouped = True
        if not regrouped:
            return _heads(q, k, v)
        for name, shape in (("k", k), ("v", v), ("the result", made)):
            if len(shape) != len(q) or not all(
                known_equal(a, b) for a, b in zip(shape[:-2], q[:-2], strict=True)
            ):
                return f"q has batch axes {tuple(q[:-2])}, {name} {tuple(shape[:-2])}"
        return None

    def _masks(self, m: Match) -> str | None:
        for step in "12":
            value = m[f"fill_{step}"]
            if value is None:
                continue
            if value > LOWEST:
                return f"masked scores become {value}, which is not minus infinity nor the lowest number"
            if math.isfinite(value) and value < torch.finfo(m.dtype("q")).min:
                return f"masked scores become {value}, which {m.dtype('q')} cannot hold"
        rows, columns = m.shape("q")[-2], key_of(m.val("k"), m.bound.get).shape[-2]
        batch = list(m["sizes"][:-2]) if m["regroup"] in ("reshape", "view") else list(m.shape("q")[:-2])
        for name, step in (("mask", "mask_1"), ("mask2", "mask_2"), ("bias", "")):
            used = m[step] not in (None, "none") if step else m["product"] == "baddbmm"
            if not used:
                continue
            if not m.is_tensor(name):
                return f"{name} is {m[name]}, expected a tensor"
            if step and (m[step] == "add") != m.val(name).is_floating_point():
                return f"{name} is {m.dtype(name)}"
            if m.val(name).is_floating_point() and m.dtype(name) != m.dtype("q"):
                return f"{name} is {m.dtype(name)}, q is {m.dtype('q')}"
            shape, room = m.shape(name), [*batch, rows, columns]
            if name == "bias":
                room = [*m.shape("q")[:-2], rows, columns]
            if len(shape) < 2 or len(shape) > len(room) or not _broadcasts(shape, room):
                return f"{name} has shape {tuple(shape)}, the scores have {tuple(room)}"
        if m["clamp"] == "maximum":
            if m["floor"] > LOWEST or m["mask_1"] != "add" or m["mask_2"] != "none":
                return f"scores are kept above {m['floor']}"
        return None

    def _sinks(self, m: Match) -> str | None:
        if m.form != "sinks":
            return None
        heads, columns = m.shape("q")[-3], key_of(m.val("k"), m.bound.get).shape[-2]
        rank = m.val("q").dim()
        if m.val("sinks").dim() != 1 or not known_equal(m.shape("sinks")[0], heads):
            return f"sinks have shape {m.shape('sinks')}, expected one for each of {heads} heads"
        wanted = [1] * rank
        wanted[-3] = heads
        if len(m["sink_shape"]) != rank or not all(
            s in (w, -1) for s, w in zip(m["sink_shape"], wanted, strict=True)
        ):
            return f"sinks are laid out as {m['sink_shape']}, expected {wanted}"
        if (m["sink_start"] or 0) != 0 or m["sink_end"] not in (-1, columns):
            return f"columns {m['sink_start']} to {m['sink_end']} are kept, expected all {columns} keys"
        return None

    def replacement(self, q, k, v, mask, mask2, bias, sinks, form, chosen):
        if form == "sdpa":
            return ops.attention(q, k, v, mask, chosen["by"], chosen["causal"])
        get = chosen.get
        k = key_of(k, get)
        shape = (*q.shape[:-1], v.shape[-1])
        steps = [
            (how, tensor, get(f"fill_{step}"))
            for step, tensor in (("1", mask), ("2", mask2))
            if (how := get(f"mask_{step}")) not in (None, "none")
        ]
        if get("regroup") in ("reshape", "view"):
            batch = list(get("sizes")[:-2])
            q, k, v = (t.reshape(*batch, *t.shape[-2:]) for t in (q, k, v))
            if get("product") == "baddbmm":
                bias = bias.reshape(*batch, *bias.shape[-2:]) if math.prod(bias.shape[:-2]) != 1 else bias
        if get("product") == "baddbmm":
            steps.insert(0, ("add", bias, None))
        joined = one_mask(steps, q.dtype, late_of(get), get("floor"))
        out = ops.attention(q, k, v, joined, scale_of(get), False, get("softcap") or 0.0, sinks)
        return out.reshape(shape) if out.shape != shape else out

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        q, k, v = Tensor(2, 6, 5, 8), Tensor(2, 6, 7, 8), Tensor(2, 6, 7, 4)
        keep, added = Tensor(2, 1, 5, 7, dtype=torch.bool), Tensor(2, 1, 5, 7)
        lowest = torch.finfo(torch.float32).min

        def spelled(q, k, v, mask=None, *, by=0.3, dim=-1, fill=None, cap=None, dtype=None, drop=0.0):
            s = q @ k.transpose(-1, -2) * by
            s = s if cap is None else torch.tanh(s / cap) * cap
            if fill is not None:
                s = s.masked_fill(~mask, fill)
            elif mask is not None:
                s = s + mask
            return F.dropout(torch.softmax(s, dim, dtype), drop) @ v

        def with_sinks(q, k, v, mask, sinks, *, kept=-1):
            s = q @ k.transpose(-1, -2) * 0.3 + mask
            s = torch.cat((s, sinks.reshape(1, -1, 1, 1).expand(2, -1, 5, -1)), -1)
            return torch.softmax(s - s.max(-1, keepdim=True).values, -1)[..., :kept] @ v

        def regrouped(q, k, v, bias, mask):
            s = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.3).view(2, 3, 5, 7) + mask
            return torch.bmm(torch.softmax(s, -1).view(6, 5, 7), v)

        sdpa = F.scaled_dot_product_attention
        yield {}, Example(lambda q, k, v: sdpa(q, k, v), (q, k, v))
        yield {}, Example(lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.3), (q, k, v))
        yield (
            {},
            Example(
                lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (q, Tensor(2, 2, 7, 8), Tensor(2, 2, 7, 4))
            ),
        )
        yield {}, Example(lambda q, k, v, m: sdpa(q, k, v, m), (q, k, v, keep))
        yield {}, Example(lambda q, k, v, m: sdpa(q, k, v, m), (q, k, v, added))
        yield {}, Example(lambda q, k, v: spelled(q, k, v), (q, k, v))
        yield (
            {},
            Example(lambda q, k, v, m: spelled(q, k, v, m, cap=5.0, dtype=torch.float32), (q, k, v, added)),
        )
        yield {}, Example(lambda q, k, v, m: spelled(q, k, v, m, fill=lowest), (q, k, v, keep))
        yield {}, Example(with_sinks, (q, k, v, added, Tensor(6)))
        flat = (Tensor(6, 5, 8), Tensor(6, 7, 8), Tensor(6, 7, 4), Tensor(6, 1, 7), Tensor(2, 1, 5, 7))
        yield {}, Example(regrouped, flat)


def _heads(q, k, v) -> str | None:
    """Why shapes are not [..., H, S, D], [..., Hkv, T, D], [..., Hkv, T, E]; None when they are."""
    if len(q) != len(k) or len(q) != len(v):
        return f"q, k and v have {len(q)}, {len(k)} and {len(v)} axes"
    same = all(known_equal(a, b) for a, b in zip(k[:-2], v[:-2], strict=True))
    if not same or not all(known_equal(a, b) for a, b in zip(q[:-3], k[:-3], strict=True)):
        return f"q, k and v have batch axes {tuple(q[:-2])}, {tuple(k[:-2])} and {tuple(v[:-2])}"
    if len(q) > 2 and not known_equal(q[-3], k[-3]):
        grouped = isinstance(q[-3], int) and isinstance(k[-3], int) and k[-3] > 0 and q[-3] % k[-3] == 0
        return None if grouped else f"{q[-3]} query heads cannot share {k[-3]} key heads"
    return None


def _broadcasts(shape, room) -> bool:
    """True when a mask of `shape` broadcasts to `room` without making it larger."""
    return all(
        known_equal(a, 1) or known_equal(a, b) for a, b in zip(reversed(shape), reversed(room), strict=False)
    )
