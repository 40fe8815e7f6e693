"""Triton for rms_norm and add_rms_norm: one program per row, which stays in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import TL, next_power_of_2, triton_file
from tilewright.runtime.contracts import KernelKey

MAX_COLUMNS = 16384
"""Longest row that one program holds in registers without spilling."""


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    config = config_of(key)
    kinds = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
    found = [("x", kinds[key.dtype])]
    if config["residual"]:
        found += [("residual", kinds[key.dtype]), ("total", kinds[key.dtype])]
    if config["weight"] != "none":
        found.append(("weight", kinds[config["weight"]]))
    found += [("y", kinds[config["out"]]), ("D", "i32"), ("eps", "fp32")]
    return found + ([("offset", "fp32")] if config["offset"] else [])


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration."""
    config = config_of(key)
    scaled, last = config["weight"] != "none", config["rounding"] == "scale_last"
    lines = [
        "row = tl.program_id(0).to(tl.int64) * D",
        "columns = tl.arange(0, BLOCK)",
        "kept = columns < D",
        "v = tl.load(x + row + columns, mask=kept, other=0.0).to(tl.float32)",
    ]
    if config["residual"]:
        lines += [
            "v += tl.load(residual + row + columns, mask=kept, other=0.0).to(tl.float32)",
            f"stored = v.to({TL[key.dtype]})",
            "tl.store(total + row + columns, stored, mask=kept)",
            "v = stored.to(tl.float32)",
        ]
    lines.append("v = v * tl.rsqrt(tl.sum(v * v, axis=0) / D + eps)")
    if scaled:
        if last:
            lines.append(f"v = v.to({TL[key.dtype]}).to(tl.float32)")
        lines.append("w = tl.load(weight + columns, mask=kept, other=0.0).to(tl.float32)")
        if config["offset"]:
            lines.append("w += offset")
            if last:
                lines.append(f"w = w.to({TL[config['weight']]}).to(tl.float32)")
        lines.append("v = v * w")
    lines.append(f"tl.store(y + row + columns, v.to({TL[config['out']]}), mask=kept)")
    names = [name for name, _ in parameters(key)] + ["BLOCK: tl.constexpr"]
    what = "rms_norm(residual + x), residual + x" if config["residual"] else "rms_norm(x)"
    return triton_file(
        title=f"{what} over the last axis of size D <= BLOCK, one program per row.",
        target=str(key.target),
        kernel=op,
        params=", ".join(names),
        body="\n".join(lines),
    )


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """Compile-time arguments for rows of `columns` elements."""
    return {"BLOCK": next_power_of_2(columns)}


def warps(columns: int) -> int:
    """Warps per program for rows of `columns` elements: 16 elements a lane at most, up to 16 warps."""
    return min(16, max(1, next_power_of_2(columns) // 512))


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: allocates, launches one program per row."""
    config = config_of(key)
    out = getattr(torch, config["out"])

    def run(x: Tensor, *rest: Any) -> Any:
        x = x.contiguous()
        tensors = [t.contiguous() for t in rest if isinstance(t, Tensor)]
        numbers = [v for v in rest if not isinstance(v, Tensor)]
        y, total = torch.empty_like(x, dtype=out), torch.empty_like(x)
        columns = x.shape[-1]
        if x.numel() > 0:
            given = [x, tensors[0], total, *tensors[1:]] if config["residual"] else [x, *tensors]
            grid = (x.numel() // columns,)
            kernel[grid](*given, y, columns, *numbers, **constants(key, columns), num_warps=warps(columns))
        return (y, total) if config["residual"] else y

    return run
