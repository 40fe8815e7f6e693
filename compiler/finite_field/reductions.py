"""The ATen ops with laws that reduce, order or multiply along axes, and constants shaped like a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.finite_field import planes as field
from tilewright.compiler.finite_field.handlers import handles, maximum, minimum, root
from tilewright.compiler.finite_field.planes import OutOfScope, Planes
from tilewright.compiler.finite_field.residues import P, Q
from tilewright.compiler.finite_field.value import Context, Value, as_planes


def _ratio(value: Fraction) -> Planes:
    parts = (value.numerator * pow(value.denominator, -1, modulus) % modulus for modulus in (P, Q))
    return Planes(*(torch.tensor(part, dtype=torch.int64) for part in parts))


def _dims(dim: int | Sequence[int] | None) -> list[int]:
    return [] if dim is None else [dim] if isinstance(dim, int) else list(dim)


def _count(x: Planes, dims: list[int]) -> int:
    return math.prod(x.shape[d] for d in dims) if dims else x.p.numel()


@handles("sum")
def _sum(context: Context, x: object, dim: Any = None, keepdim: bool = False, dtype: object = None) -> Planes:
    return field.total(as_planes(x), _dims(dim), keepdim)


@handles("mean")
def _mean(
    context: Context, x: object, dim: Any = None, keepdim: bool = False, dtype: object = None
) -> Planes:
    value, dims = as_planes(x), _dims(dim)
    return field.multiply(field.total(value, dims, keepdim), _ratio(Fraction(1, _count(value, dims))))


def _variance(value: Planes, dims: list[int], keepdim: bool, correction: float) -> Planes:
    count = _count(value, dims)
    axes = dims or list(range(value.p.dim()))
    center = field.multiply(field.total(value, axes, True), _ratio(Fraction(1, count)))
    shifted = field.subtract(value, center)
    squares = field.total(field.multiply(shifted, shifted), axes, keepdim)
    return field.multiply(squares, _ratio(Fraction(1) / (count - Fraction(correction))))


@handles("var")
def _var(
    context: Context,
    x: object,
    dim: Any = None,
    unbiased: Any = None,
    *,
    correction: Any = None,
    keepdim: bool = False,
) -> Planes:
    return _variance(as_planes(x), _dims(dim), keepdim, 1 if correction is None else correction)


@handles("std")
def _std(
    context: Context,
    x: object,
    dim: Any = None,
    unbiased: Any = None,
    *,
    correction: Any = None,
    keepdim: bool = False,
) -> Planes:
    return root(
        _variance(as_planes(x), _dims(dim), keepdim, 1 if correction is None else correction), context.key
    )


@handles("var_mean")
def _var_mean(
    context: Context, x: object, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Planes, Planes]:
    return (
        _variance(as_planes(x), _dims(dim), keepdim, 1 if correction is None else correction),
        _mean(context, x, dim, keepdim),
    )


@handles("linalg_vector_norm")
def _vector_norm(
    context: Context,
    x: object,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    dtype: object = None,  # noqa: A002
) -> Planes:
    if ord != 2:
        raise OutOfScope(f"a vector norm of order {ord}")
    value = as_planes(x)
    return root(field.total(field.multiply(value, value), _dims(dim), keepdim), context.key)


@handles("cumsum")
def _cumsum(context: Context, x: object, dim: int, dtype: object = None) -> Planes:
    value = as_planes(x)
    field.refuse_inf(value, "a running sum over -inf")
    return Planes(value.p.cumsum(dim) % P, None if value.q is None else value.q.cumsum(dim) % Q)


@handles("logsumexp")
def _logsumexp(context: Context, x: object, dim: Any, keepdim: bool = False) -> Planes:
    return field.log(field.total(field.exp(as_planes(x), context.key), _dims(dim), keepdim), context.key)


@handles("_softmax", "softmax", "_safe_softmax")
def _softmax(
    context: Context, x: object, dim: int, half_to_float: object = False, dtype: object = None
) -> Planes:
    return field.softmax(as_planes(x), dim, context.key)


@handles("_log_softmax")
def _log_softmax(context: Context, x: object, dim: int, half_to_float: bool) -> Planes:
    return field.subtract(as_planes(x), _logsumexp(context, x, dim, True))


@handles("amax", "amin")
def _amax(context: Context, x: object, dim: Any = (), keepdim: bool = False) -> Planes:
    value = as_planes(x)
    for d in sorted((d % value.p.dim() for d in _dims(dim) or range(value.p.dim())), reverse=True):
        value = field.extremum(value, d, keepdim, context.key, context.name == "aten::amax")
    return value


@handles("max", "min")
def _max(context: Context, x: object, *args: Any) -> Any:
    largest = context.name == "aten::max"
    if not args:
        flat = field.each(lambda plane: plane.reshape(-1), as_planes(x))
        return field.extremum(flat, 0, False, context.key, largest)
    if not isinstance(args[0], int):
        return (maximum if largest else minimum)(context, x, args[0])
    dim, keepdim = args[0], bool(args[1:] and args[1])
    rank = field.order(as_planes(x), context.key)
    index = rank.argmax(dim, keepdim) if largest else rank.argmin(dim, keepdim)
    return field.extremum(as_planes(x), dim, keepdim, context.key, largest), index


@handles("argmax", "argmin")
def _argmax(context: Context, x: object, dim: int | None = None, keepdim: bool = False) -> Tensor:
    rank = field.order(as_planes(x), context.key)
    return rank.argmax(dim, keepdim) if context.name == "aten::argmax" else rank.argmin(dim, keepdim)


@handles("topk")
def _topk(
    context: Context,
    x: object,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002
) -> tuple[Planes, Tensor]:
    index = field.order(as_planes(x), context.key).topk(k, dim, largest, sorted)[1]
    return field.each(lambda plane: plane.gather(dim, index), as_planes(x)), index


@handles("sort")
def _sort(context: Context, x: object, *args: Any, **options: Any) -> tuple[Planes, Tensor]:
    options.setdefault("stable", True)
    dim = options.pop("dim", args[0] if args else -1)
    descending = options.pop("descending", bool(args[1:] and args[1]))
    index = torch.sort(field.order(as_planes(x), context.key), dim=dim, descending=descending, **options)[1]
    return field.each(lambda plane: plane.gather(dim, index), as_planes(x)), index


@handles("mm", "bmm", "matmul", "mv", "dot")
def _matmul(context: Context, x: object, y: object) -> Planes:
    left, right = as_planes(x), as_planes(y)
    row, column = left.p.dim() == 1, right.p.dim() == 1
    if row:
        left = field.each(lambda plane: plane.unsqueeze(0), left)
    if column:
        right = field.each(lambda plane: plane.unsqueeze(1), right)
    product = field.matmul(left, right)
    if column:
        product = field.each(lambda plane: plane.squeeze(-1), product)
    return field.each(lambda plane: plane.squeeze(-1 if column else -2), product) if row else product


@handles("addmm", "baddbmm")
def _addmm(context: Context, bias: object, x: object, y: object, beta: float = 1, alpha: float = 1) -> Planes:
    product = field.multiply(field.matmul(as_planes(x), as_planes(y)), field.lift(alpha))
    return field.add(field.multiply(as_planes(bias), field.lift(beta)), product)


@handles("addcmul")
def _addcmul(context: Context, x: object, y: object, z: object, value: float = 1) -> Planes:
    return field.add(
        as_planes(x), field.multiply(field.multiply(as_planes(y), as_planes(z)), field.lift(value))
    )


@handles("lerp")
def _lerp(context: Context, x: object, y: object, weight: object) -> Planes:
    step = field.multiply(field.subtract(as_planes(y), as_planes(x)), as_planes(weight))
    return field.add(as_planes(x), step)


@handles("zeros_like", "new_zeros")
def _zeros(context: Context, x: Value, size: Sequence[int] | None = None, **options: Any) -> Tensor:
    return torch.zeros(x.shape if size is None else size, dtype=options.get("dtype") or x.dtype)


@handles("ones_like", "new_ones")
def _ones(context: Context, x: Value, size: Sequence[int] | None = None, **options: Any) -> Tensor:
    return torch.ones(x.shape if size is None else size, dtype=options.get("dtype") or x.dtype)


@handles("full_like")
def _full_like(context: Context, x: Value, value: float, **options: Any) -> Tensor:
    return torch.full(x.shape, value, dtype=options.get("dtype") or x.dtype)


@handles("new_full")
def _new_full(context: Context, x: Value, size: Sequence[int], value: float, **options: Any) -> Tensor:
    return torch.full(size, value, dtype=options.get("dtype") or x.dtype)
