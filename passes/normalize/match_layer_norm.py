"""Raise layer normalisation to one `layer_norm` op: `aten.layer_norm` and the spelled-out mean and
variance."""

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

aten = torch.ops.aten


def _normalized(x, eps, variance, quotient):
    centred = x - aten.mean(x, [-1], True)
    var = either(
        variance,
        mean=aten.mean(aten.pow(centred, 2), [-1], True),
        product=aten.mean(centred * centred, [-1], True),
        var=aten.var.correction(x, [-1], correction=0, keepdim=True),
        unbiased_false=aten.var.dim(x, [-1], False, True),
    )
    shifted = var + number(eps)
    return either(
        quotient,
        rsqrt=centred * aten.rsqrt(shifted),
        sqrt=centred / aten.sqrt(shifted),
        reciprocal=centred * aten.reciprocal(aten.sqrt(shifted)),
        power=centred * aten.pow(shifted, -0.5),
    )


@rewrite_pass("match-layer-norm", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchLayerNorm(Rewrite):
    """Recognise layer normalisation over the trailing axes.

    rewrite:
        aten.layer_norm(x, shape, weight, bias, eps)  |  (x - mean(x)) * rsqrt(var(x) + eps) [* weight [+
        bias]] -> layer_norm(x, shape, weight, bias, eps)

    The variance is the biased one (divided by n). `cudnn_enable` changes nothing and is free.
    """

    inner_may_escape = True
    largest_first = True

    @staticmethod
    def pattern(x, shape, weight, bias, eps, cudnn, variance, quotient):
        y = _normalized(x, eps, variance, quotient)
        yield "layer-norm", aten.layer_norm(x, shape, weight, bias, eps, cudnn)
        yield "scaled-and-shifted", y * weight + bias
        yield "scaled", y * weight
        yield "plain", y

    def where(self, m: Match) -> Verdict:
        if m.form == "layer-norm":
            return ACCEPT
        for name in ("weight", "bias"):
            if m[name] is None:
                continue
            if (
                not m.is_tensor(name)
                or m.val(name).dim() != 1
                or not known_equal(m.shape(name)[0], m.shape("x")[-1])
            ):
                return refuse(
                    f"{name} is not one value for each of the {m.shape('x')[-1]} channels", at=m[name]
                )
            if (no := m.same_dtype("x", name)) is not None:
                return no
        return ACCEPT

    def replacement(self, x, shape, weight, bias, eps, cudnn, variance, quotient, form):
        return ops.layer_norm(x, shape if form == "layer-norm" else [x.shape[-1]], weight, bias, eps)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, w, b = Tensor(2, 5, 12), Tensor(12), Tensor(12)

        def spelled(x, w, b):
            d = x - x.mean(-1, keepdim=True)
            return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b

        def by_var(x, w):
            var = x.var(-1, keepdim=True, unbiased=False)
            return w * ((x - x.mean(-1, keepdim=True)) / torch.sqrt(var + 1e-6))

        yield {}, Example(lambda x, w, b: F.layer_norm(x, (12,), w, b), (x, w, b))
        yield {}, Example(lambda x: F.layer_norm(x, (5, 12), eps=1e-6), (x,))
        yield {}, Example(spelled, (x, w, b))
        yield {}, Example(by_var, (x, w))
        yield {}, Example(lambda x: by_var(x, 1.0), (x,))
        half = Tensor(2, 5, 12, dtype=torch.bfloat16)
        yield {}, Example(lambda x, b: spelled(x, 1.5, b), (x, b))
        narrow = Tensor(12, dtype=torch.bfloat16)
        yield {}, Example(by_var, (half, narrow))
        yield {}, Example(lambda x, w: by_var(x, w), (x, Tensor(5, 1)))
