"""Warm ratios of hadamard against Inductor's own fusion of the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewright.compiler.hadamard import base_matrix, plan_for
from tilewright.compiler.ops import all_ops
from tilewright.kernels.common.bench import BenchRow, against_inductor
from tilewright.kernels.hadamard.family import HADAMARD
from tilewright.runtime.contracts import Target

SHAPES = ((1, 1536), (512, 1536), (512, 4096))


def bench(target: Target, shapes: Sequence[tuple[int, int]] = SHAPES, rounds: int = 200) -> list[BenchRow]:
    """One row per shape, float32."""
    definition = all_ops()["hadamard"].definition
    rows = []
    for shape in shapes:
        plan = plan_for(shape[-1])
        assert plan is not None, "the listed sizes have plans"
        base = base_matrix(plan.base) if plan.base > 1 else None
        args = (torch.randn(shape), plan.block, base, None, False)
        rows.append(against_inductor(HADAMARD, definition, args, target, rounds))
    return rows
