"""Raise the spellings of RMS normalisation to one `rms_norm` op.

paper: arXiv:1910.07467 (RMSNorm). Models write x * rsqrt(mean(x^2) + eps) * weight in float32 and differ in
where the result is rounded to 16 bits; both places are kept apart (`rounding`), as is a weight stored minus
one.
"""

from __future__ import annotations

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
    known_equal,
    number,
    ops,
    refuse,
    rewrite_pass,
)
from tilewright.passes.normalize._spelling import F32, maybe_cast

aten = torch.ops.aten


def _normalized(x, eps, c):
    """x / sqrt(mean(x^2) + eps); c names the choices."""
    wide = maybe_cast(c["wide"], x, F32)
    square = either(c["square"], power=aten.pow(wide, 2), product=wide * wide)
    shifted = aten.mean(square, [-1], True) + number(eps)
    # T5 multiplies the narrow x; the product is float32 all the same.
    factor = either(c["factor"], wide=wide, narrow=x)
    return either(
        c["quotient"],
        rsqrt=factor * aten.rsqrt(shifted),
        sqrt=factor / aten.sqrt(shifted),
        power=factor * aten.pow(shifted, -0.5),
        reciprocal=factor * aten.reciprocal(aten.sqrt(shifted)),
    )


@rewrite_pass("match-rms-norm", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchRmsNorm(Rewrite):
    """Recognise RMS normalisation over the last axis.

    rewrite:
        aten.rms_norm(x, [D], weight, eps)  |  x * rsqrt(mean(x ** 2, -1) + eps) [* weight | * (1 + weight)]
     -> rms_norm(x, weight, eps, offset, rounding)

    eps outside the square root is another function and is not matched. `aten.rms_norm` without eps uses the
    smallest step of the dtype it computes in.
    """

    inner_may_escape = True
    largest_first = True

    @staticmethod
    def pattern(
        x, weight, eps, offset, shape, wide, square, factor, quotient, down, dtype, plus, weight_cast
    ):
        y = _normalized(x, eps, {"wide": wide, "square": square, "factor": factor, "quotient": quotient})
        scale = maybe_cast(weight_cast, weight, F32)
        scale = either(plus, offset=number(offset) + scale, none=scale)
        yield "rms-norm", aten.rms_norm(x, shape, weight, eps)
        yield "scale-first", aten.to.dtype(y * scale, dtype)
        yield "scale-last", maybe_cast(down, y, dtype) * scale
        yield "no-weight", maybe_cast(down, y, dtype)

    def where(self, m: Match) -> Verdict:
        if m.form == "rms-norm" and len(m["shape"]) != 1:
            return refuse(f"it normalises over {len(m['shape'])} axes, expected the last one")
        if m["weight"] is not None:
            if not m.is_tensor("weight") or m.val("weight").dim() != 1:
                return refuse("the factor is not a vector of weights", at=m["weight"])
            if not known_equal(m.shape("weight")[0], m.shape("x")[-1]):
                return refuse(
                    f"weight is {m.shape('weight')}, the last axis has {m.shape('x')[-1]}", at=m["weight"]
                )
        if m["down"] == "cast" and m["dtype"] != m.dtype("x"):
            return refuse(f"it is rounded to {m['dtype']} before the weight, x is {m.dtype('x')}", at=m.root)
        made = m.root.meta["val"].dtype
        if made != self._result(m):
            return refuse(
                f"the result is {made}, rms_norm of {m.dtype('x')} gives {self._result(m)}", at=m.root
            )
        return ACCEPT

    def _rounding(self, down: str | None) -> str:
        return "scale_last" if down == "cast" else "scale_first"

    def _result(self, m: Match) -> torch.dtype:
        if m["weight"] is not None and self._rounding(m["down"]) == "scale_last":
            return torch.promote_types(m.dtype("x"), m.dtype("weight"))
        return m.dtype("x")

    def replacement(
        self, x, weight, eps, offset, shape, wide, square, factor, quotient, down, dtype, plus, weight_cast
    ):
        if eps is None:
            eps = torch.finfo(x.dtype if x.dtype == torch.float64 else F32).eps
        rounding = self._rounding(down) if weight is not None else "scale_first"
        return ops.rms_norm(x, weight, float(eps), float(offset or 0.0), rounding)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, w, half, half_w = (
            Tensor(2, 5, 12),
            Tensor(12),
            Tensor(2, 5, 12, dtype=torch.bfloat16),
            Tensor(12, dtype=torch.bfloat16),
        )

        def norm(x, eps=1e-6):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

        yield {}, Example(lambda x, w: F.rms_norm(x, (12,), w, 1e-5), (x, w))
        yield {}, Example(lambda x: F.rms_norm(x, (12,)), (x,))
        yield {}, Example(lambda x, w: F.rms_norm(x, (12,), w), (half, half_w))
        yield {}, Example(lambda x, w: F.rms_norm(x, (5, 12)), (x, w), refusal="2 axes")
        yield {}, Example(lambda x, w: norm(x) * w, (x, w))
        yield {}, Example(lambda x, w: w * norm(x.float()).to(x.dtype), (half, half_w))
        yield {}, Example(lambda x, w: (norm(x.float()) * (1.0 + w.float())).type_as(x), (half, half_w))
        yield (
            {},
            Example(
                lambda x, w: w * (x * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6)).to(w.dtype),
                (half, half_w),
            ),
        )
        yield {}, Example(lambda x, w: x / torch.sqrt((x * x).mean(-1, True) + 1e-6) * w, (x, w))
        yield {}, Example(lambda x: norm(x), (x,))
        yield {}, Example(lambda x: norm(x.float()), (half,))
        # Rounded to another 16-bit dtype than that of x: matched up to the cast, which stays.
        yield {}, Example(lambda x, w: norm(x.float()).half() * w, (half, w))
        yield {}, Example(lambda x, w: norm(x) * w, (x, Tensor(1)))
        yield {}, Example(lambda x, w: norm(x) * w, (x, Tensor(5, 1)), count=1)
