"""measured_copy as a kernel family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import KernelFamily, TritonKernel, check_target, dtype_name, make_key
from tilewright.kernels.measured_copy import cpp, triton
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")


def _configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    x = args[0]
    refused = check_target(list(args), target)
    if refused is not None:
        return refused
    dtype = dtype_name(x, DTYPES, "x")
    return dtype if isinstance(dtype, Refusal) else make_key("measured_copy", target, dtype)


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(x: Tensor, before: Tensor, into: Tensor) -> Tensor:
        return x.new_empty((2, x.shape[0]), dtype=torch.float32)

    return fake


def _examples() -> Sequence[tuple[Any, ...]]:
    made = (torch.empty(2, 6912, 768, dtype=getattr(torch, name), device="meta") for name in DTYPES)
    return [(x, x, x) for x in made]


MEASURED_COPY = KernelFamily(
    op="measured_copy",
    dtypes=DTYPES,
    legality=("all are of one shape and dtype, into is contiguous; sizes may be symbolic",),
    configure=_configure,
    schema=lambda key: cpp.SCHEMA,
    generate={"cpu": cpp.generate, "cuda": triton.generate, "hip": triton.generate},
    triton=TritonKernel(
        triton.parameters, lambda key, columns: {}, lambda columns: triton.WARPS, triton.launcher
    ),
    fake=_fake,
    save=None,
    backward=None,
    rewrite_args=lambda key, args: tuple(args),
    examples=_examples,
)
