"""Triton for measured_copy: one program per run of elements of a sample; torch adds the sums of the runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.triton_text import triton_file
from tilewright.runtime.contracts import KernelKey

POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
RUN = 4096
WARPS = 8


def parameters(key: KernelKey) -> list[tuple[str, str]]:
    """(name, Triton type) of the kernel's run-time arguments, in order."""
    pointer = POINTER[key.dtype]
    tensors = [(name, pointer) for name in ("x", "before", "into")]
    return [*tensors, ("sums", "*fp32"), ("n", "i64"), ("runs", "i32")]


def generate(key: KernelKey, op: str) -> str:
    """The source file for one configuration."""
    lines = [
        "program = tl.program_id(0)",
        "sample = (program // runs).to(tl.int64)",
        f"within = (program % runs).to(tl.int64) * {RUN} + tl.arange(0, {RUN})",
        "at = sample * n + within",
        "here = tl.load(x + at, mask=within < n, other=0.0)",
        "there = tl.load(before + at, mask=within < n, other=0.0).to(tl.float32)",
        "tl.store(into + at, here, mask=within < n)",
        "far = tl.sum(tl.abs(here.to(tl.float32) - there))",
        "tl.store(sums + program, far)",
        "tl.store(sums + tl.num_programs(0) + program, tl.sum(tl.abs(there)))",
    ]
    return triton_file(
        title=f"A copy of {key.dtype} elements, and their L1 distance from what was kept before.",
        target=str(key.target),
        kernel=op,
        params=", ".join(name for name, _ in parameters(key)),
        body="\n".join(lines),
    )


def launcher(key: KernelKey, kernel: Any) -> Callable[..., Any]:
    """The op's implementation: launches one program per run, adds their sums."""

    def run(x: Tensor, before: Tensor, into: Tensor) -> Tensor:
        if not into.is_contiguous():
            raise ValueError("measured_copy: into must be contiguous")
        batch = x.shape[0]
        n = x[0].numel() if batch else 0
        runs = -(-n // RUN)
        sums = x.new_zeros((2, batch, runs), dtype=torch.float32)
        if batch * runs > 0:
            given = (x.contiguous(), before.contiguous(), into, sums, n, runs)
            kernel[(batch * runs,)](*given, num_warps=WARPS)
        return sums.sum(2)

    return run
