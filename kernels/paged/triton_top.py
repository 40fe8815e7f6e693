"""Triton for top_pages and pick_pages: one program finds the greatest of a row, eight bits at a time.

Bounds are ordered as integers. Four passes count the digits of those that agree with the threshold so far,
and one more writes, in order, what is above the threshold and the first of what equals it: no sorting, and
the same choice however a GPU schedules it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import triton_file
from tilewright.kernels.paged.signature import bounds_names
from tilewright.kernels.paged.triton_rows import STEP, bounds_lines, bounds_parameters
from tilewright.runtime.contracts import KernelKey

SPAN = 1024
"""Bounds of a row at a time."""
NONE = 0x007FFFFF
"""Rank of -inf, the least."""


def _ranks() -> list[str]:
    """`rank`: the bounds j = start .. of a row as integers, -inf least, NaN greatest, -0 as 0."""
    return [
        f"j = start + tl.arange(0, {SPAN})",
        'x = tl.load(bounds + line + j, mask=j < n, other=float("-inf"))',
        "bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)",
        "rank = tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)",
        "rank = tl.where(x != x, 0xFFFFFFFF, rank)",
    ]


def _digit(shift: int) -> list[str]:
    """One digit more of the threshold; `need` of those that agree with it so far are still to be taken."""
    agree = f" & (rank >> {shift + 8} == threshold)" if shift < 24 else ""
    return [
        "count = tl.zeros((256,), tl.int32)",
        f"for start in range(0, n, {SPAN}):",
        *[f"    {line}" for line in _ranks()],
        f"    digit = (rank >> {shift} & 255).to(tl.int32)",
        f"    count += tl.histogram(digit, 256, mask=(j < n){agree})",
        "above = tl.cumsum(count, 0, reverse=True) - count",
        "here = (above < need) & (above + count >= need)",
        "found = tl.sum(tl.where(here, tl.arange(0, 256), 0), 0).to(tl.uint32)",
        "need = need - tl.sum(tl.where(here, above, 0), 0)",
        f"threshold = {'threshold * 256 + ' if shift < 24 else ''}found",
    ]


def _select() -> list[str]:
    """The places of the `some` greatest of row `line` of n `bounds`, ascending, -1 where those are -inf."""
    return [
        "line = tl.program_id(0).to(tl.int64) * n",
        "to = picked + tl.program_id(0).to(tl.int64) * some",
        "need = some",
        *[line for shift in (24, 16, 8, 0) for line in _digit(shift)],
        f"need = tl.where(threshold == {NONE}, 0, need)",
        "taken = need * 0",
        "same = need * 0",
        f"for start in range(0, n, {SPAN}):",
        *[f"    {line}" for line in _ranks()],
        "    equal = ((rank == threshold) & (j < n)).to(tl.int32)",
        "    first_of_them = same + tl.cumsum(equal, 0) - equal < need",
        "    take = (j < n) & ((rank > threshold) | ((equal == 1) & first_of_them))",
        "    one = take.to(tl.int32)",
        "    tl.store(to + taken + tl.cumsum(one, 0) - one, j, mask=take)",
        "    taken += tl.sum(one, 0)",
        "    same += tl.sum(equal, 0)",
        f"for start in range(0, some, {SPAN}):",
        f"    j = start + tl.arange(0, {SPAN})",
        "    tl.store(to + j, tl.full(j.shape, -1, tl.int32), mask=(j >= taken) & (j < some))",
    ]


def top_parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the run-time arguments of top_pages."""
    return [("bounds", "*fp32"), ("picked", "*i32"), ("n", "i32"), ("some", "i32")]


def generate_top(key: KernelKey, op: str) -> str:
    """top_pages: one program per row."""
    return triton_file(
        title="The places of the greatest bounds of each row.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in top_parameters(key)),
        body="\n".join(_select()),
    )


def top_launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation."""

    def run(bounds: Tensor, count: int) -> Tensor:
        batch, heads, width = bounds.shape
        some = min(count, width)
        picked = bounds.new_empty((batch, heads, some), dtype=torch.int32)
        if picked.numel() > 0:
            kernel[(batch * heads,)](bounds.contiguous(), picked, width, some, num_warps=4)
        return picked

    return run


def pick_parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the run-time arguments of pick_pages: those of page_bounds, whose result is kept
    in `bounds`, and what top_pages adds."""
    found = [("bounds" if name == "out" else name, kind) for name, kind in bounds_parameters(key)]
    return [*found, ("picked", "*i32"), ("some", "i32"), ("stage", "i32")]


def generate_pick(key: KernelKey, op: str) -> str:
    """pick_pages: bounds as page_bounds has them in stage 0, the choice in stage 1; one text for both."""
    config = config_of(key)
    page = config["page"]
    begin = "tl.load(first + b)" if config["first"] else "tl.zeros((), tl.int64)"
    lines = [
        "if stage == 0:",
        *[f"    {line}" for line in bounds_lines({**config, "group": "max"})],
        "    newest = tl.load(lengths + b) - 1",
        f"    forced = (newest >= 0) & (i == newest // {page})",
    ]
    if config["sink"]:
        lines += [
            f"    begin = {begin}",
            f"    forced = forced | ((begin >= 0) & (i == begin // {page}))",
        ]
    lines += [
        '    best = tl.where(forced, float("inf"), best)',
        "    tl.store(bounds + (b * Hkv + g) * n + i, best, mask=i < n)",
        "else:",
        *[f"    {line}" for line in _select()],
    ]
    return triton_file(
        title=f"Pages of {page} of the greatest bounds, {key.dtype}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in pick_parameters(key)),
        body="\n".join(lines),
    )


def pick_launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: the kernel once for the bounds, once for the choice."""
    names = bounds_names(key)[3:]

    def run(q: Tensor, low: Tensor, high: Tensor, *rest: Any) -> Tensor:
        given = [x.contiguous() for x in rest[: len(names)]]
        batch, heads, keys, width = q.shape[0], q.shape[1], low.shape[1], given[0].shape[1]
        some = min(int(rest[-1]), width)
        picked = q.new_empty((batch, keys, some), dtype=torch.int32)
        if picked.numel() > 0:
            bounds = q.new_empty((batch, keys, width), dtype=torch.float32)
            numbers = [heads, keys, width, *low.stride()[:2], *high.stride()[:2]]
            args = [q.contiguous(), low, high, *given, bounds, *numbers, picked, some]
            kernel[(batch * keys, -(-width // STEP))](*args, 0, num_warps=4)
            kernel[(batch * keys, 1)](*args, 1, num_warps=4)
        return picked

    return run
