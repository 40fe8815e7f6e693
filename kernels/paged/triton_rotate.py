"""Triton for rotate_rows: one program per head and ROWS rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import next_power_of_2, triton_file
from tilewright.kernels.paged.signature import COSINE, SINE, polynomial, rotate_names
from tilewright.kernels.paged.triton import POINTER
from tilewright.runtime.contracts import KernelKey

ROWS = 16
INTEGERS = ("H", "S", "n", "share", "per_batch", "per_head", "step_0", "step_1", "step_2")


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    types = {"rows": POINTER[key.dtype], "offsets": "*i64", "pace": "*fp32", "page_table": "*i32"}
    found = [(name, types[name]) for name in rotate_names(key)]
    return [*found, ("out", POINTER[key.dtype]), *[(name, "i32") for name in INTEGERS]]


def _rest(key: KernelKey) -> list[str]:
    """The channels that no pair holds."""
    head, turned = config_of(key)["head"], config_of(key)["turned"]
    if head == turned:
        return []
    return [
        f"d = {turned} + tl.arange(0, {next_power_of_2(head - turned)})",
        f"inside = (d < {head})[None, :]",
        "x = tl.load(rows + at[:, None] + d[None, :], mask=held[:, None] & inside, other=0.0)",
        "tl.store(to + d[None, :], x, mask=real[:, None] & inside)",
    ]


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration."""
    config = config_of(key)
    head, pairs, page = config["head"], config["turned"] // 2, config["page"]
    place = (
        [
            f"id = tl.load(page_table + b * n + row // {page}, mask=real, other=-1).to(tl.int64)",
            "held = id >= 0",
            f"at = id * step_0 + g * step_1 + row % {page} * step_2",
        ]
        if page
        else ["held = real", "at = b.to(tl.int64) * step_0 + g * step_1 + row.to(tl.int64) * step_2"]
    )
    lines = [
        "b = tl.program_id(0) // H",
        "g = tl.program_id(0) % H",
        f"row = tl.program_id(1) * {ROWS} + tl.arange(0, {ROWS})",
        "real = row < S",
        "offset = tl.load(offsets + b * per_batch + g * per_head + row // share, mask=real, other=0)",
        f"i = tl.arange(0, {next_power_of_2(pairs)})",
        f"inside = (i < {pairs})[None, :]",
        f"right = tl.load(pace + i, mask=i < {pairs}, other=0.0).to(tl.float64) * 0.63661977236758134308",
        "x = offset.to(tl.float64)[:, None] * right[None, :]",  # right angles
        "whole = tl.floor(x + 0.5)",
        "r = (x - whole).to(tl.float32)",
        "quadrant = (whole - 4.0 * tl.floor(whole * 0.25)).to(tl.int32)",
        "z = r * r",
        f"sine = r * {polynomial(SINE, '')}",
        f"cosine = 1.0 + z * {polynomial(COSINE, '')}",
        "odd = (quadrant & 1) == 1",
        "c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)",
        "c = tl.where(((quadrant + 1) & 2) == 2, -c, c)",
        "s = tl.where((quadrant & 2) == 2, -s, s)",
        *place,
        f"first, second = {'2 * i, 2 * i + 1' if config['interleaved'] else f'i, i + {pairs}'}",
        "mask = held[:, None] & inside",
        "x = tl.load(rows + at[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32)",
        "y = tl.load(rows + at[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32)",
        f"to = out + ((b * H + g).to(tl.int64) * S + row)[:, None] * {head}",
        "mask = real[:, None] & inside",
        "tl.store(to + first[None, :], (x * c - y * s).to(out.dtype.element_ty), mask=mask)",
        "tl.store(to + second[None, :], (y * c + x * s).to(out.dtype.element_ty), mask=mask)",
        *_rest(key),
    ]
    return triton_file(
        title=f"Rows with a rotary embedding turned, {key.dtype} heads of {head}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in parameters(key)),
        body="\n".join(lines),
    )


def warps(columns: int) -> int:
    """Warps per program."""
    return 4


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation."""

    def run(rows: Tensor, offsets: Tensor, pace: Tensor, *table: Tensor) -> Tensor:
        batch, heads, size, width = rows.shape
        pages = 0
        if table:
            batch, pages = table[0].shape
            size *= pages
        out = rows.new_empty((batch, heads, size, width))
        if out.numel() > 0:
            own = offsets.shape
            numbers = [heads, size, pages, size // own[2]]
            numbers += [own[1] * own[2] if own[0] > 1 else 0, own[2] if own[1] > 1 else 0]
            given = [rows, *[x.contiguous() for x in (offsets, pace, *table)], out]
            grid = (batch * heads, -(-size // ROWS))
            kernel[grid](*given, *numbers, *rows.stride()[:3], num_warps=warps(width))
        return out

    return run
