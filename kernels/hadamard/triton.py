"""Triton for hadamard: one program per block of channels, which stays in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import TL, next_power_of_2, triton_file
from tilewright.runtime.contracts import KernelKey

MAX_BLOCK = 16384
"""Longest block that one program holds in registers without spilling."""
MAX_ORDER = 64
"""Largest dense factor that fits shared memory beside the block."""
MIN_DOT = 16
"""Smallest axis of a matrix product on the tensor units."""


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    config = config_of(key)
    kind = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[key.dtype]
    found = [("x", kind)]
    if config["order"] > 1:
        found.append(("base", "*fp32"))
    if config["signs"]:
        found.append(("signs", "*fp32"))
    return [*found, ("y", kind), ("per_row", "i32")]


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration; the butterflies are unrolled."""
    config = config_of(key)
    block, order = config["block"], config["order"]
    power, rows = block // order, next_power_of_2(order)
    signs, inverse = config["signs"], config["inverse"]
    lines = [
        "block = tl.program_id(0).to(tl.int64)",
        f"k = tl.arange(0, {rows})",
        f"columns = k[:, None] * {power} + tl.arange(0, {power})[None, :]",
        f"kept = (k < {order})[:, None] & (columns >= 0)",
        f"v = tl.load(x + block * {block} + columns, mask=kept, other=0.0).to(tl.float32)",
    ]
    sign = f"tl.load(signs + block % per_row * {block} + columns, mask=kept, other=0.0)"
    if signs and not inverse:
        lines.append(f"v = v * {sign}")
    width = 1
    while width < power:
        lines += [
            f"v = tl.permute(tl.reshape(v, [{rows}, {power // (2 * width)}, 2, {width}]), [0, 1, 3, 2])",
            "low, high = tl.split(v)",
            "v = tl.permute(tl.join(low + high, low - high), [0, 1, 3, 2])",
            f"v = tl.reshape(v, [{rows}, {power}])",
        ]
        width *= 2
    if order > 1:
        place = f"k[:, None] * {order} + k[None, :]" if inverse else f"k[None, :] * {order} + k[:, None]"
        lines += [
            f"inside = (k < {order})[:, None] & (k < {order})[None, :]",
            f"factor = tl.load(base + {place}, mask=inside, other=0.0)",
            'v = tl.dot(factor, v, input_precision="ieee")',
        ]
    lines.append(f"v = v * {block**-0.5!r}")
    if signs and inverse:
        lines.append(f"v = v * {sign}")
    lines.append(f"tl.store(y + block * {block} + columns, v.to({TL[key.dtype]}), mask=kept)")
    return triton_file(
        title=f"Hadamard transform of each {block} channels, base [{order}] x Sylvester [{power}].",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in parameters(key)),
        body="\n".join(lines),
    )


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """No compile-time arguments: the sizes are in the text."""
    return {}


def warps(columns: int) -> int:
    """Warps per program for blocks of `columns` channels: 16 elements a lane at most, up to 16 warps."""
    return min(16, max(1, next_power_of_2(columns) // 512))


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: allocates, launches one program per block."""
    block = config_of(key)["block"]

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        if x.numel() > 0:
            given = [x, *[t.contiguous() for t in rest], y, x.shape[-1] // block]
            kernel[(x.numel() // block,)](*given, num_warps=warps(block))
        return y

    return run
