"""Triton for gated_mlp: a flat range of elements per program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import TL, triton_file
from tilewright.runtime.contracts import KernelKey

BLOCK = 1024
WARPS = 4
ACTIVATION = {
    "silu": "g / (1.0 + tl.exp(-g))",
    "sigmoid": "1.0 / (1.0 + tl.exp(-g))",
    "relu": "tl.where(g < 0.0, 0.0, g)",  # keeps a NaN
    "gelu": "0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))",
    # 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (g + 0.044715 g^3)
    "gelu_tanh": "g / (1.0 + tl.exp(-1.5957691216057308 * g * (1.0 + 0.044715 * g * g)))",
}


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    kind = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[key.dtype]
    return [("gate", kind), ("up", kind), ("out", kind), ("N", "i32")]


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """Compile-time arguments."""
    return {"BLOCK": BLOCK}


def warps(columns: int) -> int:
    """Warps per program."""
    return WARPS


def generate(key: KernelKey, op: str) -> str:
    """The source file for one dtype and activation."""
    activation = config_of(key)["activation"]
    rounded = "" if key.dtype == "float32" else f".to({TL[key.dtype]}).to(tl.float32)"
    body = f"""i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
kept = i < N
g = tl.load(gate + i, mask=kept, other=0.0).to(tl.float32)
u = tl.load(up + i, mask=kept, other=0.0).to(tl.float32)
a = ({ACTIVATION[activation]}){rounded}
tl.store(out + i, (a * u).to({TL[key.dtype]}), mask=kept)"""
    return triton_file(
        title=f"{activation}(gate) * up, elementwise over N elements.",
        target=str(key.target),
        kernel=op,
        params="gate, up, out, N, BLOCK: tl.constexpr",
        body=body,
    )


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: allocates and launches."""

    def run(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        if gate.numel() > 0:
            grid = (-(-gate.numel() // BLOCK),)
            kernel[grid](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return out

    return run
