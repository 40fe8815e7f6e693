"""Raise attention, as one aten op or spelled out in products and a softmax, to one `attention` op.

The spelled-out chain: product of q and k; scale; softcap; mask; softmax over keys; product with v. Each link
is optional and has several spellings; every constant in it is matched, bound, or refused. What k and v are is
taken from the products themselves, so no permutation of axes is assumed: k is whatever was transposed into
the product.

A row whose keys are all masked with -inf gives NaN in the spelled-out form and 0 in ours; equality is
demanded wherever the original is defined. Masks that fill with the lowest finite number keep their meaning on
such rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from tilewright.compiler import (
    ACCEPT,
    Exactness,
    Example,
    Match,
    Rewrite,
    Stage,
    Verdict,
    either,
    free,
    known_equal,
    number,
    ops,
    refuse,
    rewrite_pass,
)
from tilewright.passes.normalize._attention_examples import accepting, refused
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
    def pattern(q, k, v, mask, mask2, factor, bias, sinks):
        call = functools.partial(
            aten.scaled_dot_product_attention, q, k, v, mask, free("rate"), free("causal")
        )
        gqa = free("gqa")
        yield "sdpa", either("scaled", yes=call(scale=number("by"), enable_gqa=gqa), no=call(enable_gqa=gqa))
        s = scores(q, k, factor, bias, mask, mask2)
        p = probabilities(s)
        yield "spelled", either("last", matmul=aten.matmul(p, v), bmm=aten.bmm(p, v))
        yield "sinks", aten.matmul(sink_probabilities(s, sinks), v)

    def where(self, m: Match) -> Verdict:
        if m["rate"] is not None and m["rate"] != 0.0 and m["train"] is not False:
            return refuse(f"dropout is {m['rate']}")
        for name in ("q", "k", "v"):
            if m.val(name).dim() < 2:
                return refuse(f"{name} has shape {m.shape(name)}, expected a matrix", at=m[name])
        # All products are of one dtype, so with these three the result has it too.
        if (no := m.same_dtype("q", "k", "v")) is not None:
            return no
        if m.form == "sdpa":
            reason = _heads(m.shape("q"), m.shape("k"), m.shape("v"))
        else:
            reason = self._numbers(m) or self._groups(m) or self._masks(m) or self._sinks(m)
        return ACCEPT if reason is None else refuse(reason, at=m.root)

    def _numbers(self, m: Match) -> str | None:
        if m["product"] == "baddbmm" and (m["beta"] != 1 or m["early"] == "add"):
            return f"beta is {m['beta']} or a second bias is added to the product"
        if m["cap"] == "tanh" and (not m["softcap"] > 0 or m["late"] != "none"):
            return f"softcap is {m['softcap']}, or what follows it is scaled again"
        if m["late"] != "none" and not (m["by_late"] > 0 and math.isfinite(late_of(m.bound.get))):
            return f"the masked scores are scaled by {m['by_late']}"
        taken = m["softmax_dtype"] or m.dtype("q")
        if not taken.is_floating_point or torch.promote_types(taken, m.dtype("q")) != taken:
            return f"softmax is taken in {taken}, q is {m.dtype('q')}"
        if (
            "cast" in (m["wide"], m["wide_early"])
            and torch.promote_types(m["wide_dtype"], m.dtype("q")) != m["wide_dtype"]
        ):
            return f"scores are narrowed to {m['wide_dtype']}, q is {m.dtype('q')}"
        if m["scale"] == "tensor":
            room = [*m.shape("q")[:-2], 1, 1]
            fits = m.is_tensor("factor") and len(m.shape("factor")) <= len(room)
            if not fits or not _broadcasts(m.shape("factor"), room) or m.dtype("factor") != m.dtype("q"):
                return (
                    f"scores are multiplied by {m['factor']}, which is not one {m.dtype('q')} for each head"
                )
        return None

    def _groups(self, m: Match) -> str | None:
        q, v, made = m.shape("q"), m.shape("v"), m.root.meta["val"].shape
        k = key_of(m.val("k"), m.bound.get).shape
        regrouped = False
        for name in ("regroup", "regroup_back", "regroup_early", "regroup_last"):
            if m[name] in (None, "none"):
                continue
            sizes = m["sizes" + name.removeprefix("regroup")]
            if not last_two_kept(sizes, q[-2], k[-2]):
                return f"scores of {q[-2]} x {k[-2]} are regrouped to {list(sizes)}"
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
        for value in (m["fill_1"], m["fill_2"]):
            if value is not None and value > LOWEST:
                return f"masked scores become {value}, neither minus infinity nor the lowest number"
            if value is not None and math.isfinite(value) and value < torch.finfo(m.dtype("q")).min:
                return f"masked scores become {value}, which {m.dtype('q')} cannot hold"
        tail = [m.shape("q")[-2], key_of(m.val("k"), m.bound.get).shape[-2]]
        inner = [*m.shape("q")[:-2], *tail]
        outer = [*m["sizes"][:-2], *tail] if m["regroup"] in ("reshape", "view") else inner
        has_bias = m["product"] == "baddbmm" or m["early"] == "add"
        uses = (
            ("bias", "add" if has_bias else "none", inner),
            ("mask", m["mask_1"], outer),
            ("mask2", m["mask_2"], outer),
        )
        for name, how, room in uses:
            if how in (None, "none"):
                continue
            if not m.is_tensor(name):
                return f"{name} is {m[name]}, expected a tensor"
            if m.dtype(name) != (m.dtype("q") if how == "add" else torch.bool):
                return f"{name} is {m.dtype(name)}, q is {m.dtype('q')}"
            shape = m.shape(name)
            if len(shape) < 2 or len(shape) > len(room) or not _broadcasts(shape, room):
                return f"{name} has shape {tuple(shape)}, the scores have {tuple(room)}"
        if m["clamp"] == "maximum" and (m["floor"] > LOWEST or m["mask_1"] != "add" or m["mask_2"] != "none"):
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

    def replacement(self, q, k, v, mask, mask2, factor, bias, sinks, form, chosen):
        get = chosen.get
        if form == "sdpa":
            return ops.attention(q, k, v, mask, get("by"), get("causal"))
        k = key_of(k, get)
        shape = (*q.shape[:-1], v.shape[-1])
        q = q * factor if get("scale") == "tensor" else q
        steps = [
            (how, tensor, get(f"fill_{step}"))
            for step, tensor in (("1", mask), ("2", mask2))
            if (how := get(f"mask_{step}")) not in (None, "none")
        ]
        has_bias = get("product") == "baddbmm" or get("early") == "add"
        if get("regroup") in ("reshape", "view"):
            batch = list(get("sizes")[:-2])
            if has_bias:
                bias = bias.expand(*q.shape[:-2], *bias.shape[-2:]).reshape(*batch, *bias.shape[-2:])
            q, k, v = (t.reshape(*batch, *t.shape[-2:]) for t in (q, k, v))
        if has_bias:
            steps.insert(0, ("add", bias, None))
        joined = one_mask(steps, q.dtype, late_of(get), get("floor"))
        out = ops.attention(q, k, v, joined, scale_of(get), False, get("softcap") or 0.0, sinks)
        return out.reshape(shape) if out.shape != shape else out

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        for example in (*accepting(), *refused()):
            yield {}, example


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
