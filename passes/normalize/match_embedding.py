"""Raise embedding look-ups to one `embedding` op."""

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
    ops,
    refuse,
    rewrite_pass,
)

aten = torch.ops.aten


@rewrite_pass("match-embedding", stage=Stage.NORMALIZE, exactness=Exactness.BITWISE, trains=True)
class MatchEmbedding(Rewrite):
    """Recognise rows of a table picked by indices.

    rewrite:
        aten.embedding(weight, indices, ...)
     -> embedding(weight, indices)

    A padding row, scaling by frequency and sparse gradients change gradients only; of these a padding row is
    let through when no gradients are wanted.
    """

    @staticmethod
    def pattern(weight, indices, padding, by_frequency, sparse):
        return aten.embedding(weight, indices, padding, by_frequency, sparse)

    def where(self, m: Match) -> Verdict:
        if m["by_frequency"] is not False:
            return refuse(f"scale_grad_by_freq is {m['by_frequency']}")
        if m["sparse"] is not False:
            return refuse(f"sparse is {m['sparse']}")
        if m.training and m["padding"] != -1:
            return refuse(f"padding_idx is {m['padding']}: that row has no gradient")
        return ACCEPT

    def replacement(self, weight, indices, padding, by_frequency, sparse):
        return ops.embedding(weight, indices)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        table, rows = Tensor(4, 6, weight=True), Tensor(2, 5, dtype=torch.int64)
        yield {}, Example(lambda w, i: F.embedding(i, w), (table, rows))
        yield {}, Example(lambda w, i: F.embedding(i, w, padding_idx=1), (table, rows))
        yield (
            {},
            Example(
                lambda w, i: F.embedding(i, w, scale_grad_by_freq=True), (table, rows), refusal="by_freq"
            ),
        )
        yield (
            {},
            Example(lambda w, i: F.embedding(i, w, sparse=True), (table, rows), refusal="sparse is True"),
        )
        yield (
            {},
            Example(
                lambda w, i: F.embedding(i, w, padding_idx=1),
                (table, rows),
                refusal="no gradient",
                training=True,
            ),
        )
