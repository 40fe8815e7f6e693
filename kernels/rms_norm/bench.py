"""Warm ratios of rms_norm and add_rms_norm against Inductor's own fusion of the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewright.compiler.ops import all_ops
from tilewright.kernels.common.bench import BenchRow, against_inductor
from tilewright.kernels.rms_norm.family import ADD_RMS_NORM, RMS_NORM
from tilewright.runtime.contracts import Target

SHAPES = ((1, 576), (512, 576), (512, 2048))


def bench(target: Target, shapes: Sequence[tuple[int, int]] = SHAPES, rounds: int = 200) -> list[BenchRow]:
    """One row per op and shape (rows, columns), float32."""
    found = []
    for family in (RMS_NORM, ADD_RMS_NORM):
        definition = all_ops()[family.op].definition
        for rows, columns in shapes:
            x, weight = torch.randn(rows, columns), torch.randn(columns)
            inputs = (x, weight) if family is RMS_NORM else (x, torch.randn(rows, columns), weight)
            found.append(
                against_inductor(family, definition, (*inputs, 1e-6, 0.0, "scale_first"), target, rounds)
            )
    return found
