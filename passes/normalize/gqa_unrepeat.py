"""Read grouped keys and values where they are instead of repeating them for every query head.

Captured decode graphs repeat K and V over the whole cache capacity (unsqueeze, expand, reshape) before
attention.
Attention with fewer key heads than query heads means the same: query head h reads key head h // (H / Hkv).
source: Pope et al., arXiv:2211.05102 (multi-query sharing).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx

from tilewright.compiler import (
    ACCEPT,
    Exactness,
    Example,
    Match,
    Rewrite,
    Stage,
    Tensor,
    Verdict,
    known_equal,
    ops,
    refuse,
    rewrite_pass,
)

aten = torch.ops.aten


@rewrite_pass("gqa-unrepeat", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class GqaUnrepeat(Rewrite):
    """Drop the repetition of K and V in front of attention.

    rewrite:
        attention(q, reshape(expand(unsqueeze(k, 2))), reshape(expand(unsqueeze(v, 2))), mask)
     -> attention(q, k, v, mask)
    """

    inner_may_escape = True

    form: Literal["auto", "gqa", "packed"] = "auto"
    """`gqa`: grouped attention. `packed`: with one query, the group's query heads become rows of one
    attention.
    `auto`: packed where it is legal."""

    @staticmethod
    def pattern(q, k, v, k_axis, v_axis, k_sizes, v_sizes, k_shape, v_shape, mask, scale, softcap, sinks):
        keys = aten.reshape(aten.expand(aten.unsqueeze(k, k_axis), k_sizes), k_shape)
        values = aten.reshape(aten.expand(aten.unsqueeze(v, v_axis), v_sizes), v_shape)
        return ops.attention(q, keys, values, mask, scale, False, softcap, sinks)

    def where(self, m: Match) -> Verdict:
        for name in ("k", "v"):
            if m.val(name).dim() != 4 or m.val("q").dim() != 4:
                return refuse(f"{name} has {m.val(name).dim()} axes, expected 4", at=m[name])
            batch, heads, length, size = m.shape(name)
            if m[f"{name}_axis"] not in (2, -3):
                return refuse(
                    f"{name} is repeated along axis {m[f'{name}_axis']}, not along its heads", at=m[name]
                )
            queries = m.shape("q")[1]
            folded = m.outputs[0].args[1 if name == "k" else 2]
            assert isinstance(folded, fx.Node), "the pattern matched a call here"
            shape = folded.meta["val"].shape
            want = (batch, queries, length, size)
            counted = isinstance(heads, int) and isinstance(queries, int) and queries % heads == 0
            if not counted or not all(known_equal(a, b) for a, b in zip(shape, want, strict=True)):
                return refuse(f"the repeated {name} is {tuple(shape)}, expected {want}", at=m[name])
        if not known_equal(m.shape("k")[1], m.shape("v")[1]):
            return refuse(f"k has {m.shape('k')[1]} heads and v has {m.shape('v')[1]}", at=m["v"])
        if self.form == "packed" and not self._packs(m.val("q"), m["mask"], m["sinks"], m):
            return refuse("packing needs one query and a mask that is the same for all heads", at=m["q"])
        return ACCEPT

    @staticmethod
    def _packs(q: torch.Tensor, mask: object, sinks: object, m: Match | None = None) -> bool:
        if q.shape[2] != 1 or sinks is not None:
            return False
        shape = (
            getattr(mask, "shape", None) if m is None else (m.shape("mask") if m.is_tensor("mask") else None)
        )
        return shape is None or (len(shape) == 4 and shape[1] == 1 and shape[2] == 1)

    def replacement(
        self, q, k, v, k_axis, v_axis, k_sizes, v_sizes, k_shape, v_shape, mask, scale, softcap, sinks
    ):
        if self.form == "gqa" or not self._packs(q, mask, sinks):
            return ops.attention(q, k, v, mask, scale, False, softcap, sinks)
        batch, heads, _, size = q.shape
        packed = q.view(batch, k.shape[1], heads // k.shape[1], size)
        out = ops.attention(packed, k, v, mask, scale, False, softcap, None)
        return out.reshape(batch, heads, 1, v.shape[3])

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        k, v = Tensor(2, 2, 7, 8), Tensor(2, 2, 7, 8)
        mask = Tensor(2, 1, 1, 7, dtype=torch.bool)

        def repeated(x, groups=3, axis=2):
            b, h, t, d = x.shape
            sizes = (b, h, groups, t, d) if axis == 2 else (b, groups, h, t, d)
            return x.unsqueeze(axis).expand(*sizes).reshape(b, h * groups, t, d)

        def model(q, k, v, mask=None):
            return ops.attention(q, repeated(k), repeated(v), mask, 0.3)

        one, many = Tensor(2, 6, 1, 8), Tensor(2, 6, 5, 8)
        yield {}, Example(model, (one, k, v))
        yield {"form": "packed"}, Example(model, (one, k, v, mask))
        yield {"form": "gqa"}, Example(model, (many, k, v))
        yield {}, Example(model, (many, k, v, Tensor(5, 7, dtype=torch.bool)))
        yield {"form": "packed"}, Example(model, (many, k, v), refusal="one query")
        tiled = Example(lambda q, k, v: ops.attention(q, repeated(k, 3, 1), repeated(v, 3, 1)), (one, k, v))
        yield {}, Example(tiled.model, tiled.inputs, refusal="not along its heads")

        def flat(q, k, v):
            k, v = (x.unsqueeze(1).expand(2, 3, 7, 8).reshape(6, 7, 8) for x in (k, v))
            return ops.attention(q, k, v)

        yield (
            {},
            Example(flat, (Tensor(6, 1, 8), Tensor(2, 7, 8), Tensor(2, 7, 8)), refusal="axes, expected 4"),
        )
        fewer = Example(
            lambda q, k, v: ops.attention(q, repeated(k), repeated(v)), (one, *(Tensor(2, 1, 7, 8),) * 2)
        )
        yield {}, Example(fewer.model, fewer.inputs, refusal="the repeated k is (2, 3, 7, 8)")
        uneven = Example(
            lambda q, k, v: ops.attention(q, repeated(k), repeated(v, 6)), (one, k, Tensor(2, 1, 7, 8))
        )
        yield {}, Example(uneven.model, uneven.inputs, refusal="k has 2 heads and v has 1")
