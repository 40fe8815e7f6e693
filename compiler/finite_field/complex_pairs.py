"""Complex numbers as pairs of residues: what rules that multiply complex numbers are proved with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewright.compiler.finite_field import planes as field
from tilewright.compiler.finite_field.planes import OutOfScope, Planes
from tilewright.compiler.finite_field.value import PAIRS, Context, H, Value, as_planes, join, part


def pairs(name: str) -> Callable[[H], H]:
    """Register what an ATen op does with complex Values."""

    def register(handler: H) -> H:
        PAIRS[f"aten::{name}"] = handler
        return handler

    return register


@pairs("view_as_complex")
def _view_as_complex(context: Context, x: Value) -> Value:
    label = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    return Value(x.planes, label, context.key)


@pairs("view_as_real")
def _view_as_real(context: Context, x: Value) -> Value:
    return Value(x.planes, torch.float64 if x.dtype == torch.complex128 else torch.float32, context.key)


@pairs("mul")
def _mul(context: Context, x: object, y: object) -> Value:
    if isinstance(x, complex) or isinstance(y, complex):
        raise OutOfScope("a complex number as a constant")
    (a, b), (c, d) = _parts(x), _parts(y)
    real = field.subtract(field.multiply(a, c), field.multiply(b, d))
    imaginary = field.add(field.multiply(a, d), field.multiply(b, c))
    label = torch.float64 if context.dtype == torch.complex128 else torch.float32
    return join([Value(planes, label, context.key) for planes in (real, imaginary)])


def _parts(x: object) -> tuple[Planes, Planes]:
    """Real and imaginary part; those of a real operand are itself and zero."""
    whole = as_planes(part(x, 0))
    if isinstance(x, Value) and x.dtype.is_complex:
        return whole, as_planes(part(x, 1))
    return whole, field.each(torch.zeros_like, whole)
