"""Triton for linear and linear_multi with few rows of x: each program reads a block of weight rows once.

All weights of a call share one grid: a program finds its weight by comparing its index with the number of
blocks of each. The sum over K runs in a loop over column blocks, in float32, for every row of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import TL, triton_file
from tilewright.kernels.linear.cpp import names
from tilewright.runtime.contracts import KernelKey

BLOCK_N, BLOCK_K = 8, 256
WARPS = 4


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    kind = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[key.dtype]
    found = [("x", kind)]
    for i, (weight, bias) in enumerate(names(key)):
        found += [(weight, kind), (f"N{i}", "i32"), (f"stride{i}", "i32")]
        found += [(bias, kind)] if bias is not None else []
        found.append((f"y{i}", kind))
    return [*found, ("M", "i32"), ("K", "i32")]


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """Compile-time arguments."""
    return {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}


def warps(columns: int) -> int:
    """Warps per program."""
    return WARPS


def _block(key: KernelKey, i: int, bias: str | None) -> list[str]:
    """The statements that multiply one block of rows of weight i."""
    rows = config_of(key)["rows"]
    lines = ["n = (block - first) * BLOCK_N + tl.arange(0, BLOCK_N)", f"real = n < N{i}"]
    lines += [f"sum{m} = tl.zeros((BLOCK_N,), dtype=tl.float32)" for m in range(rows)]
    lines += [
        "for start in range(0, K, BLOCK_K):",
        "    k = start + tl.arange(0, BLOCK_K)",
        f"    places = n.to(tl.int64)[:, None] * stride{i} + k[None, :]",
        f"    w = tl.load(w{i} + places, mask=real[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)",
    ]
    for m in range(rows):
        inside = "k < K" if m == 0 else f"k < tl.where({m} < M, K, 0)"
        lines += [
            f"    x{m} = tl.load(x + {m} * K + k, mask={inside}, other=0.0).to(tl.float32)",
            f"    sum{m} += tl.sum(w * x{m}[None, :], axis=1)",
        ]
    if bias is not None:
        lines.append(f"b = tl.load({bias} + n, mask=real, other=0.0).to(tl.float32)")
    for m in range(rows):
        value = f"(sum{m} + b)" if bias is not None else f"sum{m}"
        inside = "real" if m == 0 else f"n < tl.where({m} < M, N{i}, 0)"
        lines.append(f"tl.store(y{i} + {m} * N{i} + n, {value}.to({TL[key.dtype]}), mask={inside})")
    return lines


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: number of weights, which have biases, bound on rows."""
    pairs = names(key)
    lines = ["block = tl.program_id(0)", "first = 0"]
    for i, (_, bias) in enumerate(pairs):
        inner = _block(key, i, bias)
        if len(pairs) > 1:
            lines.append(f"blocks = tl.cdiv(N{i}, BLOCK_N)")
            lines.append("if (block >= first) & (block < first + blocks):")
            inner = [f"    {line}" for line in inner]
        lines += inner
        if len(pairs) > 1:
            lines.append("first += blocks")
    return triton_file(
        title=f"x W^T for at most {config_of(key)['rows']} rows of x and {len(pairs)} weight(s), one pass.",
        target=str(key.target),
        kernel=op,
        params=", ".join(
            [name for name, _ in parameters(key)] + ["BLOCK_N: tl.constexpr", "BLOCK_K: tl.constexpr"]
        ),
        body="\n".join(lines),
    )


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: allocates every output, launches one grid over the rows of all weights."""
    pairs = names(key)

    def run(x: Tensor, *args: Tensor) -> Any:
        x, rest = x.contiguous(), iter(args)
        columns = x.shape[-1]
        given, outputs, blocks = [], [], 0
        for _, bias in pairs:
            weight = next(rest)
            weight = weight if weight.stride(1) == 1 else weight.contiguous()
            y = x.new_empty((*x.shape[:-1], weight.shape[0]))
            given += [weight, weight.shape[0], weight.stride(0)]
            given += [next(rest).contiguous()] if bias is not None else []
            given.append(y)
            outputs.append(y)
            blocks += -(-weight.shape[0] // BLOCK_N)
        if blocks > 0:
            kernel[(blocks,)](
                x, *given, x.numel() // columns, columns, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=WARPS
            )
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    return run
