"""The paged ops as kernel families: selection and shapes. They are for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops.paged import PAGE_SIZES
from tilewright.kernels.common.cpp import LANES
from tilewright.kernels.common.family import (
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
    make_key,
)
from tilewright.kernels.paged import cpp, cpp_append, cpp_scores, cpp_top, triton
from tilewright.kernels.paged import triton_rows as rows
from tilewright.kernels.paged import triton_top as top
from tilewright.kernels.paged.signature import (
    append_schema,
    attention_names,
    attention_schema,
    bounds_names,
    bounds_schema,
    mass_schema,
    pick_schema,
    present,
)
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")
MAX_HEAD = 128
POOL_LEGALITY = (
    "the pool and the new rows are of one dtype: float32, bfloat16 or float16",
    f"pages hold {', '.join(map(str, PAGE_SIZES))} tokens; the last axis of the pool is contiguous",
    f"D and E are known, multiples of 8 and at most {MAX_HEAD}",
    "tables and lists are int32, lengths int64",
    "on a GPU indices are not checked, and rows of an append without a page are not written",
)
PAGED_NAMES = ("q", "k_pages", "v_pages", "page_table", "lengths", "first", "picked", "scale")
TOKEN_NAMES = ("q", "k_pages", "v_pages", "page_table", "lengths", "positions", "first", "scale")


def pool_options(
    given: dict[str, Any], rows: str, target: Target
) -> tuple[str, dict[str, int | bool | str]] | Refusal:
    """(dtype, options) of a pool k_pages, v_pages with the new rows of argument `rows`."""
    refused = check_target([t for t in given.values() if isinstance(t, Tensor)], target)
    if refused is not None:
        return refused
    k, v = given["k_pages"], given["v_pages"]
    dtype = dtype_name(k, DTYPES, "k_pages")
    if isinstance(dtype, Refusal):
        return dtype
    if not k.dim() == v.dim() == given[rows].dim() == 4 or not k.dtype == v.dtype == given[rows].dtype:
        return Refusal(f"{rows}, k_pages and v_pages must have 4 axes and one dtype")
    sizes = {"head": k.shape[3], "value": v.shape[3], "page": k.shape[2]}
    refused = check_sizes(sizes)
    if refused is not None:
        return refused
    if sizes["page"] not in PAGE_SIZES:
        return Refusal(f"pages of {sizes['page']} tokens; the kernels take {', '.join(map(str, PAGE_SIZES))}")
    if k.stride(3) != 1 or v.stride(3) != 1:
        return Refusal("the last axis of k_pages or v_pages is not contiguous")
    return dtype, {name: int(size) for name, size in sizes.items()}


def check_sizes(sizes: dict[str, Any]) -> Refusal | None:
    """Why head sizes do not fit the kernels, None when they do."""
    if not all(isinstance(n, int) for n in sizes.values()):
        return Refusal(f"sizes {sizes} are not known when compiling")
    for name in ("head", "value"):
        size = sizes.get(name, 8)
        if size % 8 or not 0 < size <= MAX_HEAD:
            return Refusal(f"{name} size {size} is not a multiple of 8 up to {MAX_HEAD}")
    return None


def fitting(target: Target, sizes: Iterable[int]) -> Target:
    """The target, or that of AVX2 where its vectors divide sizes that those of AVX-512 do not."""
    return Target("cpu", "avx2") if any(n % LANES.get(target.arch, 1) for n in sizes) else target


def sized_key(op: str, target: Target, dtype: str, **options: int | bool | str) -> KernelKey:
    """`make_key` for the widest vectors of the target that divide the head sizes."""
    sizes = [int(options[name]) for name in ("head", "value") if name in options]
    return make_key(op, fitting(target, sizes), dtype, **options)


def _configure(op: str, names: Sequence[str]) -> Callable[[Sequence[Any], Target], KernelKey | Refusal]:
    def configure(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
        given = dict(zip(names, args, strict=True))
        found = pool_options(given, "q", target)
        if isinstance(found, Refusal):
            return found
        dtype, options = found
        options["first"] = given["first"] is not None
        if op == "paged_attention":
            options["picked"] = given["picked"] is not None
        return sized_key(op, target, dtype, **options)

    return configure


def _rewrite(names: Sequence[str]) -> Callable[[KernelKey, Sequence[Any]], tuple[Any, ...]]:
    def rewrite(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
        given = dict(zip(names, args, strict=True))
        scale = config_of(key)["head"] ** -0.5 if given["scale"] is None else given["scale"]
        return (*present(attention_names(key), given), scale)

    return rewrite


def _fake_attention(key: KernelKey) -> Callable[..., Any]:
    def fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty((*q.shape[:3], v_pages.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)

    return fake


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _attention_examples(op: str) -> Callable[[], Sequence[tuple[Any, ...]]]:
    def examples() -> Sequence[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for dtype, size, page, padded in (
            (torch.float32, 64, 16, False),
            (torch.bfloat16, 128, 16, True),
            (torch.float16, 64, 64, False),
        ):
            q, pages = _meta(2, 9, 1, size, dtype=dtype), _meta(40, 3, page, size, dtype=dtype)
            table, lengths = _meta(2, 20, dtype=torch.int32), _meta(2, dtype=torch.int64)
            listed, first = _meta(2, 3, 8, dtype=torch.int32), lengths if padded else None
            if op == "token_attention":
                found.append((q, pages, pages, table, lengths, listed, first, None))
                continue
            found.append((q, pages, pages, table, lengths, first, None, None))
            found.append((q, pages, pages, table, lengths, first, listed, None))
        return found

    return examples


APPEND_NAMES = ("k_pages", "v_pages", "page_table", "starts", "k", "v", "low", "high")
BOUNDS_NAMES = ("q", "low", "high", "page_table", "lengths", "page", "first", "group")
PICK_NAMES = (*BOUNDS_NAMES[:6], "count", "first", "sink")
MASS_NAMES = ("q", "k", "lse", "first", "scale", "causal")


def _configure_append(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    given = dict(zip(APPEND_NAMES, args, strict=True))
    found = pool_options(given, "k", target)
    if isinstance(found, Refusal):
        return found
    dtype, options = found
    planes = [given[name] for name in ("low", "high") if given[name] is not None]
    if len(planes) == 1 or any(x.dtype != given["k"].dtype or x.stride(-1) != 1 for x in planes):
        return Refusal("low and high come together, in the dtype of the pool with a contiguous last axis")
    options["planes"] = bool(planes)
    return sized_key("paged_append", target, dtype, **options)


def _configure_bounds(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    given = dict(zip(BOUNDS_NAMES, args, strict=True))
    found = _rows(given, ("q", "low", "high"), target)
    if isinstance(found, Refusal):
        return found
    if given["low"].stride(-1) != 1 or given["high"].stride(-1) != 1:
        return Refusal("the last axis of low or high is not contiguous")
    head, padded = int(given["q"].shape[3]), given["first"] is not None
    group, page = str(given["group"]), int(given["page"])
    return sized_key("page_bounds", target, found, head=head, page=page, group=group, first=padded)


def _configure_pick(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    given = dict(zip(PICK_NAMES, args, strict=True))
    found = _configure_bounds([{**given, "group": "max"}[name] for name in BOUNDS_NAMES], target)
    if isinstance(found, Refusal):
        return found
    config = {name: value for name, value in config_of(found).items() if name != "group"}
    return make_key("pick_pages", found.target, found.dtype, **config, sink=bool(given["sink"]))


def _rewrite_pick(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    given = dict(zip(PICK_NAMES, args, strict=True))
    return (*present(bounds_names(key), given), given["count"])


def _configure_mass(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    given = dict(zip(MASS_NAMES, args, strict=True))
    found = _rows(given, ("q", "k"), target)
    if isinstance(found, Refusal):
        return found
    head, padded = int(given["q"].shape[3]), given["first"] is not None
    return sized_key("attention_mass", target, found, head=head, causal=bool(given["causal"]), first=padded)


def _rows(given: dict[str, Any], names: Sequence[str], target: Target) -> str | Refusal:
    """The dtype that the named tensors share, when they are of a head size the kernels take."""
    refused = check_target([t for t in given.values() if isinstance(t, Tensor)], target)
    refused = refused or check_sizes({"head": given[names[0]].shape[-1]})
    if refused is not None:
        return refused
    if len({given[name].dtype for name in names}) > 1:
        return Refusal(f"{', '.join(names)} must have one dtype")
    return dtype_name(given[names[0]], DTYPES, names[0])


def _rewrite_mass(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    given = dict(zip(MASS_NAMES, args, strict=True))
    scale = config_of(key)["head"] ** -0.5 if given["scale"] is None else given["scale"]
    return (*[given[name] for name in ("q", "k", "lse", "first") if given[name] is not None], scale)


def _configure_top(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    bounds = args[0]
    refused = check_target([bounds], target)
    if refused is not None:
        return refused
    if bounds.dtype != torch.float32:
        return Refusal(f"bounds are {bounds.dtype}; the kernel takes float32")
    return make_key("top_pages", target, "float32")


def _fake_top(key: KernelKey) -> Callable[..., Any]:
    return lambda bounds, count: bounds.new_empty(
        (*bounds.shape[:2], min(count, bounds.shape[2])), dtype=torch.int32
    )


def _append_examples() -> Sequence[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for dtype, size, page in ((torch.float32, 64, 16), (torch.bfloat16, 128, 16), (torch.float16, 64, 64)):
        pages, rows = _meta(40, 3, page, size, dtype=dtype), _meta(2, 3, 1, size, dtype=dtype)
        table, starts = _meta(2, 20, dtype=torch.int32), _meta(2, dtype=torch.int64)
        plane = _meta(40, 3, size, dtype=dtype)
        found.append((pages, pages, table, starts, rows, rows, None, None))
        found.append((pages, pages, table, starts, rows, rows, plane, plane))
    return found


def _bounds_examples() -> Sequence[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for dtype, size, page in ((torch.float32, 64, 16), (torch.bfloat16, 128, 16), (torch.float16, 64, 64)):
        q, plane = _meta(2, 9, 1, size, dtype=dtype), _meta(40, 3, size, dtype=dtype)
        table, lengths = _meta(2, 20, dtype=torch.int32), _meta(2, dtype=torch.int64)
        found.append((q, plane, plane, table, lengths, page, None, "max"))
        found.append((q, plane, plane, table, lengths, page, lengths, "sum"))
    return found


def _mass_examples() -> Sequence[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for dtype, size, causal in (
        (torch.float32, 64, True),
        (torch.bfloat16, 128, False),
        (torch.float16, 64, True),
    ):
        q, k = _meta(2, 9, 7, size, dtype=dtype), _meta(2, 3, 20, size, dtype=dtype)
        first = None if causal else _meta(2, dtype=torch.int64)
        found.append((q, k, _meta(2, 9, 7), first, None, causal))
    return found


def _present(names: Sequence[str], left_out: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    def rewrite(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
        given = dict(zip(names, args, strict=True))
        last = [n for n in names if n not in left_out and given[n] is not None]
        return tuple(given[name] for name in last)

    return rewrite


def _family(
    op: str,
    configure: Callable[[Sequence[Any], Target], KernelKey | Refusal],
    generate: dict[str, Callable[[KernelKey, str], str]],
    **parts: Any,
) -> KernelFamily:
    parts |= {"dtypes": DTYPES, "configure": configure, "generate": generate}
    return KernelFamily(op=op, save=None, backward=None, **parts)


def _attention_family(op: str, names: Sequence[str]) -> KernelFamily:
    return _family(
        op,
        legality=POOL_LEGALITY,
        configure=_configure(op, names),
        schema=attention_schema,
        generate={"cpu": cpp.generate, "cuda": triton.generate, "hip": triton.generate},
        triton=TritonKernel(triton.parameters, triton.constants, triton.warps, triton.launcher),
        fake=_fake_attention,
        rewrite_args=_rewrite(names),
        examples=_attention_examples(op),
    )


PAGED_FAMILIES = (
    _attention_family("paged_attention", PAGED_NAMES),
    _attention_family("token_attention", TOKEN_NAMES),
    _family(
        "paged_append",
        legality=POOL_LEGALITY,
        configure=_configure_append,
        schema=append_schema,
        generate={"cpu": cpp_append.generate, "cuda": rows.generate_append, "hip": rows.generate_append},
        triton=TritonKernel(
            rows.append_parameters, rows.no_constants, rows.append_warps, rows.append_launcher
        ),
        fake=lambda key: lambda *args: None,
        rewrite_args=_present(APPEND_NAMES, ()),
        examples=_append_examples,
    ),
    _family(
        "page_bounds",
        legality=(POOL_LEGALITY[0], POOL_LEGALITY[2]),
        configure=_configure_bounds,
        schema=bounds_schema,
        generate={
            "cpu": cpp_scores.generate_bounds,
            "cuda": rows.generate_bounds,
            "hip": rows.generate_bounds,
        },
        triton=TritonKernel(rows.bounds_parameters, rows.no_constants, rows.warps, rows.bounds_launcher),
        fake=lambda key: (
            lambda q, low, high, page_table, *rest: q.new_empty(
                (q.shape[0], low.shape[1], page_table.shape[1]), dtype=torch.float32
            )
        ),
        rewrite_args=_present(BOUNDS_NAMES, ("page", "group")),
        examples=_bounds_examples,
    ),
    _family(
        "attention_mass",
        legality=("q and k are of one dtype: float32, bfloat16 or float16", POOL_LEGALITY[2]),
        configure=_configure_mass,
        schema=mass_schema,
        generate={"cpu": cpp_scores.generate_mass, "cuda": rows.generate_mass, "hip": rows.generate_mass},
        triton=TritonKernel(rows.mass_parameters, rows.mass_constants, rows.warps, rows.mass_launcher),
        fake=lambda key: lambda q, k, *rest: q.new_empty(k.shape[:3], dtype=torch.float32),
        rewrite_args=_rewrite_mass,
        examples=_mass_examples,
    ),
    _family(
        "pick_pages",
        legality=(POOL_LEGALITY[0], POOL_LEGALITY[2]),
        configure=_configure_pick,
        schema=pick_schema,
        generate={"cpu": cpp_scores.generate_pick, "cuda": top.generate_pick, "hip": top.generate_pick},
        triton=TritonKernel(top.pick_parameters, rows.no_constants, rows.warps, top.pick_launcher),
        fake=lambda key: (
            lambda q, low, high, page_table, *rest: q.new_empty(
                (q.shape[0], low.shape[1], min(rest[-1], page_table.shape[1])), dtype=torch.int32
            )
        ),
        rewrite_args=_rewrite_pick,
        examples=lambda: [(*case[:6], 4, *case[6:7], case[7] == "max") for case in _bounds_examples()],
    ),
    KernelFamily(
        op="top_pages",
        dtypes=("float32",),
        legality=("bounds are float32",),
        configure=_configure_top,
        schema=lambda key: "(Tensor bounds, int count) -> Tensor",
        generate={"cpu": cpp_top.generate, "cuda": top.generate_top, "hip": top.generate_top},
        triton=TritonKernel(top.top_parameters, rows.no_constants, rows.warps, top.top_launcher),
        fake=_fake_top,
        save=None,
        backward=None,
        rewrite_args=lambda key, args: tuple(args),
        examples=lambda: [(_meta(2, 3, 20), 4)],
    ),
)
