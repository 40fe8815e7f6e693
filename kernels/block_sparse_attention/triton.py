"""Triton for block_sparse_attention: one program per BLOCK_M query slots of one block, keys in steps.

A whole block runs without mask arithmetic but for its last short step; a block under a predicate evaluates
that predicate on every pair. Softmax state is float32 in base 2. Tasks are laid out by `tile_tables` on the
device, so a launch never waits for data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops.quantized_attention import K_ROWS, Q_ROWS, prepare
from tilewright.kernels.block_sparse_attention.signature import (
    kinds_of,
    options_of,
    rule_names,
    tensor_names,
)
from tilewright.kernels.block_sparse_attention.triton_parts import (
    POINTER,
    codes_of,
    dims_of,
    extra_sizes,
    group_step,
    kept_pairs,
    mask_steps,
    tile_tables,
)
from tilewright.kernels.common.triton_text import TL, triton_file
from tilewright.runtime.contracts import KernelKey

SIZES = ("B", "H", "Hkv", "S", "N", "nQ", "nK", "capacity", "tiles", "group_step", "tile_step", "k_step")


def _tensors(key: KernelKey) -> list[str]:
    """The kernel's input pointers: q_off becomes the tables of tiles."""
    tables = ["tile_block", "tile_first", "tile_end"]
    return [n for name in tensor_names(key) for n in (tables if name == "q_off" else [name])]


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    codes, found = codes_of(key), []
    for name in _tensors(key):
        kind = POINTER[key.dtype] if name in "qkv" else "*i1" if name == "mask" else "*i32"
        found.append((name, f"*{codes.element}" if codes and name in "qk" else kind))
    found += [("q_scale", "*fp32"), ("k_scale", "*fp32")] if codes else []
    if options_of(key)["descriptor"]:
        kinds, keys, dims = dict(found), blocks(key)[1], dims_of(key)
        for name, width in (("k", dims["BD"]), ("v", dims["BE"])):
            found.append((f"{name}_rows", f"tensordesc<{kinds[name][1:]}[{keys},{width}]>"))
    found += [("out", POINTER[key.dtype]), ("lse", "*fp32"), ("scale", "fp32")]
    return found + [(name, "i32") for name in (*rule_names(key), *SIZES, *extra_sizes(key))]


_WIDE_BLOCKS = {"sm_80": (64, 64), "sm_90": (64, 64), "sm_100": (128, 64), "sm_120": (32, 64)}
"""Blocks for 16-bit heads of 128, by offline compilation: the largest tried that do not spill."""


def blocks(key: KernelKey) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N)."""
    (rows, keys), config = _largest_blocks(key), options_of(key)
    spills = key.target.arch == "sm_100" and max(config["head"], config["value"]) > 64  # with 64 rows
    return min(rows, 64) if config["short"] and not spills else rows, keys


def _largest_blocks(key: KernelKey) -> tuple[int, int]:
    config = options_of(key)
    widest = max(config["head"], config["value"])
    if key.dtype == "float32":
        return (32, 32) if widest <= 128 else (16, 32)
    if widest <= 64:
        return 128, 32 if codes_of(key) and key.target.kind == "hip" else 64
    if widest <= 128 and key.target.arch == "sm_90" and config["descriptor"]:
        return 128, 64  # a box needs no registers for its addresses
    return _WIDE_BLOCKS.get(key.target.arch, (64, 32)) if widest <= 128 else (64, 32)


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """Compile-time arguments."""
    rows, keys = blocks(key)
    return {"BLOCK_M": rows, "BLOCK_N": keys}


def warps(columns: int) -> int:
    """Warps per program: with fewer, the sums of BLOCK_M rows do not fit the registers."""
    return 8


def _step(key: KernelKey, masked: bool) -> list[str]:
    """One step of BLOCK_N keys from slot `at`."""
    config, dims, codes = options_of(key), dims_of(key), codes_of(key)
    inside = "inside" if masked else ""
    src = "tl.load(src_k + g * src_k_step + j" + (", mask=inside, other=0)" if masked else ")")
    if config["descriptor"] and not masked:
        lines = [
            "k_tile = tl.trans(k_rows.load([key_row + at, 0]))",
            "v_tile = v_rows.load([key_row + at, 0])",
        ]
        lines += ["kt = at + tl.arange(0, BLOCK_N)"] if codes else []
        return lines + _softmax_step(key, masked)
    lines = ["j = at + tl.arange(0, BLOCK_N)"]
    lines += ["inside = j < end_key"] if masked else []
    lines += [f"kt = {src}" if config["src_k"] else "kt = j"]
    for name, axis, real in (("k", "d", dims["d_real"]), ("v", "e", dims["e_real"])):
        place = (
            f"kt[None, :].to(tl.int64) * {dims['D']} + d[:, None]"
            if name == "k"
            else f"kt[:, None].to(tl.int64) * {dims['E']} + e[None, :]"
        )
        line = "[None, :]" if name == "k" else "[:, None]"
        other = "[:, None]" if name == "k" else "[None, :]"
        conditions = ([f"{inside}{line}"] if masked else []) + ([f"{axis}_real{other}"] if real else [])
        rest = codes.zero if codes and name == "k" else "0.0"
        guard = f", mask={' & '.join(conditions)}, other={rest}" if conditions else ""
        lines.append(f"{name}_tile = tl.load({name}_head + {place}{guard})")
    return lines + _softmax_step(key, masked)


def _softmax_step(key: KernelKey, masked: bool) -> list[str]:
    """What one step of keys adds, from k_tile [D, keys] and v_tile [keys, E]."""
    precision = ', input_precision="ieee"' if key.dtype == "float32" else ""
    lines = [f"s = tl.dot(q_tile, k_tile{precision}) * factor"]
    if codes_of(key):
        guard = ", mask=inside, other=0.0" if masked else ""
        lines = [
            f"k_factor = tl.load(k_scale_head + kt // {K_ROWS}{guard})",
            "s = tl.dot(q_tile, k_tile).to(tl.float32) * q_factor[:, None] * k_factor[None, :]",
        ]
    if masked:
        kept = "inside[None, :]"
        if kinds_of(key):
            rules, either = kept_pairs(key)
            lines += rules
            kept = f"inside[None, :] & ({either})"
        lines.append(f's = tl.where({kept}, s, float("-inf"))')
    lines += [
        "top = tl.maximum(m, tl.max(s, 1))",
        *(['safe = tl.where(top == float("-inf"), 0.0, top)'] if masked else ["safe = top"]),
        "p = tl.exp2(s - safe[:, None])",
        "shrink = tl.exp2(m - safe)",
        "total = total * shrink + tl.sum(p, 1)",
        f"sum = sum * shrink[:, None] + tl.dot(p.to({TL[key.dtype]}), v_tile{precision})",
        "m = top",
    ]
    return lines


def _body(key: KernelKey) -> str:
    config, dims, codes = options_of(key), dims_of(key), codes_of(key)
    lines = [
        "tile = tl.program_id(0)",
        "bh = tl.program_id(1)",
        "b = bh // H",
        "h = bh % H",
        "g = tl.load(head_group + b * group_step + h)",
        "block = tl.load(tile_block + g * tile_step + tile)",
        "end = tl.load(tile_end + g * tile_step + tile)",
    ]
    if config["q_valid"]:
        lines.append("end = tl.minimum(end, tl.load(q_valid + b))")
    lines += [
        "first = tl.load(tile_first + g * tile_step + tile)",
        "i = first + tl.arange(0, BLOCK_M)",
        "real = i < end",
        "token = tl.load(src_q + g * src_q_step + i, mask=real, other=0)" if config["src_q"] else "token = i",
        f"d = tl.arange(0, {dims['BD']})",
        f"e = tl.arange(0, {dims['BE']})",
    ]
    lines += [f"d_real = d < {dims['D']}"] if dims["d_real"] else []
    lines += [f"e_real = e < {dims['E']}"] if dims["e_real"] else []
    guard = "real[:, None]" + (" & d_real[None, :]" if dims["d_real"] else "")
    first_key, zero = "bh // H * Hkv + h // (H // Hkv)", codes.zero if codes else "0.0"
    lines += [f"key_row = ({first_key}) * N"] if config["descriptor"] else []
    lines += [
        "rows = bh.to(tl.int64) * S + token",
        f"q_tile = tl.load(q + rows[:, None] * {dims['D']} + d[None, :], mask={guard}, other={zero})",
        f"k_head = k + ({first_key}).to(tl.int64) * N * {dims['D']}",
        f"v_head = v + ({first_key}).to(tl.int64) * N * {dims['E']}",
        "factor = scale * 1.4426950408889634",
    ]
    if codes:
        lines += [
            f"q_factor = factor * tl.load(q_scale + bh * q_scales + token // {Q_ROWS}, mask=real, other=0.0)",
            f"k_scale_head = k_scale + ({first_key}) * k_scales",
        ]
    return "\n".join([*lines, *_loop(key), *_store(key)])


def _loop(key: KernelKey) -> list[str]:
    """Over the entries of the row: whole steps of keys, then the masked rest."""
    config, kinds = options_of(key), kinds_of(key)
    lines = ["pad = tl.load(limit + b)"] if config["limit"] else []
    lines += ["valid = tl.load(k_valid + b)"] if config["k_valid"] else []
    lines += [
        'm = tl.full((BLOCK_M,), float("-inf"), tl.float32)',
        "total = tl.zeros((BLOCK_M,), tl.float32)",
        f"sum = tl.zeros((BLOCK_M, {dims_of(key)['BE']}), tl.float32)",
        "row = row_ptr + g * (nQ + 1) + block",
        "stop = tl.where(first < end, tl.load(row + 1), 0)",  # a surplus tile has no entries
        "for entry in range(tl.load(row), stop):",
        "    key = tl.load(col + g * capacity + entry)",
        "    begin = tl.load(k_off + g * k_step + key)",
        "    end_key = tl.load(k_off + g * k_step + key + 1)",
    ]
    lines += ["    end_key = tl.minimum(end_key, valid)"] if config["k_valid"] else []
    lines.append("    steps = tl.maximum(end_key - begin, 0) // BLOCK_N * BLOCK_N")
    if kinds:
        lines += [
            "    kind = tl.load(flag + g * capacity + entry)",
            "    steps = tl.where(kind == 0, steps, 0)",
        ]
    lines.append("    for at in range(begin, begin + steps, BLOCK_N):")
    lines += [f"        {line}" for line in _step(key, masked=False)]
    lines.append("    for at in range(begin + steps, end_key, BLOCK_N):")
    lines += [f"        {line}" for line in _step(key, masked=True)]
    return lines


def _store(key: KernelKey) -> list[str]:
    """The results; a row without keys gives 0 and -inf."""
    dims = dims_of(key)
    guard = "real[:, None]" + (" & e_real[None, :]" if dims["e_real"] else "")
    return [
        "some = total > 0.0",
        "whole = tl.where(some, total, 1.0)",
        f"result = (sum / whole[:, None]).to({TL[key.dtype]})",
        f"tl.store(out + rows[:, None] * {dims['E']} + e[None, :], result, mask={guard})",
        'log_sum = tl.where(some, (m + tl.log2(whole)) * 0.6931471805599453, float("-inf"))',
        "tl.store(lse + rows, log_sum, mask=real)",
    ]


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration; absent layout arguments and predicates leave no trace."""
    config, codes = options_of(key), codes_of(key)
    scores = f" with {codes.name} scores" if codes else ""
    size = f"heads of {config['head']} and {config['value']}"
    given = [name for name, _ in parameters(key)] + ["BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"]
    return triton_file(
        title=f"Block-sparse attention{scores}, {size} and {blocks(key)[0]} queries a program.",
        target=str(key.target),
        kernel=op,
        params=", ".join(given),
        body=_body(key),
    )


def key_descriptors(k: Tensor, v: Tensor, keys: int, key: KernelKey) -> list[Any]:
    """Of all rows of k and v, in boxes of `keys` rows: what the tensor memory accelerator loads by."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    dims, found = dims_of(key), []
    for x, width in ((k, dims["BD"]), (v, dims["BE"])):
        rows = x.view(-1, x.shape[3])
        if rows.data_ptr() % 16:
            rows = rows.clone()
        found.append(TensorDescriptor.from_tensor(rows, [keys, width]))
    return found


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: lays out the tiles, allocates, launches one grid."""
    names, config, codes = tensor_names(key), options_of(key), codes_of(key)
    rows, keys = blocks(key)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        given = {name: value.contiguous() for name, value in zip(names, args, strict=False)}
        rules, scale = args[len(names) : -1], args[-1]
        q, k, v = given["q"], given["k"], given["v"]
        scales: list[Tensor] = []
        if codes:
            given["q"], q_scale, given["k"], k_scale, taken_off = prepare(q, k, codes.kind)
            scales = [q_scale, k_scale]
        batch, heads, tokens = q.shape[:3]
        slots = given["src_q"].shape[1] if config["src_q"] else tokens
        tables = tile_tables(given["q_off"], slots, rows)
        out = q.new_zeros((batch, heads, tokens, v.shape[3]))
        lse = q.new_full((batch, heads, tokens), float("-inf"), dtype=torch.float32)
        inputs = [x for name in names for x in (tables if name == "q_off" else [given[name]])]
        inputs += scales
        tiles = tables[0].shape[1]
        per_item = heads if given["head_group"].shape[0] > 1 else 0
        sizes = [batch, heads, k.shape[1], tokens, k.shape[2], given["row_ptr"].shape[1] - 1]
        sizes += [given["k_off"].shape[1] - 1, given["col"].shape[1], tiles, per_item]
        steps = (tables[0], given["k_off"], *[given[n] for n in ("src_q", "src_k") if config[n]])
        sizes += [group_step(table) for table in steps]
        sizes += [x.shape[2] for x in scales]
        sizes += mask_steps(given["mask"]) if config["mask"] else []
        grid = (tiles, batch * heads)
        if tiles * batch * heads > 0 and k.shape[2] > 0:
            count = warps(q.shape[3])
            inputs += key_descriptors(given["k"], v, keys, key) if config["descriptor"] else []
            kernel[grid](
                *inputs,
                out,
                lse,
                scale,
                *rules,
                *sizes,
                BLOCK_M=rows,
                BLOCK_N=keys,
                num_warps=count,
                num_stages=2,
            )
        return out, lse + scale * taken_off if codes else lse

    return run
