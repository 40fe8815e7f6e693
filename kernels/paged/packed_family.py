"""The ops over pools of packed rows as kernel families: selection and shapes. They are for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops.packed import packed_size, packed_width
from tilewright.compiler.ops.paged import PAGE_SIZES
from tilewright.kernels.common.cpp import LANES
from tilewright.kernels.common.family import (
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
)
from tilewright.kernels.paged import cpp, cpp_append, triton, triton_packed
from tilewright.kernels.paged.family import DTYPES, check_sizes, fitting, sized_key
from tilewright.kernels.paged.signature import append_names, append_schema, attention_names, attention_schema
from tilewright.runtime.contracts import KernelKey, Refusal, Target

ATTENTION_NAMES = (
    "q", "k_pages", "v_pages", "page_table", "lengths", "bits", "group", "first", "scale",
)  # fmt: skip
APPEND_NAMES = ("k_pages", "v_pages", "page_table", "starts", "k", "v", "bits", "group")
LEGALITY = (
    "new rows are float32, bfloat16 or float16",
    f"pages hold {', '.join(map(str, PAGE_SIZES))} tokens; the last axis of the pool is contiguous",
    "D and E are known, multiples of 8 and at most 128",
    "half a group at 4 bits, a group at 8, is a multiple of 8 channels on a CPU",
    "tables are int32, lengths int64",
    "on a GPU indices are not checked, and what a code stands for is rounded to the dtype of q",
)


def _configure(
    op: str, names: Sequence[str], rows: str
) -> Callable[[Sequence[Any], Target], KernelKey | Refusal]:
    def configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
        given = dict(zip(names, args, strict=True))
        refused = check_target([t for t in args if isinstance(t, Tensor)], target)
        if refused is not None:
            return refused
        dtype = dtype_name(given[rows], DTYPES, rows)
        if isinstance(dtype, Refusal):
            return dtype
        options = _pool_options(given, rows, target)
        if isinstance(options, Refusal):
            return options
        if "first" in given:
            options["first"] = given["first"] is not None
        runs = _runs(options, int(given["bits"]), int(given["group"]))
        return sized_key(op, fitting(target, runs), dtype, **options)

    return configure


def _runs(sizes: Mapping[str, Any], bits: int, group: int) -> list[int]:
    """Bytes of codes of a group of keys and of values: what vectors of channels have to divide."""
    return [(group or sizes[name]) * bits // 8 for name in ("head", "value")]


def _pool_options(given: dict[str, Any], rows: str, target: Target) -> dict[str, int | bool | str] | Refusal:
    k, v, bits, group = given["k_pages"], given["v_pages"], int(given["bits"]), int(given["group"])
    if k.dtype != torch.uint8 or v.dtype != torch.uint8 or k.dim() != 4 or v.dim() != 4:
        return Refusal("k_pages and v_pages must be uint8 with 4 axes")
    try:
        value = packed_size(v.shape[3], bits, group)
        sizes = {"head": given[rows].shape[3], "value": value, "page": k.shape[2]}
        if k.shape[3] != packed_width(sizes["head"], bits, group):
            return Refusal(f"rows of k_pages have {k.shape[3]} bytes, which {sizes['head']} channels do not")
    except ValueError as error:
        return Refusal(str(error))
    refused = check_sizes(sizes)
    if refused is not None:
        return refused
    if sizes["page"] not in PAGE_SIZES:
        return Refusal(f"pages of {sizes['page']} tokens; the kernels take {', '.join(map(str, PAGE_SIZES))}")
    if any(pool.stride(3) != 1 or any(step % 4 for step in pool.stride()[:3]) for pool in (k, v)):
        return Refusal("rows of k_pages or v_pages are not contiguous or start at no multiple of 4 bytes")
    if target.kind == "cpu" and any(run % LANES["avx2"] for run in _runs(sizes, bits, group)):
        shares = group or f"{sizes['head']} and {sizes['value']}"
        return Refusal(f"groups of {shares} at {bits} bits do not fill vectors of 8 channels")
    return {**{name: int(size) for name, size in sizes.items()}, "bits": bits, "group": group}


def _rewrite_attention(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    given = dict(zip(ATTENTION_NAMES, args, strict=True))
    scale = config_of(key)["head"] ** -0.5 if given["scale"] is None else given["scale"]
    return (*[given[name] for name in attention_names(key)], scale)


def _rewrite_append(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    given = dict(zip(APPEND_NAMES, args, strict=True))
    return tuple(given[name] for name in append_names(key))


def _fake_attention(key: KernelKey) -> Callable[..., Any]:
    value = config_of(key)["value"]
    return lambda q, *rest: (
        q.new_empty((*q.shape[:3], value)),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    )


def _examples(append: bool) -> Callable[[], Sequence[tuple[Any, ...]]]:
    def examples() -> Sequence[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for dtype, size, bits, group, padded in (
            (torch.float32, 64, 8, 0, False),
            (torch.float32, 64, 4, 0, True),
            (torch.bfloat16, 128, 4, 32, False),
            (torch.float16, 64, 8, 32, True),
        ):

            def meta(*shape: int, kind: torch.dtype) -> Tensor:
                return torch.empty(*shape, dtype=kind, device="meta")

            pool = meta(40, 3, 16, packed_width(size, bits, group), kind=torch.uint8)
            table, lengths = meta(2, 20, kind=torch.int32), meta(2, kind=torch.int64)
            if append:
                rows = meta(2, 3, 1, size, kind=dtype)
                found.append((pool, pool, table, lengths, rows, rows, bits, group))
            else:
                q, first = meta(2, 9, 1, size, kind=dtype), lengths if padded else None
                found.append((q, pool, pool, table, lengths, bits, group, first, None))
        return found

    return examples


PACKED_FAMILIES = (
    KernelFamily(
        op="packed_attention",
        dtypes=DTYPES,
        legality=LEGALITY,
        configure=_configure("packed_attention", ATTENTION_NAMES, "q"),
        schema=attention_schema,
        generate={"cpu": cpp.generate, "cuda": triton.generate, "hip": triton.generate},
        triton=TritonKernel(triton.parameters, triton.constants, triton.warps, triton.launcher),
        fake=_fake_attention,
        save=None,
        backward=None,
        rewrite_args=_rewrite_attention,
        examples=_examples(append=False),
    ),
    KernelFamily(
        op="packed_append",
        dtypes=DTYPES,
        legality=LEGALITY,
        configure=_configure("packed_append", APPEND_NAMES, "k"),
        schema=append_schema,
        generate={
            "cpu": cpp_append.generate,
            "cuda": triton_packed.generate_append,
            "hip": triton_packed.generate_append,
        },
        triton=TritonKernel(
            triton_packed.append_parameters,
            triton_packed.no_constants,
            triton_packed.warps,
            triton_packed.append_launcher,
        ),
        fake=lambda key: lambda *args: None,
        save=None,
        backward=None,
        rewrite_args=_rewrite_append,
        examples=_examples(append=True),
    ),
)
