"""Cold-weight ratios of linear and linear_multi against torch.nn.functional.linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tilewright.kernels.common.bench import COLD_BYTES, BenchRow, interleave
from tilewright.kernels.common.family import make_key
from tilewright.kernels.linear import cpp
from tilewright.kernels.linear.family import LINEAR, LINEAR_MULTI
from tilewright.kernels.load import build_kernel
from tilewright.runtime.contracts import Refusal, Target

# SmolLM2-135M: rows of each weight that reads one input, then K.
SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((576,), 576),
    ((1536,), 576),
    ((576,), 1536),
    ((49152,), 576),
    ((576, 192, 192), 576),
    ((1536, 1536), 576),
)


def bench(
    target: Target,
    shapes: Sequence[tuple[tuple[int, ...], int]] = SHAPES,
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
    rounds: int = 15,
    streams: int = cpp.STREAMS,
) -> list[BenchRow]:
    """One row per shape: the kernel against one F.linear per weight, both over the same rotating weights."""
    return [_bench_shape(target, sizes, columns, rows, dtype, rounds, streams) for sizes, columns in shapes]


def _bench_shape(
    target: Target,
    sizes: tuple[int, ...],
    columns: int,
    rows: int,
    dtype: torch.dtype,
    rounds: int,
    streams: int,
) -> BenchRow:
    family = LINEAR if len(sizes) == 1 else LINEAR_MULTI
    traffic = sum(sizes) * columns * dtype.itemsize
    copies = max(2, -(-COLD_BYTES // traffic))
    x = torch.randn(rows, columns).to(dtype)
    sets = [[torch.randn(n, columns).to(dtype) for n in sizes] for _ in range(copies)]
    given = (x, sets[0][0], None) if len(sizes) == 1 else (x, sets[0], [None] * len(sizes))
    key = family.configure(given, target)
    if isinstance(key, Refusal):
        raise ValueError(f"{sizes} x {columns}: {key}")
    key = make_key(key.op, key.target, key.dtype, **{**dict(key.config), "streams": streams})
    op = build_kernel(family, key).op
    with torch.inference_mode():
        seconds = interleave(
            {
                "kernel": lambda i: op(x, *sets[i]),
                "torch": lambda i: [F.linear(x, weight) for weight in sets[i]],
            },
            copies,
            rounds,
        )
    case = f"{'+'.join(map(str, sizes))} x {columns}, {rows} row{'s' if rows > 1 else ''}, {key.dtype}"
    kernel, torch_time = seconds["kernel"], seconds["torch"]
    return BenchRow(case, kernel * 1e6, traffic / kernel / 1e9, "torch linear", torch_time * 1e6)
