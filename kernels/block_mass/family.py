"""block_mass as a kernel family: selection, shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.block_mass import cpp, triton
from tilewright.kernels.common.family import (
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
    make_key,
)
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD = {"cpu": 256, "cuda": 128, "hip": 128}
LEGALITY = (
    "q and k are [B, H, S, D], [B, H, T, D] of one dtype: float32, bfloat16 or float16",
    f"D is known, a multiple of 8 and at most {MAX_HEAD['cpu']}, on a GPU {MAX_HEAD['cuda']}",
    "lse is float32 [B, H, S]; q_off and k_off are int32 with one row; the mask is bool",
    "an input whose last axis is not contiguous is copied inside the op",
)


def _configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    q, k, lse, q_off, k_off, mask, _ = args
    refused = check_target([t for t in (q, k, lse, q_off, k_off, mask) if t is not None], target)
    if refused is not None:
        return refused
    dtype = dtype_name(q, DTYPES, "q")
    if isinstance(dtype, Refusal):
        return dtype
    if q.dim() != 4 or k.dim() != 4 or q.dtype != k.dtype or lse.dtype != torch.float32:
        return Refusal(
            f"q, k, lse are {q.dim()}, {k.dim()}, {lse.dim()} axes of {q.dtype}, {k.dtype}, {lse.dtype}; "
            "4 axes of one dtype and float32 are wanted"
        )
    size, most = q.shape[3], MAX_HEAD[target.kind]
    if not isinstance(size, int) or size != k.shape[3] or size % 8 or not 8 <= size <= most:
        return Refusal(f"heads of q and k are {size} and {k.shape[3]}; equal, multiples of 8, 8 to {most}")
    if q.shape[1] != k.shape[1]:
        return Refusal(f"{q.shape[1]} query heads over {k.shape[1]} key heads; as many are wanted")
    for name, off in (("q_off", q_off), ("k_off", k_off)):
        if off.dtype != torch.int32 or off.dim() != 2 or off.shape[0] != 1:
            return Refusal(f"{name} is {off.dtype} {list(off.shape)}; int32 with one row is wanted")
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2] != 1):
        return Refusal(f"the mask is {mask.dtype} {list(mask.shape)}; bool [1 or B, 1 or H, 1, T] is wanted")
    return make_key("block_mass", target, dtype, head=size, mask=mask is not None)


def _rewrite_args(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    *tensors, scale = args
    factor = config_of(key)["head"] ** -0.5 if scale is None else scale
    return (*[t for t in tensors if t is not None], factor)


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(q: Tensor, k: Tensor, lse: Tensor, q_off: Tensor, k_off: Tensor, *rest: Any) -> Tensor:
        return q.new_empty((*q.shape[:2], q_off.shape[1] - 1, k_off.shape[1] - 1), dtype=torch.float32)

    return fake


def _examples() -> Sequence[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    for dtype, size, masked in (
        (torch.bfloat16, 128, False),
        (torch.float16, 64, True),
        (torch.float32, 64, False),
    ):
        q = torch.empty(1, 4, 512, size, dtype=dtype, device="meta")
        borders = torch.empty(1, 9, dtype=torch.int32, device="meta")
        mask = torch.empty(1, 1, 1, 512, dtype=torch.bool, device="meta") if masked else None
        lse = torch.empty(1, 4, 512, device="meta")
        made.append((q, q, lse, borders, borders, mask, None))
    return made


BLOCK_MASS = KernelFamily(
    op="block_mass",
    dtypes=DTYPES,
    legality=LEGALITY,
    configure=_configure,
    schema=cpp.schema,
    generate={"cpu": cpp.generate, "cuda": triton.generate, "hip": triton.generate},
    triton=TritonKernel(
        triton.parameters, triton.constants, triton.warps, triton.launcher, options=triton.launch_options
    ),
    fake=_fake,
    save=None,
    backward=None,
    rewrite_args=_rewrite_args,
    examples=_examples,
)
