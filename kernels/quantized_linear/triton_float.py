"""Triton for quantized_linear and quantized_linear_multi with weights of small floats (fp8, NVFP4).

Programs and grid are those of the integer kernels. Codes become floats of x's dtype in registers, which holds
every value exactly, for NVFP4 already times its e4m3 scale (6 bits in all); float32 scales meet the sums. On
targets that convert fp8 the bytes are loaded as fp8, and activations of fp8 meet fp8 weights in a tl.dot of
fp8: for blocks of 16 rows Triton 3.9 makes fp8 products of it on sm_120, and on sm_90 and sm_100, whose fp8
products take 64 rows, hardware conversions to float16 and its products. Elsewhere bytes are shifted to where
the bits of a float16 lie: the exponent is then too small by a fixed amount, subnormals too, which one exact
product makes up for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewright.compiler.float_format import FP8
from tilewright.kernels.common.family import FP8_ARCHS, config_of
from tilewright.kernels.common.triton_text import TL
from tilewright.kernels.quantized_linear import triton
from tilewright.runtime.contracts import KernelKey

_HALVES = {
    "e4m3": ("((c & 128) << 8) | ((c & 127) << 7)", 256.0),
    "e5m2": ("c << 8", 1.0),
    "nvfp4": ("((c & 8) << 12) | ((c & 7) << 9)", 16384.0),
}
"""Bits of a float16 from a code c, and what that float16 is to be multiplied by."""
_POINTERS = {"e4m3": "*fp8e4nv", "e5m2": "*fp8e5"}


def is_native(key: KernelKey) -> bool:
    """True where the kernel reads the weight as fp8."""
    return key.target.arch in FP8_ARCHS and config_of(key)["element"] in _POINTERS


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    weight = _POINTERS[config_of(key)["element"]] if is_native(key) else "*u8"
    fine = [("fine", "*u8")] if config_of(key)["element"] == "nvfp4" else []
    return triton.arguments(key, weight, [("grid", "*fp32"), *fine], [])


def _value(element: str, bits: str, dtype: str) -> list[str]:
    """c, and from it the value of a code as dtype."""
    halves, factor = _HALVES[element]
    times = f" * {factor}" if factor != 1.0 else ""
    return [
        f"c = {bits}.to(tl.uint16)",
        f"v = (({halves}).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32){times}).to({dtype})",
    ]


def _weights(key: KernelKey, i: int, dtype: str) -> list[str]:
    """w: the values [BLOCK_K, BLOCK_N] of weight i. Rows are padded with codes of zero to whole steps."""
    element = config_of(key)["element"]
    row = "n.to(tl.int64)[None, :] * row_bytes"
    load = f"tl.load(w{i} + {row} + {{}}, mask=real[None, :], other=0{'.0' if is_native(key) else ''})"
    if element != "nvfp4":
        codes = load.format("k[:, None]")
        if is_native(key):
            return [f"w = {codes}" + (f".to({dtype})" if dtype else "")]
        return [*_value(element, codes, dtype), "w = v"]
    codes = f"(({load.format('(k // 2)[:, None]')} >> (k % 2 * 4)[:, None]) & 15)"
    place = "K32 * 16 + 4 + (k // 16)[:, None]"
    fine = f"tl.load(fine{i} + {row} + {place}, mask=real[None, :], other=0)"
    return [*_value("nvfp4", codes, dtype), "w = v", *_value("e4m3", fine, dtype), "w = w * v"]


def _token_scales() -> list[str]:
    """inverse and s [BLOCK_M] of whole rows of x."""
    return [
        "most = tl.zeros((BLOCK_M,), dtype=tl.float32)",
        "poison = tl.zeros((BLOCK_M,), dtype=tl.float32)",
        "for start in range(0, K, BLOCK_K):",
        "    k = start + tl.arange(0, BLOCK_K)",
        f"    {triton.LOAD_X}.to(tl.float32)",
        "    most = tl.maximum(most, tl.max(tl.abs(a), axis=1))",
        "    poison += tl.sum(a * 0.0, axis=1)",
        "inverse = tl.where(most > 2e-36, tl.math.div_rn(448.0, tl.maximum(most, 2e-36)), 0.0)",
        "s = most * (1.0 / 448.0) + poison",
    ]


def _round(dtype: str) -> list[str]:
    """q: a * inverse rounded to e4m3, half to even, saturating, as dtype, which holds it exactly.

    By arithmetic everywhere, so that targets agree: the interpreter's own conversion to fp8 drops carries.
    """
    return [
        "v = tl.minimum(tl.maximum(a.to(tl.float32) * inverse[:, None], -448.0), 448.0)",
        "u = v.to(tl.int32, bitcast=True)",
        "u = (u + 524287 + ((u >> 20) & 1)) & -1048576",  # 3 bits behind the first
        # Below 2^-6 steps are of 2^-9: the last bit of a float of this size.
        "small = (v + 24576.0) - 24576.0",
        f"q = tl.where(tl.abs(v) < 0.015625, small, u.to(tl.float32, bitcast=True)).to({dtype})",
    ]


def steps(key: KernelKey, i: int) -> list[str]:
    """The loop over K and the scales behind it: total [BLOCK_M, BLOCK_N] in float32."""
    config, native = config_of(key), is_native(key)
    grid = f"grid{i} + n.to(tl.int64) * (row_bytes // 4) + K32 * {4 if config['element'] == 'nvfp4' else 8}"
    lines = ["total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)"]
    body = ["k = start + tl.arange(0, BLOCK_K)", triton.LOAD_X]
    if config["cut"]:
        lines += _token_scales()
        body += _round("tl.float8e4nv" if native else "tl.float16")
        body += _weights(key, i, "" if native else "tl.float16")
        body.append("part = tl.dot(q, w, out_dtype=tl.float32)")
    else:
        body += _weights(key, i, TL[key.dtype])
        body.append('part = tl.dot(a, w, input_precision="ieee", out_dtype=tl.float32)')
    by_group = config["group"] != 0 and config["element"] != "nvfp4"
    scale = "scale = tl.load({}, mask=real, other=0.0)"
    if by_group:
        body += [scale.format(f"{grid} + start // {config['group']}"), "part *= scale[None, :]"]
    body.append("total += part")
    lines += ["for start in range(0, K, BLOCK_K):", *[f"    {line}" for line in body]]
    if not by_group:
        lines += [scale.format(grid), "total *= scale[None, :]"]
    return [*lines, *(["total *= s[:, None]"] if config["cut"] else [])]


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration: format, number of weights, which have biases."""
    config = config_of(key)
    title = f"x W^T, W of {config['element']}: {config['count']} weight(s)."
    given = [name for name, _ in parameters(key)]
    fixed = [f"{name}: tl.constexpr" for name in triton.constants(key, 0)]
    return triton.kernel_text(key, op, title, [*given, *fixed], steps)


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: allocates every output, launches one grid over the rows of all weights."""
    element = config_of(key)["element"]
    native = {"e4m3": FP8["fp8-e4m3"], "e5m2": FP8["fp8-e5m2"]}[element] if is_native(key) else torch.uint8

    def views(packed: torch.Tensor) -> list[torch.Tensor]:
        return [packed.view(native), packed.view(torch.float32), *([packed] if element == "nvfp4" else [])]

    return triton.launch(key, kernel, views)
