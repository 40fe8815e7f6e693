"""Raise linear layers, whatever they are spelled as, to one `linear` op.

`aten.linear` is one already. A product with a weight matrix is one too, stored as [N, K] (`x @ w.T`) or as
[K, N] (GPT-2's Conv1D: `addmm(bias, x, w)`). Products of two activations are left to the attention rules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import (
    ACCEPT,
    Exactness,
    Example,
    Match,
    Rewrite,
    Stage,
    Tensor,
    Verdict,
    ops,
    refuse,
    rewrite_pass,
)

aten = torch.ops.aten


@rewrite_pass("match-linear", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchLinear(Rewrite):
    """Recognise x W^T + b.

    rewrite:
        aten.linear(x, w, b)  |  addmm(b, x, w)  |  matmul(x, w) [+ b]  |  matmul(w, x)
     -> linear(x, w, b)       |  linear(x, w.T, b)                      |  linear(x.T, w).T

    In the canonical form `x @ w.T` is `aten.linear` already.
    """

    largest_first = True

    @staticmethod
    def pattern(x, weight, bias):
        yield "linear", aten.linear(x, weight, bias)
        yield "addmm", aten.addmm(bias, x, weight)
        yield "matmul-bias", aten.matmul(x, weight) + bias
        yield "matmul", aten.matmul(x, weight)
        yield "matmul-left", aten.matmul(weight, x)

    def where(self, m: Match) -> Verdict:
        if not m.is_tensor("weight") or m.val("weight").dim() != 2:
            return refuse(f"weight has shape {m.shape('weight')}, expected two axes", at=m["weight"])
        if m.form == "linear":
            return ACCEPT
        if not m.is_weight("weight"):
            return refuse(f"{m['weight']} is not a weight of the module", at=m["weight"])
        if not m.is_tensor("x") or m.val("x").dim() < 2:
            return refuse("x has one axis: this is a product with a vector", at=m["x"])
        outputs = m.shape("weight")[1]
        if m["bias"] is not None and (not m.is_tensor("bias") or m.shape("bias") != (outputs,)):
            return refuse(f"bias is not one value for each of the {outputs} outputs", at=m["bias"])
        if m["bias"] is not None and (no := m.same_dtype("x", "weight", "bias")) is not None:
            return no
        return ACCEPT

    def replacement(self, x, weight, bias, form):
        if form == "matmul-left":
            return ops.linear(x.transpose(-1, -2), weight).transpose(-1, -2)
        return ops.linear(x, weight if form == "linear" else weight.permute(1, 0), bias)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, w, kn, b = (
            Tensor(2, 5, 12),
            Tensor(7, 12, weight=True),
            Tensor(12, 7, weight=True),
            Tensor(7, weight=True),
        )
        flat = Tensor(5, 12)
        yield {}, Example(torch.nn.functional.linear, (x, w, b))
        yield {}, Example(lambda x, w: torch.nn.functional.linear(x, w), (x, w))
        yield {}, Example(lambda x, w, b: torch.matmul(x, w) + b, (x, kn, b))
        yield {}, Example(lambda x, w: x @ w, (x, kn))
        yield {}, Example(lambda x, w: x @ (w * 2.0), (x, kn), refusal="is not a weight")
        yield {}, Example(lambda x, w: w @ x, (Tensor(2, 12, 5), w))
        yield {}, Example(lambda x, w, b: torch.addmm(b, x, w.T), (flat, w, b))
        yield {}, Example(lambda x, w, b: torch.addmm(b, x, w), (flat, kn, b))
        yield (
            {},
            Example(
                lambda x, w: torch.nn.functional.linear(x, w),
                (x, Tensor(12, weight=True)),
                refusal="two axes",
            ),
        )
        yield {}, Example(lambda x, w: x @ w, (Tensor(12), kn), refusal="one axis")
        yield {}, Example(lambda x, w, b: x @ w + b, (x, kn, Tensor(5, 7)), count=1)
