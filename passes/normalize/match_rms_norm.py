"""Raise the decomposed spellings of RMS normalisation to one `rms_norm` op.

paper: arXiv:1910.07467 (RMSNorm). Models write x * rsqrt(mean(x^2) + eps) * weight in float32 and differ in where
the result is rounded to 16 bits; both places are kept apart (`rounding`), as is a weight stored minus one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import ACCEPT, Exactness, Example, Match, Rewrite, Stage, Tensor, Verdict, ops, refuse, rewrite_pass

F32 = torch.float32


def _normalized(x, eps):
    return x * torch.rsqrt(torch.pow(x, 2).mean([-1], keepdim=True) + eps)


@rewrite_pass("match-rms-norm", stage=Stage.NORMALIZE, exactness=Exactness.ROUNDING, trains=True)
class MatchRmsNorm(Rewrite):
    """Recognise RMS normalisation over the last axis.

    rewrite:
        x * rsqrt(mean(x ** 2, -1) + eps) * weight
     -> rms_norm(x, weight, eps)
    """

    inner_may_escape = True

    @staticmethod
    def pattern(x, weight, eps):
        yield "plain", _normalized(x, eps) * weight

    def where(self, m: Match) -> Verdict:
        if (no := m.constant("eps", float)) is not None:
            return no
        if not m.is_tensor("weight"):
            return refuse("the factor is not a tensor", at=m["weight"])
        if m.val("weight").dim() != 1 or m.shape("weight") != m.shape("x")[-1:]:
            return refuse(f"weight is {m.shape('weight')}, the normalised axis has {m.shape('x')[-1]}", at=m["weight"])
        return ACCEPT

    def replacement(self, x, weight, eps):
        return ops.rms_norm(x, weight, eps)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, w = Tensor(2, 5, 12), Tensor(12)
        yield {}, Example(lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w, (x, w))
