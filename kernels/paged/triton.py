"""Triton for paged_attention and token_attention: every step of keys is found through the page table.

A program takes a block of query rows of one key head (row = new token * G + head, so that a key read once
serves its G heads) and one part of the keys; the parts of a decode are merged by their log-sum-exps, so that
a few heads fill a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import TL, next_power_of_2, triton_file
from tilewright.kernels.paged import triton_packed
from tilewright.kernels.paged.signature import attention_names, entries_of, is_packed
from tilewright.runtime.contracts import KernelKey

POINTER = triton_packed.POINTER
PROGRAMS = 264
"""Two a multiprocessor of a large GPU: below, the keys are split."""
MOST_PARTS = 32
PART_KEYS = 256
INTEGERS = ("H", "Hkv", "tokens", "blocks", "n", "parts")
STRIDES = ("k_page", "k_head", "k_slot", "v_page", "v_head", "v_slot")


def _listed(key: KernelKey) -> str:
    return {"picked": "picked", "tokens": "positions"}.get(entries_of(key), "")


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the run-time arguments."""
    pool = "*u8" if is_packed(key) else POINTER[key.dtype]
    types = {"q": POINTER[key.dtype], "k_pages": pool, "v_pages": pool, "lengths": "*i64", "first": "*i64"}
    found = [(name, types.get(name, "*i32")) for name in attention_names(key)]
    found += [(name, "*fp32") for name in triton_packed.NUMBERS if is_packed(key)]
    found += [("out", POINTER[key.dtype]), ("lse", "*fp32"), ("scale", "fp32")]
    names = [*INTEGERS, *STRIDES, *(("listed", "lists") if _listed(key) else ())]
    return found + [(name, "i32") for name in names]


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """Compile-time arguments of a decode."""
    few = key.dtype == "float32" or is_packed(key)  # what is restored stays in registers beside its codes
    return {"BLOCK_M": 16, "BLOCK_N": 16 if config_of(key).get("group") else 32 if few else 64}


def many_rows(key: KernelKey) -> dict[str, int]:
    """Compile-time arguments of a prefill chunk; it runs with 8 warps."""
    few = key.dtype == "float32" or is_packed(key)
    # Wide heads behind a list of pages or positions spill there with 64 queries.
    listed = key.target.arch == "sm_120" and entries_of(key) != "all" and config_of(key)["head"] > 64
    return {**constants(key, 0), "BLOCK_M": 32 if few or listed else 64}


def warps(columns: int) -> int:
    """Warps per program of a decode."""
    return 4


def _places(key: KernelKey) -> list[str]:
    """The positions `at` and pages `id` of one step of keys; id is -1 where there is none to see."""
    page = config_of(key)["page"]
    entries = entries_of(key)
    if entries == "all":
        return [
            "at = j",
            "inside = (j < end) & (j >= low)",
            f"id = tl.load(page_table + b * n + j // {page}, mask=inside, other=-1)",
        ]
    if entries == "picked":
        return [
            f"entry = tl.load(picked + row_of_list + j // {page}, mask=j < end, other=-1)",
            f"at = entry * {page} + j % {page}",
            "inside = (entry >= 0) & (at < high) & (at >= low)",
            "id = tl.load(page_table + b * n + entry, mask=inside, other=-1)",
        ]
    return [
        "at = tl.load(positions + row_of_list + j, mask=j < end, other=-1)",
        "inside = (at >= 0) & (at < high) & (at >= low)",
        f"id = tl.load(page_table + b * n + at // {page}, mask=inside, other=-1)",
    ]


def _tiles(key: KernelKey) -> list[str]:
    """The keys `k_tile` [D, N] and values `v_tile` [N, E] of one step, 0 where none is held."""
    config = config_of(key)
    d_mask, e_mask = "held[None, :]", "held[:, None]"
    if _padded(config["head"]):
        d_mask += f" & (d < {config['head']})[:, None]"
    if _padded(config["value"]):
        e_mask += f" & (e < {config['value']})[None, :]"
    if is_packed(key):
        keys = triton_packed.tile(key, "k", "d", "[None, :]", "[:, None]", d_mask)
        return keys + triton_packed.tile(key, "v", "e", "[:, None]", "[None, :]", e_mask)
    return [
        f"k_tile = tl.load(k_pages + k_row[None, :] + d[:, None], mask={d_mask}, other=0.0)",
        f"v_tile = tl.load(v_pages + v_row[:, None] + e[None, :], mask={e_mask}, other=0.0)",
    ]


def _step(key: KernelKey) -> list[str]:
    config = config_of(key)
    page = config["page"]
    precision = ', input_precision="ieee"' if key.dtype == "float32" else ""
    return [
        "j = start + tl.arange(0, BLOCK_N)",
        *_places(key),
        "held = id >= 0",
        f"slot = at % {page}",
        "k_row = id.to(tl.int64) * k_page + g * k_head + slot * k_slot",
        "v_row = id.to(tl.int64) * v_page + g * v_head + slot * v_slot",
        *_tiles(key),
        f"s = tl.dot(q_tile, k_tile{precision}) * factor",
        's = tl.where(held[None, :] & (at[None, :] <= place[:, None]), s, float("-inf"))',
        "top = tl.maximum(m, tl.max(s, 1))",
        'safe = tl.where(top == float("-inf"), 0.0, top)',
        "p = tl.exp2(s - safe[:, None])",
        "shrink = tl.exp2(m - safe)",
        "total = total * shrink + tl.sum(p, 1)",
        f"sum = sum * shrink[:, None] + tl.dot(p.to({TL[key.dtype]}), v_tile{precision})",
        "m = top",
    ]


def _block(size: int) -> int:
    return max(16, next_power_of_2(size))


def _padded(size: int) -> bool:
    return _block(size) != size


def _body(key: KernelKey) -> str:
    config, entries = config_of(key), entries_of(key)
    page, head, value = config["page"], config["head"], config["value"]
    q_mask = f" & (d < {head})[None, :]" if _padded(head) else ""
    e_mask = f" & (e < {value})[None, :]" if _padded(value) else ""
    lines = [
        "part = tl.program_id(0)",
        "block = tl.program_id(1) % blocks",
        "b = tl.program_id(1) // blocks // Hkv",
        "g = tl.program_id(1) // blocks % Hkv",
        "G = H // Hkv",
        "row = block * BLOCK_M + tl.arange(0, BLOCK_M)",
        "real = row < tokens * G",
        "result = (b * H + g * G + row % G).to(tl.int64) * tokens + row // G",
        f"d = tl.arange(0, {_block(head)})",
        f"e = tl.arange(0, {_block(value)})",
        *(triton_packed.columns(key) if is_packed(key) else []),
        f"q_tile = tl.load(q + result[:, None] * {head} + d[None, :], mask=real[:, None]{q_mask}, other=0.0)",
        "factor = scale * 1.4426950408889634",
        "base = tl.load(lengths + b).to(tl.int32) - tokens",
        "place = base + row // G",
        "last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, tokens - 1)",
        f"high = tl.maximum(0, tl.minimum(base + last + 1, n * {page}))",
        "low = tl.maximum(0, tl.load(first + b).to(tl.int32))" if config["first"] else "low = 0",
    ]
    if entries != "all":
        lines.append("row_of_list = (b * lists + tl.minimum(g, lists - 1)) * listed")
    count = {"all": "high", "picked": f"listed * {page}", "tokens": "listed"}[entries]
    lines += [
        f"count = {count}",
        "span = tl.cdiv(count, parts * BLOCK_N) * BLOCK_N",
        "begin = part * span",
        "end = tl.minimum(begin + span, count)",
        *(["begin = tl.maximum(begin, low // BLOCK_N * BLOCK_N)"] if entries == "all" else []),
        'm = tl.full((BLOCK_M,), float("-inf"), tl.float32)',
        "total = tl.zeros((BLOCK_M,), tl.float32)",
        f"sum = tl.zeros((BLOCK_M, {_block(value)}), tl.float32)",
        "for start in range(begin, end, BLOCK_N):",
        *[f"    {line}" for line in _step(key)],
        "some = total > 0.0",
        "whole = tl.where(some, total, 1.0)",
        "result += part * (tl.num_programs(1) // blocks // Hkv * H).to(tl.int64) * tokens",
        f"to = out + result[:, None] * {value} + e[None, :]",
        f"tl.store(to, (sum / whole[:, None]).to(out.dtype.element_ty), mask=real[:, None]{e_mask})",
        'log_sum = tl.where(some, (m + tl.log2(whole)) * 0.6931471805599453, float("-inf"))',
        "tl.store(lse + result, log_sum, mask=real)",
    ]
    return "\n".join(lines)


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration."""
    config = config_of(key)
    what = {"all": "a paged pool", "picked": "picked pages", "tokens": "single tokens"}[entries_of(key)]
    bits = f" with rows of {config['bits']} bits" if is_packed(key) else ""
    given = [name for name, _ in parameters(key)] + ["BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"]
    return triton_file(
        title=f"Attention over {what} of {config['page']}{bits}, {key.dtype}.",
        target=str(key.target),
        kernel=op,
        params=", ".join(given),
        body=_body(key),
    )


def merge_parts(out: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out [parts, ..., E] and lse [parts, ...] over disjoint keys -> the attention over all of them."""
    total = torch.logsumexp(lse, 0)
    weight = torch.exp(lse - torch.where(total == float("-inf"), 0.0, total))
    return (weight[..., None] * out).sum(0).to(dtype), total


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: one grid over parts, heads and blocks of rows, and the merge of the parts."""
    names, page, listed = attention_names(key), config_of(key)["page"], _listed(key)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        pools = args[1:3]  # never copied: the last axis is contiguous
        given = dict(zip(names, [x.contiguous() for x in args[:-1]], strict=True))
        given |= {"k_pages": pools[0], "v_pages": pools[1]}
        q, hkv, value = given["q"], pools[0].shape[1], config_of(key)["value"]
        batch, heads, tokens = q.shape[:3]
        width = given["page_table"].shape[1]
        rows = tokens * (heads // hkv)
        count, sizes = (8, many_rows(key)) if rows >= 64 else (4, constants(key, q.shape[3]))
        blocks = -(-rows // sizes["BLOCK_M"])
        keys = width * page
        if listed:
            keys = given[listed].shape[2] * (1 if listed == "positions" else page)
        wanted = -(-PROGRAMS // max(1, batch * hkv * blocks))
        parts = max(1, min(wanted, MOST_PARTS, keys // PART_KEYS))
        kind = q.dtype if parts == 1 else torch.float32
        out = q.new_empty((parts, batch, heads, tokens, value), dtype=kind)
        lse = q.new_empty((parts, batch, heads, tokens), dtype=torch.float32)
        if lse.numel() > 0:
            numbers = [heads, hkv, tokens, blocks, width, parts]
            numbers += [s for pool in pools for s in pool.stride()[:3]]
            numbers += [given[listed].shape[2], given[listed].shape[1]] if listed else []
            inputs = [given[name] for name in names]
            inputs += triton_packed.numbers_of(pools) if is_packed(key) else []
            grid = (parts, batch * hkv * blocks)
            kernel[grid](*inputs, out, lse, args[-1], *numbers, **sizes, num_warps=count, num_stages=2)
        return (out[0], lse[0]) if parts == 1 else merge_parts(out, lse, q.dtype)

    return run
