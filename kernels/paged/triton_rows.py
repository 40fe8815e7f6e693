"""Triton for paged_append, page_bounds and attention_mass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import next_power_of_2, triton_file
from tilewright.kernels.paged.signature import append_names, bounds_names
from tilewright.kernels.paged.triton import POINTER
from tilewright.runtime.contracts import KernelKey

STEP = 32
"""Pages of a program of page_bounds; keys and rows of attention_mass are BLOCK_N and BLOCK_M."""


def no_constants(key: KernelKey, columns: int) -> dict[str, int]:
    """No compile-time arguments: the sizes are in the text."""
    return {}


def warps(columns: int) -> int:
    """Warps per program."""
    return 4


def append_warps(columns: int) -> int:
    """Warps per program of paged_append, which holds a whole page of one head."""
    return 8


def append_parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the run-time arguments of paged_append."""
    types = {"page_table": "*i32", "starts": "*i64"}
    found = [(name, types.get(name, POINTER[key.dtype])) for name in append_names(key)]
    return found + [(name, "i32") for name in ("Hkv", "tokens", "n", *_steps(config_of(key)["planes"]))]


def _steps(planes: bool) -> list[str]:
    names = ["k_page", "k_head", "k_slot", "v_page", "v_head", "v_slot"]
    return names + (["low_page", "low_head", "high_page", "high_head"] if planes else [])


def _extreme(name: str, word: str, limit: str) -> list[str]:
    """The extreme of the new keys of a page, joined with what its plane holds unless the page starts anew."""
    place = f"{name} + page * {name}_page + g * {name}_head + d"
    return [
        f'best = tl.{word}(tl.where(new[:, None], wide, float("{limit}")), 0)',
        'best = tl.where(bad, float("nan"), best)',
        f'old = tl.load({place}, mask=d < kept, other=float("{limit}")).to(tl.float32)',
        f"best = tl.{word}imum(best, old, propagate_nan=tl.PropagateNan.ALL)",
        f"tl.store({place}, best.to({name}.dtype.element_ty), mask=d < columns)",
    ]


def generate_append(key: KernelKey, op: str) -> str:
    """paged_append: one program per sequence, head and page that is written; no page, no write."""
    config = config_of(key)
    page, head, value = config["page"], config["head"], config["value"]
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
    for name, size in (("k", head), ("v", value)):
        real = f"new[:, None] & (d < {size})[None, :]"
        lines += [
            f"d = tl.arange(0, {next_power_of_2(size)})",
            f"x = tl.load({name} + row[:, None] * {size} + d[None, :], mask={real}, other=0.0)",
            f"to = {name}_pages + page * {name}_page + g * {name}_head + slot[:, None] * {name}_slot",
            f"tl.store(to + d[None, :], x, mask={real})",
        ]
        if name == "k" and config["planes"]:
            lines += [
                "wide = x.to(tl.float32)",
                "bad = tl.max(tl.where(new[:, None] & (wide != wide), 1, 0), 0) > 0",
                f"columns = tl.where(begin < end, {head}, 0)",
                f"kept = tl.where(begin > place * {page}, columns, 0)",
                *_extreme("low", "min", "inf"),
                *_extreme("high", "max", "-inf"),
            ]
    return triton_file(
        title=f"Appending to a pool of pages of {page}, {key.dtype}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in append_parameters(key)),
        body="\n".join(lines),
    )


def append_launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation."""
    names, page = append_names(key), config_of(key)["page"]

    def run(*args: Tensor) -> None:
        given = dict(zip(names, args, strict=True))
        for name in ("page_table", "starts", "k", "v"):
            given[name] = given[name].contiguous()
        batch, heads, tokens = given["k"].shape[:3]
        numbers = [heads, tokens, given["page_table"].shape[1]]
        numbers += [*given["k_pages"].stride()[:3], *given["v_pages"].stride()[:3]]
        numbers += [s for name in names[6:] for s in given[name].stride()[:2]]
        grid = (batch * heads, (tokens - 1) // page + 2)
        if batch * heads * tokens > 0:
            kernel[grid](*[given[name] for name in names], *numbers, num_warps=append_warps(0))

    return run


def bounds_parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the run-time arguments of page_bounds."""
    types = {"page_table": "*i32", "lengths": "*i64", "first": "*i64"}
    found = [(name, types.get(name, POINTER[key.dtype])) for name in bounds_names(key)]
    numbers = ("H", "Hkv", "n", "low_page", "low_head", "high_page", "high_head")
    return [*found, ("out", "*fp32"), *[(name, "i32") for name in numbers]]


def bounds_lines(config: dict[str, Any]) -> list[str]:
    """The bounds `best` of pages `i` of sequence `b`, head `g`."""
    head, page = config["head"], config["page"]
    summed = config["group"] == "sum"
    start = "0.0" if summed else 'float("-inf")'
    return [
        "b = tl.program_id(0) // Hkv",
        "g = tl.program_id(0) % Hkv",
        f"i = tl.program_id(1) * {STEP} + tl.arange(0, {STEP})",
        "id = tl.load(page_table + b * n + i, mask=i < n, other=-1).to(tl.int64)",
        f"holds = (id >= 0) & (i * {page} < tl.load(lengths + b))",
        *([f"holds = holds & (i * {page} + {page} > tl.load(first + b))"] if config["first"] else []),
        f"d = tl.arange(0, {next_power_of_2(head)})",
        f"real = holds[:, None] & (d < {head})[None, :]",
        "place = (id * low_page + g * low_head)[:, None] + d[None, :]",
        "least = tl.load(low + place, mask=real, other=0.0).to(tl.float32)",
        "place = (id * high_page + g * high_head)[:, None] + d[None, :]",
        "most = tl.load(high + place, mask=real, other=0.0).to(tl.float32)",
        "G = H // Hkv",
        f"best = tl.full(({STEP},), {start}, tl.float32)",
        "for h in range(G):",
        f"    row = tl.load(q + (b * H + g * G + h) * {head} + d, mask=d < {head}, other=0.0).to(tl.float32)",
        "    x, y = row[None, :] * least, row[None, :] * most",
        "    s = tl.sum(tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL), 1)",
        "    best = best + s"
        if summed
        else "    best = tl.maximum(best, s, propagate_nan=tl.PropagateNan.ALL)",
        'best = tl.where(holds, best, float("-inf"))',
    ]


def generate_bounds(key: KernelKey, op: str) -> str:
    """page_bounds: one program per sequence, head and STEP pages."""
    config = config_of(key)
    lines = [*bounds_lines(config), "tl.store(out + (b * Hkv + g) * n + i, best, mask=i < n)"]
    return triton_file(
        title=f"Bounds of the scores of pages of {config['page']}, {key.dtype}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in bounds_parameters(key)),
        body="\n".join(lines),
    )


def bounds_launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation."""

    def run(q: Tensor, low: Tensor, high: Tensor, *rest: Tensor) -> Tensor:
        table, *more = [x.contiguous() for x in rest]
        batch, heads, width = q.shape[0], q.shape[1], table.shape[1]
        out = q.new_empty((batch, low.shape[1], width), dtype=torch.float32)
        numbers = [heads, low.shape[1], width, *low.stride()[:2], *high.stride()[:2]]
        if out.numel() > 0:
            grid = (batch * low.shape[1], -(-width // STEP))
            kernel[grid](q.contiguous(), low, high, table, *more, out, *numbers, num_warps=4)
        return out

    return run


def mass_parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the run-time arguments of attention_mass."""
    found = [("q", POINTER[key.dtype]), ("k", POINTER[key.dtype]), ("lse", "*fp32")]
    found += [("first", "*i64")] if config_of(key)["first"] else []
    return [
        *found,
        ("out", "*fp32"),
        ("scale", "fp32"),
        *[(name, "i32") for name in ("H", "Hkv", "tokens", "keys")],
    ]


def mass_constants(key: KernelKey, columns: int) -> dict[str, int]:
    """Compile-time arguments."""
    return {"BLOCK_M": 32, "BLOCK_N": 32} if key.dtype == "float32" else {"BLOCK_M": 64, "BLOCK_N": 64}


def generate_mass(key: KernelKey, op: str) -> str:
    """attention_mass: one program per head and BLOCK_N keys, over the rows that see them."""
    config = config_of(key)
    head, causal = config["head"], config["causal"]
    block = max(16, next_power_of_2(head))
    k_inside = f" & (d < {head})[:, None]" if block != head else ""
    q_inside = f" & (d < {head})[None, :]" if block != head else ""
    precision = ', input_precision="ieee"' if key.dtype == "float32" else ""
    seen = " & (j[None, :] <= keys - tokens + t[:, None])" if causal else ""
    lines = [
        "b = tl.program_id(0) // Hkv",
        "g = tl.program_id(0) % Hkv",
        "G = H // Hkv",
        "j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
        f"d = tl.arange(0, {block})",
        f"k_at = (b * Hkv + g).to(tl.int64) * keys * {head} + j[None, :] * {head} + d[:, None]",
        f"k_tile = tl.load(k + k_at, mask=(j < keys)[None, :]{k_inside}, other=0.0)",
        "sum = tl.zeros((BLOCK_N,), tl.float32)",
        "factor = scale * 1.4426950408889634",
        "for start in range(0, tokens * G, BLOCK_M):",
        "    row = start + tl.arange(0, BLOCK_M)",
        "    t = row % tokens",
        "    real = row < tokens * G",
        "    at = (b * H + g * G).to(tl.int64) * tokens + row",
        f"    q_mask = real[:, None]{q_inside}",
        f"    q_tile = tl.load(q + at[:, None] * {head} + d[None, :], mask=q_mask, other=0.0)",
        '    less = tl.load(lse + at, mask=real, other=float("-inf"))',
        f"    s = tl.dot(q_tile, k_tile{precision}) * factor - less[:, None] * 1.4426950408889634",
        f'    some = (real & (less > float("-inf")))[:, None]{seen}',
        "    sum += tl.sum(tl.where(some, tl.exp2(s), 0.0), 0)",
        *(["sum = tl.where(j >= tl.load(first + b), sum, 0.0)"] if config["first"] else []),
        "tl.store(out + (b * Hkv + g).to(tl.int64) * keys + j, sum, mask=j < keys)",
    ]
    given = [name for name, _ in mass_parameters(key)] + ["BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"]
    return triton_file(
        title=f"Column sums of attention, {key.dtype}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(given),
        body="\n".join(lines),
    )


def mass_launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation."""

    def run(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        tensors = [x.contiguous() for x in (q, k, *rest[:-1])]
        out = k.new_empty(k.shape[:3], dtype=torch.float32)
        sizes = mass_constants(key, q.shape[3])
        if out.numel() > 0:
            grid = (k.shape[0] * k.shape[1], -(-k.shape[2] // sizes["BLOCK_N"]))
            numbers = [q.shape[1], k.shape[1], q.shape[2], k.shape[2]]
            kernel[grid](*tensors, out, rest[-1], *numbers, **sizes, num_warps=4, num_stages=2)
        return out

    return run
