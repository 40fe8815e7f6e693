"""Warm ratios of gated_mlp against Inductor's own fusion of the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewright.compiler.ops import all_ops
from tilewright.kernels.common.bench import BenchRow, against_inductor
from tilewright.kernels.gated_mlp.family import GATED_MLP
from tilewright.runtime.contracts import Target

SHAPES = ((1, 1536), (512, 1536))


def bench(target: Target, shapes: Sequence[tuple[int, int]] = SHAPES, rounds: int = 200) -> list[BenchRow]:
    """One row per shape, float32, silu."""
    definition = all_ops()["gated_mlp"].definition
    return [
        against_inductor(
            GATED_MLP, definition, (torch.randn(shape), torch.randn(shape), "silu"), target, rounds
        )
        for shape in shapes
    ]
