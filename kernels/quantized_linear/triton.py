"""Triton for quantized_linear and quantized_linear_multi with weights packed as `rows`.

Each program multiplies BLOCK_M rows of x by BLOCK_N rows of one weight; all weights of a call share one grid.
A step of the loop over K takes BLOCK_K columns, which is a whole group where activations have a scale per
group. Codes are unpacked from their bytes and centred; quantized activations meet them in an integer tl.dot,
which is exact, and plain ones in a tl.dot of their own dtype, which holds every code exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.quantizers import groups
from tilewright.compiler.weight_format import CHUNK
from tilewright.kernels.common.family import config_of
from tilewright.kernels.common.triton_text import TL, next_power_of_2, triton_file
from tilewright.kernels.quantized_linear.cpp import names
from tilewright.kernels.quantized_linear.cpp_parts import Shape, shape_of
from tilewright.runtime.contracts import KernelKey

BLOCK_M, BLOCK_N = 16, 32
WARPS = 4
LONGEST_GROUP = 256
"""Columns that one step quantizes together at most."""


def block_k(key: KernelKey) -> int:
    """Columns of one step."""
    if "element" in config_of(key):  # small floats
        return CHUNK
    shape = shape_of(key)
    return next_power_of_2(shape.group) if shape.activation == "group" else CHUNK


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    shape = shape_of(key)
    views = [("grid", "*fp16" if shape.short_grids else "*fp32")]
    views += [("step", "*fp32")] if shape.is_static else []
    return arguments(key, "*u8", views, ["groups"] if shape.offset else [])


def arguments(
    key: KernelKey, weight_type: str, views: list[tuple[str, str]], sizes: list[str]
) -> list[tuple[str, str]]:
    """(name, Triton type) of the arguments: x; per weight itself, other views of it, rows, bias, result."""
    kind = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[key.dtype]
    found = [("x", kind)]
    for i, (weight, bias) in enumerate(names(key)):
        found += [(weight, weight_type), *[(f"{name}{i}", type_) for name, type_ in views], (f"N{i}", "i32")]
        found += [(bias, kind)] if bias is not None else []
        found.append((f"y{i}", kind))
    return [*found, *[(name, "i32") for name in ("M", "K", "K32", "row_bytes", *sizes)]]


def constants(key: KernelKey, columns: int) -> dict[str, int]:
    """Compile-time arguments."""
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": block_k(key)}


def warps(columns: int) -> int:
    """Warps per program."""
    return WARPS


def _codes(shape: Shape, i: int) -> list[str]:
    """w: the centred codes [BLOCK_K, BLOCK_N] of weight i."""
    base = f"w{i} + n.to(tl.int64)[None, :] * row_bytes"
    inside = "mask=real[None, :] & (k < end)[:, None], other=0)"
    centre = 128 if shape.bits == 8 else shape.middle
    if shape.bits == 8:
        lines = [f"w = tl.load({base} + k[:, None], {inside}.to(tl.int32)"]
    elif shape.bits == 3:
        lines = [
            f"w = (tl.load({base} + (k // 4)[:, None], {inside}.to(tl.int32) >> (k % 4 * 2)[:, None]) & 3",
            f"third = tl.load({base} + (K32 * 8 + k // 8)[:, None], {inside}.to(tl.int32)",
            "w += ((third >> (k % 8)[:, None]) & 1) * 4",
        ]
    else:
        per = 8 // shape.bits
        lines = [
            f"w = tl.load({base} + (k // {per})[:, None], {inside}.to(tl.int32)",
            f"w = (w >> (k % {per} * {shape.bits})[:, None]) & {(1 << shape.bits) - 1}",
        ]
    return [*lines, f"w = tl.where((k < end)[:, None], w - {centre}, 0)"]


def _scale_of(largest: int) -> list[str]:
    """inverse and s [BLOCK_M, 1] of rows, from their largest magnitudes and their poison."""
    inverse = f"tl.math.div_rn({largest}.0, tl.maximum(most, 2e-36))"
    return [
        f"inverse = tl.where(most > 2e-36, {inverse}, 0.0)[:, None]",
        f"s = (most * (1.0 / {largest}.0) + poison)[:, None]",
    ]


LOAD_X = (
    "a = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], "
    "mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)"
)
"""a: columns k of the rows m of x, [BLOCK_M, BLOCK_K]."""


def _load_x(key: KernelKey) -> str:
    widen = ".to(tl.float32)" if shape_of(key).is_integer else ""
    return LOAD_X.replace("k < K", "k < end") + widen


def _steps(key: KernelKey, i: int) -> list[str]:
    """The loop over K: total [BLOCK_M, BLOCK_N] in float32."""
    shape = shape_of(key)
    group = shape.group
    by_group = shape.activation == "group"
    lines = ["total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)"]
    if shape.is_static:
        lines += [
            "poison = tl.zeros((BLOCK_M,), dtype=tl.float32)",
            f"s = tl.load(step{i} + tl.cast(N{i}, tl.int64) * (row_bytes // 4))",
            "inverse = tl.math.div_rn(1.0, s)",
        ]
    if shape.by_token:
        lines += [
            "most = tl.zeros((BLOCK_M,), dtype=tl.float32)",
            "poison = tl.zeros((BLOCK_M,), dtype=tl.float32)",
            "end = K",
            "for start in range(0, K, BLOCK_K):",
            "    k = start + tl.arange(0, BLOCK_K)",
            f"    {_load_x(key)}",
            "    most = tl.maximum(most, tl.max(tl.abs(a), axis=1))",
            "    poison += tl.sum(a * 0.0, axis=1)",
            *_scale_of(shape.largest),
        ]
    step = f"{group}" if by_group else "BLOCK_K"
    end = f"tl.minimum(K, start + {group})" if by_group else "K"
    body = [f"end = {end}", "k = start + tl.arange(0, BLOCK_K)", _load_x(key), *_codes(shape, i)]
    if shape.is_integer:
        if by_group:
            body += ["poison = tl.sum(a * 0.0, axis=1)", "most = tl.max(tl.abs(a), axis=1)"]
            body += _scale_of(shape.largest)
        body.append("scaled = a * inverse")
        if shape.is_static:
            body.append("poison += tl.sum(a * 0.0, axis=1)")
            body.append("scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)")
        body += [
            "q = (scaled + 12582912.0) - 12582912.0",  # to the nearest whole number, half to even
            "part = tl.dot(q.to(tl.int8), w.to(tl.int8), out_dtype=tl.int32).to(tl.float32) * s",
            *(["mass = tl.sum(q, axis=1)[:, None] * s"] if shape.offset else []),
        ]
    else:
        body += [
            f'part = tl.dot(a, w.to({TL[key.dtype]}), input_precision="ieee", out_dtype=tl.float32)',
            *(["mass = tl.sum(a.to(tl.float32), axis=1)[:, None]"] if shape.offset else []),
        ]
    where = "0" if group == 0 else f"start // {group}"
    codes_bytes, size = f"K32 * {4 * shape.bits}", 2 if shape.short_grids else 4
    place = f"grid{i} + n.to(tl.int64) * (row_bytes // {size}) + {codes_bytes} // {size} + {where}"
    body += [
        f"scale = tl.load({place}, mask=real, other=0.0).to(tl.float32)",
        "total += part * scale[None, :]",
    ]
    if shape.offset:
        body.append(f"low = tl.load({place} + groups, mask=real, other=0.0).to(tl.float32)")
        if shape.bits == 8:
            body.append("low += 128.0 * scale")
        body.append("total += mass * low[None, :]")
    lines += [f"for start in range(0, K, {step}):", *[f"    {line}" for line in body]]
    return [*lines, "total += poison[:, None]"] if shape.is_static else lines


Steps = Callable[[KernelKey, int], list[str]]


def _block(key: KernelKey, i: int, bias: str | None, steps: Steps) -> list[str]:
    """The statements that multiply one block of rows of weight i."""
    lines = ["n = (block - first) * BLOCK_N + tl.arange(0, BLOCK_N)", f"real = n < N{i}", *steps(key, i)]
    if bias is not None:
        lines.append(f"total += tl.load({bias} + n, mask=real, other=0.0).to(tl.float32)[None, :]")
    store = f"tl.store(y{i} + m.to(tl.int64)[:, None] * N{i} + n[None, :], total.to({TL[key.dtype]}), "
    return [*lines, store + "mask=(m < M)[:, None] & real[None, :])"]


def kernel_text(key: KernelKey, op: str, title: str, params: list[str], steps: Steps) -> str:
    """A source file whose programs run `steps` of the weight that their rows belong to."""
    pairs = names(key)
    lines = [
        "block = tl.program_id(0)",
        "m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)",
        "first = 0",
    ]
    for i, (_, bias) in enumerate(pairs):
        inner = _block(key, i, bias, steps)
        if len(pairs) > 1:
            lines.append(f"blocks = tl.cdiv(N{i}, BLOCK_N)")
            lines.append("if (block >= first) & (block < first + blocks):")
            inner = [f"    {line}" for line in inner]
        lines += inner
        if len(pairs) > 1:
            lines.append("first += blocks")
    return triton_file(
        title=title, target=str(key.target), kernel=op, params=", ".join(params), body="\n".join(lines)
    )


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: format, number of weights, which have biases."""
    shape = shape_of(key)
    given = [name for name, _ in parameters(key)]
    title = f"x W^T, W int{shape.bits} in groups of {shape.group or 'a row'}: {len(names(key))} weight(s)."
    return kernel_text(
        key, op, title, [*given, *[f"{name}: tl.constexpr" for name in constants(key, 0)]], _steps
    )


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: allocates every output, launches one grid over the rows of all weights."""
    shape = shape_of(key)
    types = [torch.float16 if shape.short_grids else torch.float32]
    types += [torch.float32] if shape.is_static else []
    return launch(
        key,
        kernel,
        lambda packed: [packed, *[packed.view(dtype) for dtype in types]],
        shape.group if shape.offset else None,
    )


def launch(
    key: KernelKey, kernel: Any, views: Callable[[Tensor], list[Tensor]], group: int | None = None
) -> Callable[..., Any]:
    """The launcher of a kernel that takes `views` of each packed weight, and where `group` is given how many
    groups of so many columns a row has."""
    pairs = names(key)

    def run(x: Tensor, *args: Any) -> Any:
        x, rest = x.contiguous(), iter(args)
        columns = x.shape[-1]
        chunks, tokens = -(-columns // CHUNK), x.numel() // columns
        given, outputs, blocks, row_bytes = list[Any](), list[Tensor](), 0, 0
        for _, bias in pairs:
            packed = next(rest).contiguous()
            shift = [next(rest).contiguous()] if bias is not None else []
            rows = next(rest)
            y = x.new_empty((*x.shape[:-1], rows))
            given += [*views(packed), rows, *shift, y]
            outputs.append(y)
            blocks, row_bytes = blocks + -(-rows // BLOCK_N), packed.shape[1]
        sizes = [tokens, columns, chunks, row_bytes]
        if group is not None:
            sizes.append(groups(columns, group))
        if blocks > 0 and tokens > 0:
            kernel[(blocks, -(-tokens // BLOCK_M))](
                x, *given, *sizes, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=block_k(key), num_warps=WARPS
            )
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    return run
