"""Fuse a residual add with the RMS normalisation that reads it: one trip over the hidden state instead of
two."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import (
    ACCEPT,
    Change,
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


@rewrite_pass("fuse-add-rmsnorm", stage=Stage.LOWER, exactness=Exactness.BITWISE, trains=True)
class FuseAddRmsnorm(Rewrite):
    """Residual add and RMS normalisation in one op that returns both.

    rewrite:
        h = residual + x; y = rms_norm(h, weight)
     -> y, h = add_rms_norm(x, residual, weight)
    """

    near_miss_depth = 1

    @staticmethod
    def pattern(x, residual, weight, eps, offset, rounding):
        total = aten.add.Tensor(residual, x)
        return ops.rms_norm(total, weight, eps, offset, rounding), total

    def where(self, m: Match) -> Verdict:
        for name in ("x", "residual"):
            if not m.is_tensor(name):
                return refuse(f"{name} is the constant {m[name]!r}, not a tensor")
        if (no := m.same_dtype("x", "residual")) is not None:
            return no
        shapes = m.shape("x"), m.shape("residual")
        if len(shapes[0]) != len(shapes[1]) or not all(map(known_equal, *shapes)):
            return refuse(f"x is {shapes[0]} and residual is {shapes[1]}: the add broadcasts", at=m["x"])
        return ACCEPT

    def replacement(self, x, residual, weight, eps, offset, rounding):
        return ops.add_rms_norm(x, residual, weight, eps, offset, rounding)

    def cost(self, m: Match) -> Change:
        return Change(flops=1.0, bytes=4 / 5, launches=1 / 2)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, r, w = Tensor(2, 5, 12), Tensor(2, 5, 12), Tensor(12, weight=True)

        def block(x, r, w):
            h = r + x
            return ops.rms_norm(h, w, 1e-6) * 2, h

        yield {}, Example(block, (x, r, w))
        yield {}, Example(lambda x, r, w: ops.rms_norm(x + r, w, 1e-6), (x, r, w))
        yield {}, Example(block, (Tensor(5, 12), r, w), refusal="broadcasts")
        yield {}, Example(block, (Tensor(2, 5, 12, dtype=torch.float16), r, w), refusal="float16")
        yield {}, Example(lambda x, w: ops.rms_norm(x + 1.0, w, 1e-6), (x, w), refusal="constant 1.0")
