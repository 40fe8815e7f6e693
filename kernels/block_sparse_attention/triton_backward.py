"""Triton for block_sparse_attention_backward: probabilities again from lse, two roles in one launch.

The first programs each take a tile of keys, loop over the query heads of its group and over the query blocks
that attend to it (`rows_by_key`), and write dk and dv once; the others each take a tile of queries, loop over
its row of key blocks, and write dq. No atomics: equal inputs give equal bits. As in the forward, a whole
block runs without mask arithmetic but for its last short step. Rows that are not there load lse = inf, which
makes their probabilities 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.block_sparse_attention.by_key import row_sums, rows_by_key
from tilewright.kernels.block_sparse_attention.signature import (
    kinds_of,
    options_of,
    rule_names,
    tensor_names,
)
from tilewright.kernels.block_sparse_attention.triton_parts import (
    POINTER,
    dims_of,
    extra_sizes,
    group_step,
    kept_pairs,
    mask_steps,
    tile_tables,
)
from tilewright.kernels.common.triton_text import TL, triton_file
from tilewright.runtime.contracts import KernelKey

SIZES = (
    "H", "Hkv", "S", "N", "nQ", "nK", "capacity", "group_step", "q_step", "k_step",
    "q_tiles", "q_tile_step", "k_tiles", "k_tile_step", "key_programs", "repeat",
)  # fmt: skip
"""`repeat` query heads share a program of keys; `key_programs` programs come before those of queries."""
_Q_TABLES = ("q_tile_block", "q_tile_first", "q_tile_end")
_K_TABLES = ("k_tile_block", "k_tile_first", "k_tile_end")


def _by_key(key: KernelKey) -> list[str]:
    return ["key_ptr", "key_row", *(["key_flag"] if kinds_of(key) else [])]


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    types = {name: POINTER[key.dtype] for name in ("q", "k", "v", "dout", "dq", "dk", "dv")}
    types |= {"lse": "*fp32", "delta": "*fp32", "mask": "*i1"}
    names = ["dout", "lse", "delta", *tensor_names(key), *_by_key(key), *_Q_TABLES, *_K_TABLES]
    found = [(name, types.get(name, "*i32")) for name in (*names, "dq", "dk", "dv")]
    found.append(("scale", "fp32"))
    return found + [(name, "i32") for name in (*rule_names(key), *SIZES, *extra_sizes(key))]


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """Compile-time arguments: a program takes BLOCK_N keys in steps of STEP_M queries, or BLOCK_M queries in
    steps of STEP_N keys."""
    arch, widest = key.target.arch, max(options_of(key)["head"], options_of(key)["value"])
    if key.dtype == "float32":
        ruled = arch == "sm_80" and len(kinds_of(key)) > 0
        tile, step = ((64, 32) if ruled else (32, 32)) if widest <= 64 else (16, 16)
    elif widest <= 128:
        tile, step = 64, 64 if arch in _LONG_STEPS[widest <= 64] else 32
    else:
        tile, step = 32, 32
    return {"BLOCK_M": tile, "STEP_N": step, "BLOCK_N": tile, "STEP_M": step}


_LONG_STEPS = (("sm_80", "sm_100", "sm_120"), ("sm_80", "sm_90", "sm_120", "gfx942"))
"""Where heads of 128, and of 64, take steps of 64 in 16 bits: offline, none of these spills."""


def launch_options(key: KernelKey) -> dict[str, int]:
    """Warps and stages of software pipelining; a CDNA program holds what it fetches ahead in registers."""
    if key.target.kind == "hip":
        return {"num_warps": 4, "num_stages": 1}
    return {"num_warps": 8, "num_stages": 2}


def _load(name: str, size: str, place: str, kept: str, key: KernelKey, rest: str = "0.0") -> str:
    """`name`_tile [rows, D or E] of the rows at `place`; `kept` (rows that are there) may be empty."""
    dims = dims_of(key)
    axis, count = ("d", dims["D"]) if size == "D" else ("e", dims["E"])
    conditions = [f"{kept}[:, None]"] if kept else []
    conditions += [f"{axis}_real[None, :]"] if dims[f"{axis}_real"] else []
    guard = f", mask={' & '.join(conditions)}, other={rest}" if conditions else ""
    return f"{name}_tile = tl.load({name} + {place}[:, None] * {count} + {axis}[None, :]{guard})"


def _axes(key: KernelKey) -> list[str]:
    dims = dims_of(key)
    lines = [f"d = tl.arange(0, {dims['BD']})", f"e = tl.arange(0, {dims['BE']})"]
    lines += [f"d_real = d < {dims['D']}"] if dims["d_real"] else []
    return lines + ([f"e_real = e < {dims['E']}"] if dims["e_real"] else [])


def _queries(key: KernelKey, kept: str, head: str, group: str) -> list[str]:
    """The rows of queries at slots i: q, dout, lse in base 2 and delta."""
    other = [f", mask={kept}, other={rest}" if kept else "" for rest in ('float("inf")', "0.0", "0")]
    token = f"tl.load(src_q + {group} * src_q_step + i{other[2]})" if options_of(key)["src_q"] else "i"
    return [
        f"token = {token}",
        f"at_q = (b * H + {head}).to(tl.int64) * S + token",
        _load("q", "D", "at_q", kept, key),
        _load("dout", "E", "at_q", kept, key),
        f"base = tl.load(lse + at_q{other[0]}) * 1.4426950408889634",
        f"shift = tl.load(delta + at_q{other[1]})",
    ]


def _keys(key: KernelKey, kept: str, group: str) -> list[str]:
    """The rows of keys at slots j: k and v of key head `head_k`."""
    guard = f", mask={kept}, other=0" if kept else ""
    source = f"tl.load(src_k + {group} * src_k_step + j{guard})" if options_of(key)["src_k"] else "j"
    return [
        f"source = {source}",
        "at_k = (b * Hkv + head_k).to(tl.int64) * N + source",
        _load("k", "D", "at_k", kept, key),
        _load("v", "E", "at_k", kept, key),
    ]


def _steps(key: KernelKey, size: str, step: Callable[[bool], list[str]], flag: str) -> list[str]:
    """Over slots begin to end: whole steps, then the masked rest, which is all of an entry with a rule."""
    lines = [f"steps = tl.maximum(end - begin, 0) // {size} * {size}"]
    if kinds_of(key):
        lines += [f"kind = tl.load({flag})", "steps = tl.where(kind == 0, steps, 0)"]
    lines.append(f"for at in range(begin, begin + steps, {size}):")
    lines += [f"    {line}" for line in step(False)]
    lines.append(f"for at in range(begin + steps, end, {size}):")
    return lines + [f"    {line}" for line in step(True)]


def _key_step(key: KernelKey, masked: bool) -> list[str]:
    """One step of STEP_M query slots from `at`; scores stand as [keys, queries]."""
    precision = ', input_precision="ieee"' if key.dtype == "float32" else ""
    lines = ["i = at + tl.arange(0, STEP_M)", *(["real = i < end"] if masked else [])]
    lines += _queries(key, "real" if masked else "", "h", "g")
    lines += [
        f"s = tl.dot(k_tile, tl.trans(q_tile){precision}) * factor",
        "p = tl.exp2(s - base[None, :])",
    ]
    if masked and kinds_of(key):
        rules, either = kept_pairs(key, keys_first=True)
        lines += [*rules, f"p = tl.where({either}, p, 0.0)"]
    return [
        *lines,
        f"dv_tile += tl.dot(p.to({TL[key.dtype]}), dout_tile{precision})",
        f"dp = tl.dot(v_tile, tl.trans(dout_tile){precision})",
        "ds = p * (dp - shift[None, :])",
        f"dk_tile += tl.dot(ds.to({TL[key.dtype]}), q_tile{precision})",
    ]


def _key_role(key: KernelKey) -> list[str]:
    """dk and dv of one tile of keys, summed over `repeat` query heads."""
    config, dims = options_of(key), dims_of(key)
    begin = [
        "tile = program % k_tiles",
        "part = program // k_tiles",
        "parts = H // repeat",
        "b = part // parts",
        "head = part % parts * repeat",
        "head_k = head // (H // Hkv)",
        "first_g = tl.load(head_group + b * group_step + head)",
        "block = tl.load(k_tile_block + first_g * k_tile_step + tile)",
        "first = tl.load(k_tile_first + first_g * k_tile_step + tile)",
        "end_key = tl.load(k_tile_end + first_g * k_tile_step + tile)",
    ]
    begin += ["end_key = tl.minimum(end_key, tl.load(k_valid + b))"] if config["k_valid"] else []
    begin += ["valid = tl.load(q_valid + b)"] if config["q_valid"] else []
    begin += ["pad = tl.load(limit + b)"] if config["limit"] else []
    inner = [
        "query = tl.load(key_row + g * capacity + entry)",
        "begin = tl.load(q_off + g * q_step + query)",
        "end = tl.load(q_off + g * q_step + query + 1)",
        *(["end = tl.minimum(end, valid)"] if config["q_valid"] else []),
        *_steps(key, "STEP_M", lambda m: _key_step(key, m), "key_flag + g * capacity + entry"),
    ]
    guards = ["inside[:, None]" + (f" & {a}_real[None, :]" if dims[f"{a}_real"] else "") for a in "de"]
    return [
        *begin,
        "j = first + tl.arange(0, BLOCK_N)",
        "inside = j < end_key",
        *_axes(key),
        *_keys(key, "inside", "first_g"),
        "factor = scale * 1.4426950408889634",
        f"dk_tile = tl.zeros((BLOCK_N, {dims['BD']}), tl.float32)",
        f"dv_tile = tl.zeros((BLOCK_N, {dims['BE']}), tl.float32)",
        "for h in range(head, head + repeat):",
        "    g = tl.load(head_group + b * group_step + h)",
        "    line = key_ptr + g * (nK + 1) + block",
        "    stop = tl.where(first < end_key, tl.load(line + 1), 0)",
        "    for entry in range(tl.load(line), stop):",
        *[f"        {line}" for line in inner],
        "to = part.to(tl.int64) * N + source",
        f"dk_at = dk + to[:, None] * {dims['D']} + d[None, :]",
        f"dv_at = dv + to[:, None] * {dims['E']} + e[None, :]",
        f"tl.store(dk_at, (dk_tile * scale).to(dk.dtype.element_ty), mask={guards[0]})",
        f"tl.store(dv_at, dv_tile.to(dv.dtype.element_ty), mask={guards[1]})",
    ]


def _query_step(key: KernelKey, masked: bool) -> list[str]:
    """One step of STEP_N key slots from `at`."""
    precision = ', input_precision="ieee"' if key.dtype == "float32" else ""
    lines = ["j = at + tl.arange(0, STEP_N)", *(["inside = j < end"] if masked else [])]
    lines += _keys(key, "inside" if masked else "", "g")
    lines += [
        f"s = tl.dot(q_tile, tl.trans(k_tile){precision}) * factor",
        "p = tl.exp2(s - base[:, None])",
    ]
    if masked:
        rules, either = kept_pairs(key)
        kept = f"inside[None, :] & ({either})" if either else "inside[None, :]"
        lines += [*rules, f"p = tl.where({kept}, p, 0.0)"]
    return [
        *lines,
        f"dp = tl.dot(dout_tile, tl.trans(v_tile){precision})",
        "ds = p * (dp - shift[:, None])",
        f"dq_tile += tl.dot(ds.to({TL[key.dtype]}), k_tile{precision})",
    ]


def _query_role(key: KernelKey) -> list[str]:
    """dq of one tile of queries of one head."""
    config, dims = options_of(key), dims_of(key)
    begin = [
        "tile = program % q_tiles",
        "bh = program // q_tiles",
        "b = bh // H",
        "h = bh % H",
        "head_k = h // (H // Hkv)",
        "g = tl.load(head_group + b * group_step + h)",
        "block = tl.load(q_tile_block + g * q_tile_step + tile)",
        "first = tl.load(q_tile_first + g * q_tile_step + tile)",
        "end_row = tl.load(q_tile_end + g * q_tile_step + tile)",
    ]
    begin += ["end_row = tl.minimum(end_row, tl.load(q_valid + b))"] if config["q_valid"] else []
    begin += ["valid = tl.load(k_valid + b)"] if config["k_valid"] else []
    begin += ["pad = tl.load(limit + b)"] if config["limit"] else []
    inner = [
        "key = tl.load(col + g * capacity + entry)",
        "begin = tl.load(k_off + g * k_step + key)",
        "end = tl.load(k_off + g * k_step + key + 1)",
        *(["end = tl.minimum(end, valid)"] if config["k_valid"] else []),
        *_steps(key, "STEP_N", lambda m: _query_step(key, m), "flag + g * capacity + entry"),
    ]
    guard = "real[:, None]" + (" & d_real[None, :]" if dims["d_real"] else "")
    return [
        *begin,
        "i = first + tl.arange(0, BLOCK_M)",
        "real = i < end_row",
        *_axes(key),
        *_queries(key, "real", "h", "g"),
        "factor = scale * 1.4426950408889634",
        f"dq_tile = tl.zeros((BLOCK_M, {dims['BD']}), tl.float32)",
        "line = row_ptr + g * (nQ + 1) + block",
        "stop = tl.where(first < end_row, tl.load(line + 1), 0)",
        "for entry in range(tl.load(line), stop):",
        *[f"    {line}" for line in inner],
        f"dq_at = dq + at_q[:, None] * {dims['D']} + d[None, :]",
        f"tl.store(dq_at, (dq_tile * scale).to({TL[key.dtype]}), mask={guard})",
    ]


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: the kernel, which chooses the role, and one function a role."""
    config = options_of(key)
    names = [name for name, _ in parameters(key)]
    roles = {f"{op}_keys": _key_role(key), f"{op}_queries": _query_role(key)}
    sizes = list(constants(key, 0))
    given = ", ".join([*names, *[f"{name}: tl.constexpr" for name in sizes]])
    passed = ", ".join([*names, *sizes])
    first, second = roles
    text = triton_file(
        title=f"Gradients of block-sparse attention, heads of {config['head']} and {config['value']}.",
        target=str(key.target),
        kernel=op,
        params=given,
        body=f"program = tl.program_id(0)\nif program < key_programs:\n    {first}(program, {passed})\n"
        f"else:\n    {second}(program - key_programs, {passed})",
    )
    for name, lines in roles.items():
        body = "\n".join(f"    {line}" for line in lines)
        text += f"\n\n@triton.jit\ndef {name}(program, {given}):\n{body}\n"
    return text


def _head_repeat(key: KernelKey, heads: int, key_heads: int, k_off: Tensor, src_k: Tensor | None) -> int:
    """Query heads per program of keys: those of a key head when all groups cut the keys alike, else one."""
    alike = k_off.shape[0] == 1 and (src_k is None or src_k.shape[0] == 1)
    return heads // key_heads if alike else 1


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: delta, the rows by key unless given, tables of tiles, one launch."""
    names, config, rules_count = tensor_names(key), options_of(key), len(rule_names(key))
    block_sizes, options = constants(key, 0), launch_options(key)

    def run(dout: Tensor, dlse: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = args[:5]
        layout = dict(zip(names[3:], (x.contiguous() for x in args[5 : len(names) + 2]), strict=True))
        rules, scale = args[len(names) + 2 :][:rules_count], args[len(names) + 2 + rules_count]
        # A dispatcher leaves out trailing arguments that are None.
        delta, *by_key = [*args[len(names) + 3 + rules_count :], None, None, None, None][:4]
        if delta is None:
            delta = row_sums(dout, dlse, out)
        if by_key[0] is None:
            flag = layout.get("flag")
            by_key = list(rows_by_key(layout["row_ptr"], layout["col"], flag, layout["k_off"].shape[1] - 1))
        batch, heads, tokens = q.shape[:3]
        key_heads, sources = k.shape[1:3]
        repeat = _head_repeat(key, heads, key_heads, layout["k_off"], layout.get("src_k"))
        parts = heads // repeat
        summed = q.dtype if parts == key_heads else torch.float32
        dq = q.new_zeros(q.shape)
        dk, dv = (k.new_zeros((batch, parts, sources, x.shape[3]), dtype=summed) for x in (k, v))
        slots = [layout[n].shape[1] if n in layout else x.shape[2] for n, x in (("src_q", q), ("src_k", k))]
        tables = [
            tile_tables(layout["q_off"], slots[0], block_sizes["BLOCK_M"]),
            tile_tables(layout["k_off"], slots[1], block_sizes["BLOCK_N"]),
        ]
        q_tiles, k_tiles = (table[0].shape[1] for table in tables)
        key_programs, query_programs = k_tiles * batch * parts, q_tiles * batch * heads
        sizes = [heads, key_heads, tokens, sources, layout["row_ptr"].shape[1] - 1]
        sizes += [layout["k_off"].shape[1] - 1, layout["col"].shape[1]]
        sizes += [heads if layout["head_group"].shape[0] > 1 else 0]
        sizes += [group_step(layout["q_off"]), group_step(layout["k_off"])]
        sizes += [q_tiles, group_step(tables[0][0]), k_tiles, group_step(tables[1][0]), key_programs, repeat]
        sizes += [group_step(layout[name]) for name in ("src_q", "src_k") if config[name]]
        sizes += mask_steps(layout["mask"]) if config["mask"] else []
        inputs = [dout.contiguous(), lse.contiguous(), delta, q.contiguous(), k.contiguous(), v.contiguous()]
        inputs += [*layout.values(), *[x for x in by_key if x is not None], *tables[0], *tables[1]]
        if key_programs + query_programs > 0:
            kernel[(key_programs + query_programs,)](
                *inputs, dq, dk, dv, scale, *rules, *sizes, **block_sizes, **options
            )
        if parts != key_heads:
            dk, dv = (x.unflatten(1, (key_heads, -1)).sum(2).to(q.dtype) for x in (dk, dv))
        return dq, dk, dv

    return run
