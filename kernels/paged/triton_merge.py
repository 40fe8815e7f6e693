"""Triton for merge_parts: one program per head and query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import next_power_of_2, triton_file
from tilewright.kernels.paged.triton import POINTER
from tilewright.runtime.contracts import KernelKey


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    found = [("outs", POINTER[key.dtype]), ("lses", "*fp32"), ("out", "*fp32"), ("lse", "*fp32")]
    return found + [("n", "i32"), ("rows", "i32")]


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration."""
    size = config_of(key)["value"]
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        f"d = tl.arange(0, {next_power_of_2(size)})",
        'most = tl.full([], float("-inf"), tl.float32)',
        "at = row",
        "for _ in range(0, n):",
        "    found = tl.load(lses + at)",
        "    at += rows",
        "    most = tl.maximum(most, found, propagate_nan=tl.PropagateNan.ALL)",
        'base = tl.where(most == float("-inf"), 0.0, most)',
        "total = tl.zeros([], tl.float32)",
        f"whole = tl.zeros([{next_power_of_2(size)}], tl.float32)",
        "at = row",
        "for _ in range(0, n):",
        "    weight = tl.exp(tl.load(lses + at) - base)",
        "    total += weight",
        f"    whole += weight * tl.load(outs + at * {size} + d, mask=d < {size}, other=0.0).to(tl.float32)",
        "    at += rows",
        # The greatest weight is 1, so that a smaller total is 0: no part has a key.
        f"tl.store(out + row * {size} + d, whole / tl.where(total < 1.0, 1.0, total), mask=d < {size})",
        "tl.store(lse + row, base + tl.log(total))",
    ]
    return triton_file(
        title=f"Attentions over disjoint keys, merged: {key.dtype} heads of {size}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in parameters(key)),
        body="\n".join(lines),
    )


def warps(columns: int) -> int:
    """Warps per program: it holds one row."""
    return 1


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: allocates, launches one program per row."""

    def run(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        parts, heads, tokens, size = outs.shape
        out = outs.new_empty((1, heads, tokens, size), dtype=torch.float32)
        lse = lses.new_empty((1, heads, tokens))
        rows = heads * tokens
        if rows > 0:
            given = (outs.contiguous(), lses.contiguous(), out, lse, parts, rows)
            kernel[(rows,)](*given, num_warps=warps(size))
        return out, lse

    return run
