"""The number that identity testing computes with: one real tensor seen through residues.

Axioms that hold exactly: those of a field, exp(x + y) = exp(x) exp(y) and exp(0) = 1, exp(log(x)) = x,
exp(-inf) = 0, and those of a total order. Everything else (rsqrt, erf, sin, rounding, ...) is an arbitrary
function of its argument: a rule that moves or shares it is accepted, a rule that changes its argument is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.compiler.finite_field import residues
from tilewright.compiler.finite_field.residues import P, Q

_LARGEST_MULTIPLE = 16


class OutOfScope(Exception):
    """The function uses something that residues cannot express; the text says what."""


class Redraw(Exception):
    """This draw hit a division by zero: draw again."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Residues of one real tensor; all planes have its shape."""

    p: Tensor
    """int64 mod P: the value. Two values are equal when these are."""
    q: Tensor | None = None
    """int64 mod Q: the same value as an exponent; absent behind an exponential."""
    e: Tensor | None = None
    """int64 mod P: exp of the value, kept where q is absent but exp is known (after a logarithm)."""
    inf: Tensor | None = None
    """bool: where the value is -inf; the other planes hold 0 there."""

    @property
    def shape(self) -> torch.Size:
        return self.p.shape


def lift(value: object) -> Planes:
    """Planes of a Python number or of a real tensor; very negative numbers (mask fill values) are -inf."""
    if isinstance(value, bool | int | float):
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    if not isinstance(value, Tensor) or value.is_complex():
        raise OutOfScope(f"a {type(value).__name__} as a number")
    inf = None
    if value.is_floating_point():
        low = value <= _mask_fill(value.dtype)
        if bool(low.any()):
            inf, value = low, value.masked_fill(low, 0.0)
        if not bool(torch.isfinite(value).all()):
            raise OutOfScope("a constant that is +inf or nan")
    return Planes(residues.constants(value, P), residues.constants(value, Q), None, inf)


def _mask_fill(dtype: torch.dtype) -> float:
    """finfo.min of the dtype, or that of float32 for the wider ones: what models add to masked scores."""
    return max(torch.finfo(dtype).min, -1e38)


def unify(values: Sequence[Planes]) -> list[Planes]:
    """The same values with the same planes present, so that they can be joined in one tensor."""
    with_q = all(value.q is not None for value in values)
    exps = [None] * len(values) if with_q else [known_exp(value) for value in values]
    with_e = not with_q and all(exp is not None for exp in exps)
    with_inf = any(value.inf is not None for value in values)
    return [
        Planes(
            value.p,
            value.q if with_q else None,
            exp if with_e else None,
            (torch.zeros_like(value.p, dtype=torch.bool) if value.inf is None else value.inf)
            if with_inf
            else None,
        )
        for value, exp in zip(values, exps, strict=True)
    ]


def known_exp(x: Planes) -> Tensor | None:
    """exp(x) mod P where the exponential law holds, without regard to -inf; None behind another exp."""
    return residues.exponential(x.q) if x.q is not None else x.e


def each(function: Callable[[Tensor], Tensor], x: Planes) -> Planes:
    """Data movement: apply `function` to every plane."""
    q, e, inf = (None if plane is None else function(plane) for plane in (x.q, x.e, x.inf))
    return Planes(function(x.p), q, e, inf)


def select(keep: Tensor, x: Planes, y: Planes) -> Planes:
    """where(keep, x, y) with broadcasting."""
    x, y = unify((x, y))
    q, e, inf = (
        None if one is None or other is None else torch.where(keep, one, other)
        for one, other in ((x.q, y.q), (x.e, y.e), (x.inf, y.inf))
    )
    return Planes(torch.where(keep, x.p, y.p), q, e, inf)


def add(x: Planes, y: Planes) -> Planes:
    q = None if x.q is None or y.q is None else (x.q + y.q) % Q
    e = None
    if q is None:
        left, right = known_exp(x), known_exp(y)
        e = None if left is None or right is None else left * right % P
    return _masked(Planes((x.p + y.p) % P, q, e), x.inf, y.inf)


def negate(x: Planes) -> Planes:
    refuse_inf(x, "the negative of -inf")
    e = None
    if x.q is None and x.e is not None:
        e = _inverse(x.e, P)
    return Planes(-x.p % P, None if x.q is None else -x.q % Q, e)


def subtract(x: Planes, y: Planes) -> Planes:
    return add(x, negate(y))


def multiply(x: Planes, y: Planes, positive: bool = False) -> Planes:
    """x * y; -inf is allowed in x alone and only where y is known to be positive."""
    if not positive:
        refuse_inf(x, "-inf times a value of unknown sign")
    refuse_inf(y, "-inf as a factor")
    q = None if x.q is None or y.q is None else x.q * y.q % Q
    e = _exp_of_multiple(x, y)
    return _masked(Planes(x.p * y.p % P, q, _exp_of_multiple(y, x) if e is None else e), x.inf, None)


def _exp_of_multiple(x: Planes, factor: Planes) -> Tensor | None:
    """exp(k x) = exp(x)^k where exp of x is kept and the factor is one small whole number k, else None."""
    if x.e is None or factor.q is None or factor.q.numel() != 1 or factor.q.dim() > x.p.dim():
        return None
    count = int(factor.q)
    if not 0 < count <= _LARGEST_MULTIPLE or int(factor.p) != count:
        return None
    power = x.e
    for _ in range(count - 1):
        power = power * x.e % P
    return power


def reciprocal(x: Planes) -> Planes:
    refuse_inf(x, "the reciprocal of -inf")
    return Planes(_inverse(x.p, P), None if x.q is None else _inverse(x.q, Q))


def exp(x: Planes, key: str) -> Planes:
    """exp(x); behind another exponential it is an arbitrary function, as its laws cannot be kept there."""
    value = known_exp(x)
    if value is None:
        value = residues.keyed_hash(x.p, f"{key}:exp", P)
    return Planes(value if x.inf is None else value.masked_fill(x.inf, 0))


def log(x: Planes, key: str) -> Planes:
    """log(x), of which exp is known again; log(0) = -inf."""
    refuse_inf(x, "the logarithm of -inf")
    zero = x.p == 0
    value = residues.keyed_hash(x.p, f"{key}:log", P).masked_fill(zero, 0)
    return Planes(value, None, x.p, zero if bool(zero.any()) else None)


def arbitrary(name: str, arguments: Sequence[Planes], key: str) -> Planes:
    """A function without laws of one or more broadcast arguments; has a q plane if all of them do."""
    for argument in arguments:
        refuse_inf(argument, f"{name} of -inf")

    def mix(planes: Sequence[Tensor], modulus: int) -> Tensor:
        mixed = residues.keyed_hash(planes[0], f"{key}:{name}", modulus)
        for index, plane in enumerate(planes[1:]):
            mixed = residues.keyed_hash((mixed * 3 + plane) % modulus, f"{key}:{name}:{index}", modulus)
        return mixed

    exponents = [argument.q for argument in arguments if argument.q is not None]
    q = mix(exponents, Q) if len(exponents) == len(arguments) else None
    return Planes(mix([argument.p for argument in arguments], P), q)


def total(x: Planes, dims: list[int], keepdim: bool) -> Planes:
    """Sum over `dims` (all axes when empty)."""
    refuse_inf(x, "a sum over -inf")
    axes = dims or list(range(x.p.dim()))
    if not axes:
        return x
    return Planes(x.p.sum(axes, keepdim) % P, None if x.q is None else x.q.sum(axes, keepdim) % Q)


def matmul(x: Planes, y: Planes) -> Planes:
    refuse_inf(x, "-inf in a matrix product")
    refuse_inf(y, "-inf in a matrix product")
    q = None if x.q is None or y.q is None else residues.matmul(x.q, y.q, Q)
    return Planes(residues.matmul(x.p, y.p, P), q)


def softmax(x: Planes, dim: int, key: str) -> Planes:
    """exp(x) / sum exp(x); a row that is -inf throughout gives 0, as attention defines it."""
    weights = exp(x, key).p
    norm = weights.sum(dim, keepdim=True) % P
    if x.inf is not None:
        empty = x.inf.all(dim, keepdim=True)
        norm = norm.masked_fill(empty, 1)
    return Planes(weights * _inverse(norm, P) % P)


def order(x: Planes, key: str) -> Tensor:
    """int64 whose order is an arbitrary total order of values, -inf first: maxima and sorting use it."""
    rank = residues.keyed_hash(x.p, f"{key}:order", P)
    return rank if x.inf is None else rank.masked_fill(x.inf, -1)


def extremum(x: Planes, dim: int, keepdim: bool, key: str, largest: bool) -> Planes:
    """max or min over one axis in the arbitrary order."""
    rank = order(x, key)
    chosen = rank.argmax(dim, keepdim=True) if largest else rank.argmin(dim, keepdim=True)
    found = each(lambda plane: plane.gather(dim, chosen), x)
    return found if keepdim else each(lambda plane: plane.squeeze(dim), found)


def refuse_inf(x: Planes, what: str) -> None:
    if x.inf is not None and bool(x.inf.any()):
        raise OutOfScope(what)


def _inverse(x: Tensor, modulus: int) -> Tensor:
    if bool((x == 0).any()):
        raise Redraw
    return residues.inverse(x, modulus)


def _masked(value: Planes, *masks: Tensor | None) -> Planes:
    present = [mask for mask in masks if mask is not None]
    if not present:
        return value
    inf = torch.zeros_like(value.p, dtype=torch.bool)
    for mask in present:
        inf = inf | mask
    q, e = (None if plane is None else plane.masked_fill(inf, 0) for plane in (value.q, value.e))
    return Planes(value.p.masked_fill(inf, 0), q, e, inf)
