"""merge_parts as a kernel family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import KernelFamily, TritonKernel, check_target, dtype_name
from tilewright.kernels.paged import cpp_merge, triton_merge
from tilewright.kernels.paged.family import DTYPES, MAX_HEAD, check_sizes, sized_key
from tilewright.kernels.paged.triton_rows import no_constants
from tilewright.runtime.contracts import KernelKey, Refusal, Target


def _configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    outs, lses = args
    refused = check_target([outs, lses], target) or check_sizes({"value": outs.shape[3]})
    if refused is not None:
        return refused
    if lses.dtype != torch.float32:
        return Refusal(f"lses are {lses.dtype}; the kernel takes float32")
    dtype = dtype_name(outs, DTYPES, "outs")
    return (
        dtype if isinstance(dtype, Refusal) else sized_key("merge_parts", target, dtype, value=outs.shape[3])
    )


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return outs.new_empty((1, *outs.shape[1:]), dtype=torch.float32), lses.new_empty((1, *lses.shape[1:]))

    return fake


def _examples() -> Sequence[tuple[Any, ...]]:
    lses = torch.empty(5, 9, 1, device="meta")
    cases = ((torch.float32, 64), (torch.bfloat16, 128), (torch.float16, 72))
    return [(torch.empty(5, 9, 1, size, dtype=dtype, device="meta"), lses) for dtype, size in cases]


MERGE_PARTS = KernelFamily(
    op="merge_parts",
    dtypes=DTYPES,
    legality=("lses are float32", f"E is known, a multiple of 8 and at most {MAX_HEAD}"),
    configure=_configure,
    schema=lambda key: cpp_merge.SCHEMA,
    generate={"cpu": cpp_merge.generate, "cuda": triton_merge.generate, "hip": triton_merge.generate},
    triton=TritonKernel(triton_merge.parameters, no_constants, triton_merge.warps, triton_merge.launcher),
    fake=_fake,
    save=None,
    backward=None,
    rewrite_args=lambda key, args: tuple(args),
    examples=_examples,
)
