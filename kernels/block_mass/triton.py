"""Triton for block_mass: one program per block of queries, which owns its row of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import next_power_of_2, triton_file
from tilewright.runtime.contracts import KernelKey

BLOCK = 64
"""Queries and keys of a tile; longer blocks take several."""
_POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_STRIDES = ("q_b", "q_h", "q_s", "k_b", "k_h", "k_s")


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    masked = config_of(key)["mask"]
    kind = _POINTER[key.dtype]
    found = [("q", kind), ("k", kind), ("lse", "*fp32"), ("q_off", "*i32"), ("k_off", "*i32")]
    found += [("mask", "*i1")] if masked else []
    found += [("out", "*fp32"), ("scale", "fp32"), *((n, "i32") for n in ("H", "S", "nQ", "nK", *_STRIDES))]
    return found + ([(name, "i32") for name in ("m_b", "m_h", "m_s")] if masked else [])


def _queries(suffix: str, first: str, size: int) -> list[str]:
    """Load a tile of queries and what their scores are measured from; a row without keys holds no mass."""
    return [
        f"row = {first} + tl.arange(0, {BLOCK})",
        "inside = row < last",
        f"x{suffix} = tl.load(qp + row[:, None] * q_s + d[None, :], "
        f"mask=inside[:, None] & (d < {size})[None, :], other=0.0)",
        'whole = tl.load(lse + head * S + row, mask=inside, other=float("inf"))',
        f'm{suffix} = tl.where(whole == float("-inf"), float("inf"), whole) * 1.4426950408889634',
    ]


def _tile(suffix: str) -> list[str]:
    return [
        f's = tl.dot(x{suffix}, y, input_precision="ieee") * factor',
        f"total += tl.sum(tl.where(kept[None, :], tl.exp2(s - m{suffix}[:, None]), 0.0), 1)",
    ]


def _indented(lines: list[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration."""
    config = config_of(key)
    size, masked = config["head"], config["mask"]
    kept = ["kept = column < end"]
    if masked:
        kept.append("kept = kept & tl.load(mp + column * m_s, mask=kept, other=0).to(tl.int1)")
    mask_at = ["mp = mask + head // H * m_b + head % H * m_h"] if masked else []
    lines = [
        "block = tl.program_id(0)",
        "head = tl.program_id(1).to(tl.int64)",
        "qp = q + head // H * q_b + head % H * q_h",
        "kp = k + head // H * k_b + head % H * k_h",
        *mask_at,
        "first = tl.load(q_off + block)",
        "last = tl.load(q_off + block + 1)",
        f"d = tl.arange(0, {next_power_of_2(size)})",
        "factor = scale * 1.4426950408889634",
        *_queries("", "first", size),
        "for j in range(0, nK):",
        *_indented(
            [
                "begin = tl.load(k_off + j)",
                "end = tl.load(k_off + j + 1)",
                f"total = tl.zeros([{BLOCK}], tl.float32)",
                f"for at in range(begin, end, {BLOCK}):",
                *_indented(
                    [
                        f"column = at + tl.arange(0, {BLOCK})",
                        *kept,
                        "y = tl.load(kp + column[None, :] * k_s + d[:, None], "
                        f"mask=(column < end)[None, :] & (d < {size})[:, None], other=0.0)",
                        *_tile(""),
                        f"for more in range(first + {BLOCK}, last, {BLOCK}):",
                        *_indented([*_queries("1", "more", size), *_tile("1")], 1),
                    ],
                    1,
                ),
                "tl.store(out + (head * nQ + block) * nK + j, tl.sum(total, 0))",
            ],
            1,
        ),
    ]
    return triton_file(
        title=f"Probability mass of blocks of attention, {key.dtype} heads of {size}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in parameters(key)),
        body="\n".join(lines),
    )


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """No compile-time arguments: the sizes are in the text."""
    return {}


def warps(columns: int) -> int:
    """Warps per program of 16 bits."""
    return 4


def launch_options(key: KernelKey) -> dict[str, int]:
    """num_warps and num_stages: products of float32 run without tensor cores, four warps would spill."""
    return {"num_warps": 8 if key.dtype == "float32" else warps(0), "num_stages": 2}


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: allocates, launches one program per head and block of queries."""
    masked = config_of(key)["mask"]

    def run(q: Tensor, k: Tensor, lse: Tensor, q_off: Tensor, k_off: Tensor, *rest: Any) -> Tensor:
        q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
        (batch, heads, length, _), blocks = q.shape, (q_off.shape[1] - 1, k_off.shape[1] - 1)
        out = q.new_empty((batch, heads, *blocks), dtype=torch.float32)
        mask = [rest[0].expand(batch, heads, 1, k.shape[2])] if masked else []
        given = [q, k, lse.contiguous(), q_off.contiguous(), k_off.contiguous(), *mask, out, rest[-1]]
        given += [heads, length, *blocks, *q.stride()[:3], *k.stride()[:3]]
        given += [mask[0].stride(i) for i in (0, 1, 3)] if masked else []
        if out.numel() > 0:
            kernel[(blocks[0], batch * heads)](*given, **launch_options(key))
        return out

    return run
