"""Warm ratios of rotate_rows against its definition, call by call and fused by Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilewright.compiler.ops import all_ops
from tilewright.kernels.common.bench import BenchRow, interleave
from tilewright.kernels.paged.call import callable_for
from tilewright.runtime.contracts import Target

SHAPES = ((3, 256, 64), (3, 1024, 64), (3, 4096, 64), (8, 256, 128), (8, 1024, 128), (8, 4096, 128))
"""Key heads, rows, channels of a head: SmolLM2-135M's and those of Llama-3-8B."""


def _rows(heads: int, count: int, size: int, compiled: Callable[..., Any], rounds: int) -> list[BenchRow]:
    pace = 10000.0 ** (-torch.arange(size // 2) / (size // 2))
    args = (torch.randn(1, heads, count, size), torch.randint(0, 8192, (1, heads, count)), pace)
    kernel, definition = callable_for("rotate_rows", args), all_ops()["rotate_rows"].definition
    with torch.inference_mode():
        seconds = interleave(
            {
                "kernel": lambda _: kernel(*args),
                "torch": lambda _: definition(*args),
                "inductor": lambda _: compiled(*args),
            },
            1,
            rounds,
        )
    traffic, own = sum(t.numel() * t.element_size() for t in (*args, args[0])), seconds["kernel"]
    case = f"rotate_rows {tuple(args[0].shape)} float32"
    return [
        BenchRow(case, own * 1e6, traffic / own / 1e9, name, seconds[name] * 1e6)
        for name in ("torch", "inductor")
    ]


def bench(
    target: Target, shapes: Sequence[tuple[int, int, int]] = SHAPES, rounds: int = 40
) -> list[BenchRow]:
    """Two rows per shape, float32, every row of every head at a place of its own."""
    compiled = torch.compile(all_ops()["rotate_rows"].definition, fullgraph=True, dynamic=False)
    return [row for shape in shapes for row in _rows(*shape, compiled, rounds)]
