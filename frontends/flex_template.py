"""FlexAttention's forward kernel as Inductor would write it: its own template, its own tile for each device.

Capture with FlexAttention needs a CUDA build of PyTorch, its template does not. What the compiler fills in is
filled in here: contiguous float16 inputs of known sizes, no change of scores, and a mask that keeps every
pair of a listed block, which is what a plain block mask leaves of FlexAttention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

NAME = "flex_attention"
HEAD = 64
_HEAD = '''"""FlexAttention's forward kernel, rendered from PyTorch's template."""

import triton
import triton.language as tl


'''
_NAMES = ("Q", "K", "V", "LSE", "MAX", "KV_NUM_BLKS", "KV_IDX", "FULL_KV_NUM_BLKS", "FULL_KV_IDX")
_OUT = "out_ptr0"
_SPARSE_BLOCK = 128
"""Inductor's default of create_block_mask."""
_TABLES = {
    "sm_80": ("CUDAConfigHeuristic", "a100_default_flex_config"),
    "sm_89": ("CUDAConfigHeuristic", "a100_default_flex_config"),
    "sm_90": ("CUDAConfigHeuristic", "h100_default_flex_config"),
    "sm_100": ("CUDAConfigHeuristic", "sm_100_default_flex_config"),
    "sm_120": ("CUDAConfigHeuristic", "sm_120_default_flex_config"),
    "gfx942": ("ROCmConfigHeuristic", "gfx942_default_flex_config"),
    "gfx950": ("ROCmConfigHeuristic", "gfx950_default_flex_config"),
}
"""Where Inductor keeps the tile that it takes without max_autotune, by capability."""


class NoTemplate(RuntimeError):
    """This PyTorch has no FlexAttention template of the form known here; one line."""


@dataclass(frozen=True)
class FlexKernel:
    """The kernel for one device."""

    text: str
    signature: dict[str, str]
    rows: int
    keys: int
    warps: int
    stages: int


def flex_kernel(arch: str, *, heads: int = 9, tokens: int = 4096) -> FlexKernel:
    """The kernel over q, k, v [1, heads, tokens, 64] in float16. NoTemplate when PyTorch lacks its parts."""
    try:
        from torch._inductor.kernel.flex.flex_attention import flex_attention_template
        from torch._inductor.template_heuristics import triton as heuristics

        place, table = _TABLES[arch]
        tile: Any = getattr(getattr(heuristics, place)(), table)[torch.float16, HEAD]
        template: Any = flex_attention_template.template
        rows, keys = int(tile.block_m), int(tile.block_n)
        warps, stages = int(tile.num_warps), int(tile.num_stages)
    except (ImportError, AttributeError, KeyError, RuntimeError) as error:  # Runtime: a tile asks the device
        raise NoTemplate(f"PyTorch {torch.__version__} names no tile for {arch} here: {error}") from error
    blocks = tokens // _SPARSE_BLOCK
    shapes = {
        **dict.fromkeys(("Q", "K", "V", _OUT), (1, heads, tokens, HEAD)),
        **dict.fromkeys(("LSE", "MAX"), (1, heads, tokens)),
        **dict.fromkeys(("KV_NUM_BLKS", "FULL_KV_NUM_BLKS"), (1, 1, blocks)),
        **dict.fromkeys(("KV_IDX", "FULL_KV_IDX"), (1, 1, blocks, blocks)),
    }
    text = template.render(USE_TMA=False, HAS_FULL_BLOCKS=True, **_hooks(shapes, _options(rows, keys)))
    kinds = {
        **dict.fromkeys(("Q", "K", "V"), "*fp16"),
        **dict.fromkeys(("LSE", "MAX"), "*fp32"),
        **dict.fromkeys(_NAMES[5:], "*i32"),
        _OUT: "*fp16",
    }
    return FlexKernel(_HEAD + text, kinds, rows, keys, warps, stages)


def _options(rows: int, keys: int) -> dict[str, str]:
    """What Inductor defines for this call (`flex_attention` in its lowering), as text."""
    found: dict[str, Any] = {
        "BLOCK_M": rows, "BLOCK_N": keys, "SM_SCALE": HEAD**-0.5, "GQA_SHARED_HEADS": 1,
        "SPARSE_Q_BLOCK_SIZE": _SPARSE_BLOCK, "SPARSE_KV_BLOCK_SIZE": _SPARSE_BLOCK,
        "IS_DIVISIBLE": True, "SAFE_HEAD_DIM": True, "HAS_FULL_BLOCKS": True, "OUTPUT_LOGSUMEXP": True,
        "OUTPUT_MAX": False, "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False, "USE_TMA": False, "FLOAT32_PRECISION": "'ieee'",
        "INDEX_DTYPE": "tl.int32",
        **dict.fromkeys(("QK_HEAD_DIM", "QK_HEAD_DIM_ROUNDED", "V_HEAD_DIM", "V_HEAD_DIM_ROUNDED"), HEAD),
    }  # fmt: skip
    return {name: str(value) for name, value in found.items()}


def _hooks(shapes: dict[str, tuple[int, ...]], options: dict[str, str]) -> dict[str, Any]:
    """What the template calls while it is rendered."""

    def defines() -> str:
        return "\n".join(f"{name} : tl.constexpr = {value}" for name, value in options.items())

    def strides(name: str) -> list[int]:
        found = [1]
        for size in reversed(shapes[name][1:]):
            found.insert(0, found[0] * size)
        return found

    def def_kernel(*names: str) -> str:
        body = "".join(f"    {line}\n" for line in defines().splitlines())
        return f"@triton.jit\ndef {NAME}({', '.join([*names, _OUT])}):\n{body}"

    def stride(name: str, axis: int | None = None) -> str:
        return ", ".join(map(str, strides(name))) if axis is None else str(strides(name)[axis])

    def modification(*, subgraph_number: int, output_name: str, score: str, **_: Any) -> str:
        whole = "tl.full([1], True, tl.int1)"
        return f"{output_name} = {score if subgraph_number == 0 else whole}"

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        terms = [f"{index} * {step}" for index, step in zip(indices, strides(_OUT), strict=True)]
        return f"tl.store({_OUT} + ({' + '.join(terms)}), {value}, {mask})"

    return {
        "def_kernel": def_kernel,
        "gen_argdefs": lambda: _OUT,
        "gen_defines": defines,
        "size": lambda name, axis: str(shapes[name][axis]),
        "stride": stride,
        "modification": modification,
        "store_output": store_output,
    }
