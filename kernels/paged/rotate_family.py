"""rotate_rows as a kernel family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops.paged import PAGE_SIZES
from tilewright.kernels.common.family import (
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
)
from tilewright.kernels.paged import cpp_rotate, triton_rotate
from tilewright.kernels.paged.family import DTYPES, MAX_HEAD, check_sizes, sized_key
from tilewright.kernels.paged.signature import rotate_schema
from tilewright.kernels.paged.triton_rows import no_constants
from tilewright.runtime.contracts import KernelKey, Refusal, Target


def _configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    rows, offsets, pace, table, interleaved = args
    refused = check_target([x for x in args if isinstance(x, Tensor)], target)
    refused = refused or check_sizes({"head": rows.shape[3]})
    if refused is not None:
        return refused
    dtype = dtype_name(rows, DTYPES, "rows")
    if isinstance(dtype, Refusal):
        return dtype
    page = 0 if table is None else rows.shape[2]
    if table is not None and page not in PAGE_SIZES:
        return Refusal(f"pages of {page} tokens; the kernels take {', '.join(map(str, PAGE_SIZES))}")
    if rows.stride(3) != 1:
        return Refusal("the last axis of rows is not contiguous")
    sizes = {"head": int(rows.shape[3]), "turned": 2 * int(pace.shape[0]), "page": int(page)}
    return sized_key("rotate_rows", target, dtype, **sizes, interleaved=bool(interleaved))


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(rows: Tensor, offsets: Tensor, pace: Tensor, *table: Tensor) -> Tensor:
        if not table:
            return rows.new_empty(rows.shape)
        batch, pages = table[0].shape
        return rows.new_empty((batch, rows.shape[1], pages * rows.shape[2], rows.shape[3]))

    return fake


def _rewrite(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(args[:4] if config_of(key)["page"] else args[:3])


def _examples() -> Sequence[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for dtype, size, turned, page, interleaved in (
        (torch.float32, 64, 64, 0, False),
        (torch.float32, 64, 64, 16, False),
        (torch.bfloat16, 128, 128, 16, False),
        (torch.bfloat16, 128, 64, 0, True),
        (torch.float16, 96, 32, 64, True),
    ):
        rows = torch.empty(40 if page else 2, 3, page or 320, size, dtype=dtype, device="meta")
        offsets = torch.empty(2, 1, 320, dtype=torch.int64, device="meta")
        pace = torch.empty(turned // 2, dtype=torch.float32, device="meta")
        table = torch.empty(2, 320 // page, dtype=torch.int32, device="meta") if page else None
        found.append((rows, offsets, pace, table, interleaved))
    return found


ROTATE_ROWS = KernelFamily(
    op="rotate_rows",
    dtypes=DTYPES,
    legality=(
        f"D is known, a multiple of 8 and at most {MAX_HEAD}",
        f"pages hold {', '.join(map(str, PAGE_SIZES))} tokens; the last axis of rows is contiguous",
        "on a GPU indices are not checked",
    ),
    configure=_configure,
    schema=rotate_schema,
    generate={"cpu": cpp_rotate.generate, "cuda": triton_rotate.generate, "hip": triton_rotate.generate},
    triton=TritonKernel(triton_rotate.parameters, no_constants, triton_rotate.warps, triton_rotate.launcher),
    fake=_fake,
    save=None,
    backward=None,
    rewrite_args=_rewrite,
    examples=_examples,
)
