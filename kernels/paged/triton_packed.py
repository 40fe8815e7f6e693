"""Triton over pools of packed rows: what an attention loads of a key and a value, and packed_append."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import TL, next_power_of_2, triton_file
from tilewright.kernels.paged.signature import append_names
from tilewright.runtime.contracts import KernelKey

NUMBERS = ("k_numbers", "v_numbers")
"""The pools once more as float32: scales and offsets stand behind the codes of a row."""
POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def _sizes(key: KernelKey, pool: str) -> tuple[int, int, int]:
    """(channels of a row, channels of a group, bytes of the codes of a group) of pool k or v."""
    config = config_of(key)
    size = config["head" if pool == "k" else "value"]
    group = config["group"] or size
    return size, group, group * config["bits"] // 8


def numbers_of(pools: tuple[Tensor, ...]) -> list[Tensor]:
    """What NUMBERS are for two pools."""
    return [pool.view(torch.float32) for pool in pools]


def columns(key: KernelKey) -> list[str]:
    """Where the channels d of a key and e of a value lie in a row."""
    if config_of(key)["bits"] == 8:
        return []
    lines = []
    for pool, axis in (("k", "d"), ("v", "e")):
        _, group, run = _sizes(key, pool)
        lines += [
            f"{axis}_byte = {axis} // {group} * {run} + {axis} % {run}",
            f"{axis}_shift = {axis} % {group} // {run} * 4",
        ]
    return lines


def tile(key: KernelKey, pool: str, axis: str, across: str, down: str, mask: str) -> list[str]:
    """`{pool}_tile` in the kernel's dtype. across, down: how a row's and a channel's vector become a tile."""
    size, group, run = _sizes(key, pool)
    four = config_of(key)["bits"] == 4
    place = f"{axis}_byte" if four else axis
    lines = [
        f"{pool}_code = tl.load({pool}_pages + {pool}_row{across} + {place}{down}, mask={mask}, other=0)",
        *([f"{pool}_code = ({pool}_code.to(tl.int32) >> {axis}_shift{down}) & 15"] if four else []),
        f"{pool}_number = {pool}_numbers + {pool}_row // 4 + {size // group * run // 4}",
    ]
    if size == group:
        lines += [
            f"{pool}_scale = tl.load({pool}_number, mask=held, other=0.0){across}",
            f"{pool}_offset = tl.load({pool}_number + 1, mask=held, other=0.0){across}",
        ]
    else:
        lines += [
            f"{pool}_place = {pool}_number{across} + ({axis} // {group} * 2){down}",
            f"{pool}_scale = tl.load({pool}_place, mask={mask}, other=0.0)",
            f"{pool}_offset = tl.load({pool}_place + 1, mask={mask}, other=0.0)",
        ]
    value = f"{pool}_code.to(tl.float32) * {pool}_scale + {pool}_offset"
    return [*lines, f"{pool}_tile = ({value}).to({TL[key.dtype]})"]


def no_constants(key: KernelKey, columns: int) -> dict[str, int]:
    """No compile-time arguments: the sizes are in the text."""
    return {}


def warps(columns: int) -> int:
    """Warps per program of packed_append, which holds a group of the rows of a page."""
    return 4


def append_parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the run-time arguments of packed_append."""
    types = {"page_table": "*i32", "starts": "*i64", "k_pages": "*u8", "v_pages": "*u8"}
    found = [(name, types.get(name, POINTER[key.dtype])) for name in append_names(key)]
    found += [(name, "*fp32") for name in NUMBERS]
    steps = ("k_page", "k_head", "k_slot", "v_page", "v_head", "v_slot")
    return found + [(name, "i32") for name in ("Hkv", "tokens", "n", *steps)]


def _nearest(quotient: str) -> str:
    return f"({quotient} + 12582912.0) - 12582912.0"  # half to even below 2^22


def _group(key: KernelKey, pool: str, index: int) -> list[str]:
    """One group of the new rows of a page: its numbers, then the bytes of its codes."""
    size, group, run = _sizes(key, pool)
    bits = config_of(key)["bits"]
    levels, parts = 2**bits - 1, range(group // run)
    inside = "new[:, None]" + ("" if next_power_of_2(run) == run else f" & (c < {run})[None, :]")
    lines = [f"c = tl.arange(0, {next_power_of_2(run)})"]
    for i in parts:
        at = f"{pool} + row[:, None] * {size} + {index * group + i * run} + c[None, :]"
        lines.append(f"x{i} = tl.load({at}, mask={inside}, other=0.0).to(tl.float32)")
    least, most, bad = "tl.min(x0, 1)", "tl.max(x0, 1)", "tl.sum(x0 * 0.0, 1)"
    if bits == 4:
        least, most = f"tl.minimum({least}, tl.min(x1, 1))", f"tl.maximum({most}, tl.max(x1, 1))"
        bad += " + tl.sum(x1 * 0.0, 1)"
    lines += [
        f"bad = {bad}",
        f"low, high = tl.minimum({least}, 0.0), tl.maximum({most}, 0.0)",
        f"step = tl.div_rn(high - low, tl.full(low.shape, {float(levels)}, tl.float32))",
        "scale = tl.where(step > 0.0, step, 1.0)",
        "zero = tl.div_rn(0.0 - low, scale)",
        f"zero = {_nearest('zero')}",
        "good = bad == 0.0",
        "offset = tl.where(good, 0.0 - scale * zero, bad)",
    ]
    for i in parts:
        lines += [
            f"x{i} = tl.div_rn(x{i}, tl.broadcast_to(scale[:, None], x{i}.shape))",
            f"x{i} = {_nearest(f'x{i}')} + zero[:, None]",
            f"x{i} = tl.where(good[:, None], tl.minimum(tl.maximum(x{i}, 0.0), {float(levels)}), 0.0)",
            f"code{i} = x{i}.to(tl.int32)",
        ]
    code = "code0" if bits == 8 else "code0 | (code1 << 4)"
    return [
        *lines,
        f"tl.store(to[:, None] + {index * run} + c[None, :], ({code}).to(tl.uint8), mask={inside})",
        f"tl.store(numbers + {2 * index}, scale, mask=new)",
        f"tl.store(numbers + {2 * index + 1}, offset, mask=new)",
    ]


def generate_append(key: KernelKey, op: str) -> str:
    """packed_append: one program per sequence, head and page that is written; no page, no write."""
    page = config_of(key)["page"]
    lines = [
        "b = tl.program_id(0) // Hkv",
        "g = tl.program_id(0) % Hkv",
        "start = tl.load(starts + b)",
        f"place = start // {page} + tl.program_id(1)",
        f"begin = tl.maximum(start, place * {page})",
        f"end = tl.minimum(start + tokens, place * {page} + {page})",
        "used = (begin < end) & (place < n) & (place >= 0)",
        "page = tl.load(page_table + b * n + place, mask=used, other=-1).to(tl.int64)",
        "end = tl.where(page >= 0, end, begin)",
        f"slot = tl.arange(0, {page})",
        f"at = place * {page} + slot",
        "new = (at >= begin) & (at < end)",
        "row = (b * Hkv + g).to(tl.int64) * tokens + at - start",
    ]
    for pool in ("k", "v"):
        size, group, run = _sizes(key, pool)
        lines += [
            f"here = page * {pool}_page + g * {pool}_head + slot * {pool}_slot",
            f"to = {pool}_pages + here",
            f"numbers = {pool}_numbers + here // 4 + {size // group * run // 4}",
        ]
        for index in range(size // group):
            lines += _group(key, pool, index)
    return triton_file(
        title=f"Appending rows of {config_of(key)['bits']} bits to a pool of pages of {page}, {key.dtype}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in append_parameters(key)),
        body="\n".join(lines),
    )


def append_launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation."""
    page = config_of(key)["page"]

    def run(k_pages: Tensor, v_pages: Tensor, *rest: Tensor) -> None:
        table, starts, k, v = [x.contiguous() for x in rest]
        batch, heads, tokens = k.shape[:3]
        steps = [step for pool in (k_pages, v_pages) for step in pool.stride()[:3]]
        grid = (batch * heads, (tokens - 1) // page + 2)
        if batch * heads * tokens > 0:
            numbers = numbers_of((k_pages, v_pages))
            sizes = (heads, tokens, table.shape[1], *steps)
            kernel[grid](k_pages, v_pages, table, starts, k, v, *numbers, *sizes, num_warps=warps(0))

    return run
