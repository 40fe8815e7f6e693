"""linear and linear_multi as kernel families: selection, shapes, gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.common.family import (
    KernelFamily,
    TritonKernel,
    check_target,
    config_of,
    dtype_name,
    make_key,
)
from tilewright.kernels.linear import cpp, cpp_many, triton
from tilewright.kernels.linear.cpp_panel import TILE
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPES = ("float32", "bfloat16", "float16")
ROWS = (1, 2, 4, 8)
"""Bounds on the rows of x that kernels are made for which read each weight where it lies."""
MOST_ROWS = 64
"""In float32 on a CPU panels of the weight are turned around for more of them, up to here: a library that
turns the whole weight costs 1.1 to 2.8 times as much up to 39 rows, and less from about 64 on."""
MANY = 0
"""Stands for a bound where there is none."""
MAX_WEIGHTS = 8
LEGALITY = (
    "x, weights and biases have one dtype: float32, bfloat16 or float16 (accumulated in float32)",
    f"x has 1 to {ROWS[-1]} rows, known when compiling; up to {MOST_ROWS} in float32 on a CPU; any number of"
    " float32 on AMD's processors with AVX-512, where weights and biases are contiguous",
    "each weight is [N, K] with its last axis contiguous; K matches x",
    "each bias is absent or [N]",
    f"linear_multi: 2 to {MAX_WEIGHTS} weights",
    "an x that is not contiguous is copied inside the op",
)


def _constant(size: Any) -> int | None:
    """The value of a size when it is known, else None."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


@functools.lru_cache(maxsize=1)
def library_is_narrow() -> bool:
    """Whether torch's own float32 product runs AVX2 code on a processor that has AVX-512: MKL does on AMD's,
    at 0.45 of oneDNN's speed on Zen 5."""
    return torch.backends.mkl.is_available() and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def _takes_many(tensors: Sequence[Tensor], target: Target) -> bool:
    """Whether oneDNN's product is what many rows of x, the first of these, are best given to."""
    return (
        target.arch == "avx512"
        and tensors[0].dtype == torch.float32
        and all(tensor.is_contiguous() for tensor in tensors[1:])
        and torch.backends.mkldnn.is_available()
        and library_is_narrow()
    )


def _rows(x: Tensor, most: int) -> int | Refusal:
    """The rows of x, when a kernel takes so many."""
    rows = 1
    for size in x.shape[:-1]:
        known = _constant(size)
        if known is None:
            return Refusal(f"the number of rows of x {list(x.shape)} is not known when compiling")
        rows *= known
    return rows if 1 <= rows <= most else Refusal(f"x has {rows} rows, the kernels take 1 to {most}")


def _weight_refusal(weight: Tensor, bias: Tensor | None, x: Tensor, i: int) -> Refusal | None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return Refusal(f"weight {i} is {list(weight.shape)}, x ends in {x.shape[-1]}")
    if weight.dtype != x.dtype:
        return Refusal(f"weight {i} is {weight.dtype}, x is {x.dtype}")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        return Refusal(f"weight {i} has strides {weight.stride()}; its last axis must be contiguous")
    if bias is not None and (bias.dtype != x.dtype or list(bias.shape) != [weight.shape[0]]):
        return Refusal(
            f"bias {i} is {list(bias.shape)} {bias.dtype}, weight is {list(weight.shape)} {weight.dtype}"
        )
    return None


def _configure(
    op: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], target: Target
) -> KernelKey | Refusal:
    tensors = [x, *weights, *[b for b in biases if b is not None]]
    refused = check_target(tensors, target)
    if refused is not None:
        return refused
    dtype = dtype_name(x, DTYPES, "x")
    if isinstance(dtype, Refusal):
        return dtype
    if x.dim() == 0 or len(weights) > MAX_WEIGHTS:
        return Refusal(
            f"x has {x.dim()} axes, there are {len(weights)} weights; at least 1, at most {MAX_WEIGHTS}"
        )
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        refused = _weight_refusal(weight, bias, x, i)
        if refused is not None:
            return refused
    turns = target.kind == "cpu" and dtype == "float32"
    rows = _rows(x, MOST_ROWS if turns else ROWS[-1])
    if isinstance(rows, Refusal):
        if not _takes_many(tensors, target):
            return rows
        rows = MANY
    given = {"count": len(weights), "biases": sum(1 << i for i, b in enumerate(biases) if b is not None)}
    if rows > ROWS[-1]:
        return make_key(op, target, dtype, **given, panel=TILE[target.arch])
    bound = rows if rows == MANY else next(b for b in ROWS if rows <= b)
    return make_key(op, target, dtype, **given, rows=bound, streams=cpp.STREAMS)


def _configure_one(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    return _configure("linear", args[0], [args[1]], [args[2]], target)


def _configure_many(args: Sequence[Any], target: Target) -> KernelKey | Refusal:
    if len(args[1]) < 2:
        return Refusal(f"linear_multi has {len(args[1])} weights; the kernel takes 2 to {MAX_WEIGHTS}")
    return _configure("linear_multi", args[0], args[1], args[2], target)


def _rewrite_one(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(args[: 3 if config_of(key)["biases"] else 2])


def _rewrite_many(key: KernelKey, args: Sequence[Any]) -> tuple[Any, ...]:
    x, weights, biases = args
    pairs = zip(weights, biases, cpp.names(key), strict=True)
    return (x, *[v for w, b, (_, name) in pairs for v in ((w,) if name is None else (w, b))])


def _pairs(key: KernelKey, args: Sequence[Any]) -> list[tuple[Any, Any]]:
    """(weight, bias or None) pairs from the kernel op's arguments after x."""
    rest = iter(args)
    return [(next(rest), next(rest) if bias is not None else None) for _, bias in cpp.names(key)]


def _fake(key: KernelKey) -> Callable[..., Any]:
    def fake(x: Tensor, *args: Tensor) -> Any:
        outs = [
            torch.empty((*x.shape[:-1], w.shape[0]), dtype=x.dtype, device=x.device)
            for w, _ in _pairs(key, args)
        ]
        return tuple(outs) if len(outs) > 1 else outs[0]

    return fake


def _save(key: KernelKey) -> Callable[..., None]:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0], *[w for w, _ in _pairs(key, inputs[1:])])

    return save


def _backward(key: KernelKey) -> Callable[..., Any]:
    """dx = sum_i dy_i W_i, dW_i = dy_i^T x, db_i = sum of dy_i over rows."""

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        flat, dx, rest = x.reshape(-1, x.shape[-1]), None, list[Any]()
        for dy, weight, (_, bias) in zip(grads, weights, cpp.names(key), strict=True):
            if dy is None:
                rest += [None] * (1 if bias is None else 2)
                continue
            part = dy @ weight
            dx = part if dx is None else dx + part
            rows = dy.reshape(-1, weight.shape[0])
            rest += [rows.t() @ flat] + ([] if bias is None else [rows.sum(0)])
        return (dx, *rest)

    return backward


def _weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _needs_torch(key: KernelKey) -> bool:
    return config_of(key).get("rows") == MANY


def _generate_cpp(key: KernelKey, op: str) -> str:
    generate = cpp_many.generate if _needs_torch(key) else cpp.generate
    return generate(key, op)


def _examples_one() -> Sequence[tuple[Any, ...]]:
    cases = [(m, t) for m in (1, 8) for t in (torch.float32, torch.bfloat16)]
    return [(_weight(m, 576, t), _weight(576, 576, t), None) for m, t in cases]


def _examples_many() -> Sequence[tuple[Any, ...]]:
    qkv = [_weight(n, 576) for n in (576, 192, 192)]
    return [(_weight(1, 576), qkv, [None] * 3), (_weight(1, 576), [_weight(1536, 576)] * 2, [None] * 2)]


LINEAR = KernelFamily(
    op="linear",
    dtypes=DTYPES,
    legality=tuple(clause for clause in LEGALITY if "linear_multi" not in clause),
    configure=_configure_one,
    schema=cpp.schema,
    generate={"cpu": _generate_cpp, "cuda": triton.generate, "hip": triton.generate},
    triton=TritonKernel(triton.parameters, triton.constants, triton.warps, triton.launcher),
    fake=_fake,
    save=_save,
    backward=_backward,
    rewrite_args=_rewrite_one,
    examples=_examples_one,
    needs_torch=_needs_torch,
)
LINEAR_MULTI = KernelFamily(
    op="linear_multi",
    dtypes=DTYPES,
    legality=LEGALITY,
    configure=_configure_many,
    schema=cpp.schema,
    generate={"cpu": _generate_cpp, "cuda": triton.generate, "hip": triton.generate},
    triton=TritonKernel(triton.parameters, triton.constants, triton.warps, triton.launcher),
    fake=_fake,
    save=_save,
    backward=_backward,
    rewrite_args=_rewrite_many,
    examples=_examples_many,
    needs_torch=_needs_torch,
)
