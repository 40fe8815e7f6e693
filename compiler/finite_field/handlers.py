"""The ATen ops with laws: arithmetic, exponentials, reductions, products, order and normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tilewright.compiler.finite_field import planes as field
from tilewright.compiler.finite_field import residues
from tilewright.compiler.finite_field.planes import OutOfScope, Planes
from tilewright.compiler.finite_field.residues import Q
from tilewright.compiler.finite_field.value import HANDLERS, Context, H, Handler, Value, as_planes


def handles(*names: str) -> Callable[[H], H]:
    """Register a handler for ATen ops by name."""

    def register(handler: H) -> H:
        for name in names:
            HANDLERS[f"aten::{name}"] = handler
        return handler

    return register


def _is_positive(argument: object) -> bool:
    if isinstance(argument, bool | int | float):
        return argument > 0
    return isinstance(argument, Tensor) and not isinstance(argument, Value) and bool((argument > 0).all())


@handles("add")
def _add(context: Context, x: object, y: object, alpha: float = 1) -> Planes:
    right = as_planes(y)
    return field.add(
        as_planes(x), right if alpha == 1 else field.multiply(right, field.lift(alpha), alpha > 0)
    )


@handles("sub")
def _sub(context: Context, x: object, y: object, alpha: float = 1) -> Planes:
    right = as_planes(y)
    return field.subtract(as_planes(x), right if alpha == 1 else field.multiply(right, field.lift(alpha)))


@handles("rsub")
def _rsub(context: Context, x: object, y: object, alpha: float = 1) -> Planes:
    return _sub(context, y, x, alpha)


@handles("neg")
def _neg(context: Context, x: object) -> Planes:
    return field.negate(as_planes(x))


@handles("mul")
def _mul(context: Context, x: object, y: object) -> Planes:
    left, right = as_planes(x), as_planes(y)
    if right.inf is not None:
        x, y, left, right = y, x, right, left
    return field.multiply(left, right, _is_positive(y))


@handles("div", "true_divide")
def _div(context: Context, x: object, y: object, rounding_mode: str | None = None) -> Planes:
    if rounding_mode is not None:
        raise OutOfScope(f"division with rounding {rounding_mode!r}")
    return field.multiply(as_planes(x), field.reciprocal(as_planes(y)), _is_positive(y))


@handles("reciprocal")
def _reciprocal(context: Context, x: object) -> Planes:
    return field.reciprocal(as_planes(x))


@handles("square")
def _square(context: Context, x: object) -> Planes:
    return field.multiply(as_planes(x), as_planes(x))


@handles("sqrt")
def _sqrt(context: Context, x: object) -> Planes:
    return root(as_planes(x), context.key)


@handles("rsqrt")
def _rsqrt(context: Context, x: object) -> Planes:
    return field.reciprocal(root(as_planes(x), context.key))


def root(x: Planes, key: str) -> Planes:
    return field.arbitrary("sqrt", [x], key)


@handles("pow")
def _pow(context: Context, x: object, exponent: object) -> Planes:
    if isinstance(exponent, float) and abs(exponent) == 0.5:
        found = root(as_planes(x), context.key)
        return found if exponent > 0 else field.reciprocal(found)
    if isinstance(exponent, int | float) and float(exponent).is_integer() and abs(exponent) <= 64:
        base = as_planes(x)
        result = field.lift(torch.ones(base.shape, dtype=torch.int64))
        for _ in range(abs(int(exponent))):
            result = field.multiply(result, base)
        return field.reciprocal(result) if exponent < 0 else result
    return field.arbitrary("pow", [as_planes(x), as_planes(exponent)], context.key)


@handles("exp")
def _exp(context: Context, x: object) -> Planes:
    return field.exp(as_planes(x), context.key)


@handles("log")
def _log(context: Context, x: object) -> Planes:
    return field.log(as_planes(x), context.key)


@handles("sigmoid")
def _sigmoid(context: Context, x: object) -> Planes:
    bottom = field.add(field.exp(field.negate(as_planes(x)), context.key), field.lift(1))
    return field.reciprocal(bottom)


@handles("silu")
def _silu(context: Context, x: object) -> Planes:
    return field.multiply(as_planes(x), _sigmoid(context, x))


@handles("tanh")
def _tanh(context: Context, x: object) -> Planes:
    """1 - 2 / (1 + exp(2 x)); an arbitrary exponent, so that a softmax of capped scores keeps its laws."""
    value = as_planes(x)
    bottom = field.add(field.exp(field.add(value, value), context.key), field.lift(1))
    p = field.subtract(field.lift(1), field.multiply(field.lift(2), field.reciprocal(bottom))).p
    q = None if value.q is None else residues.keyed_hash(value.q, f"{context.key}:tanh", Q)
    return Planes(p, q)


@handles("gelu")
def _gelu(context: Context, x: Value, approximate: str = "none") -> Planes:
    """By definition, with the constants of aten, so that the spelled-out forms are equal to it."""
    if approximate == "tanh":
        inner = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        inner = torch.erf(x * math.sqrt(0.5))
    return as_planes(0.5 * x * (1 + inner))


@handles("relu")
def _relu(context: Context, x: object) -> Planes:
    return maximum(context, x, 0)


@handles("maximum", "clamp_min")
def maximum(context: Context, x: object, y: object) -> Planes:
    left, right = as_planes(x), as_planes(y)
    return field.select(field.order(left, context.key) >= field.order(right, context.key), left, right)


@handles("minimum", "clamp_max")
def minimum(context: Context, x: object, y: object) -> Planes:
    left, right = as_planes(x), as_planes(y)
    return field.select(field.order(left, context.key) <= field.order(right, context.key), left, right)


@handles("clamp")
def _clamp(context: Context, x: object, min: object = None, max: object = None) -> Planes:  # noqa: A002
    value = as_planes(x)
    low, high = (None if bound is None else as_planes(bound) for bound in (min, max))
    if low is not None:
        value = field.select(field.order(value, context.key) >= field.order(low, context.key), value, low)
    if high is not None:
        value = field.select(field.order(value, context.key) <= field.order(high, context.key), value, high)
    return value


def _compare(test: Callable[[Tensor, Tensor], Tensor]) -> Handler:
    def handler(context: Context, x: object, y: object) -> Tensor:
        return test(*(field.order(as_planes(side), context.key) for side in (x, y)))

    return handler


for _name, _test in (
    ("eq", torch.eq),
    ("ne", torch.ne),
    ("lt", torch.lt),
    ("le", torch.le),
    ("gt", torch.gt),
    ("ge", torch.ge),
):
    HANDLERS[f"aten::{_name}"] = _compare(_test)


@handles("isneginf", "isinf")
def _isinf(context: Context, x: object) -> Tensor:
    value = as_planes(x)
    return torch.zeros_like(value.p, dtype=torch.bool) if value.inf is None else value.inf


@handles("isnan")
def _isnan(context: Context, x: object) -> Tensor:
    return torch.zeros(as_planes(x).shape, dtype=torch.bool)


@handles("nan_to_num")
def _nan_to_num(
    context: Context, x: object, nan: object = None, posinf: object = None, neginf: object = None
) -> Planes:
    field.refuse_inf(as_planes(x), "nan_to_num of -inf")
    return as_planes(x)


@handles("where")
def _where(context: Context, keep: object, x: object, y: object) -> Planes:
    if isinstance(keep, Value) or not isinstance(keep, Tensor):
        raise OutOfScope("where with a condition that is not boolean data")
    return field.select(keep, as_planes(x), as_planes(y))


@handles("masked_fill")
def _masked_fill(context: Context, x: object, mask: object, value: object) -> Planes:
    return _where(context, mask, value, x)
