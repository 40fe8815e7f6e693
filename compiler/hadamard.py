"""Hadamard matrices of the sizes that models have, and their fast transform.

A Hadamard matrix has entries +1 and -1 and orthogonal rows. One of order n exists only for n = 1, 2 or a
multiple of 4. Order n = K P is built as H_K x H_P (Kronecker): P is a power of two with Sylvester's matrix,
K the smallest order with the odd part of n that one of Paley's two constructions over GF(q) gives:
576 = 36 * 16, 1536 = 12 * 128, 11008 = 344 * 32. A size without such a K gets blocks of its largest power
of two. H_12 is not symmetric: `x H` and `x H^T` differ, and every user of this file means `x H`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ORDER = 1024
"""Largest base order that is looked for: its matrix is held and applied densely."""
MIN_BLOCK = 16
"""Smallest block of the block-diagonal fallback; smaller ones mix too few channels to be worth it."""


@dataclass(frozen=True)
class HadamardPlan:
    """How a transform of `size` channels is built: blocks of `block` = base order * power of two."""

    size: int
    block: int
    """Channels mixed together: `size`, or a divisor of it where no matrix of the whole order is known."""
    base: int
    """Order K of the dense factor; 1 when the block is a power of two."""

    @property
    def sylvester(self) -> int:
        """Order P of the power-of-two factor."""
        return self.block // self.base

    @property
    def scale(self) -> float:
        """1 / sqrt(block): makes the transform orthogonal."""
        return 1.0 / math.sqrt(self.block)


@functools.lru_cache(maxsize=1024)
def plan_for(size: int, min_block: int = MIN_BLOCK) -> HadamardPlan | None:
    """The plan for a number of channels; None when not even blocks of `min_block` divide it."""
    if size < 1:
        return None
    base = find_base(size)
    if base is not None:
        return HadamardPlan(size, size, base)
    block = size & -size
    return HadamardPlan(size, block, 1) if block >= min_block else None


def find_base(size: int) -> int | None:
    """The smallest order K with size / K a power of two for which a matrix can be built, or None."""
    odd = size // (size & -size)
    if odd == 1:
        return 1
    order = 4 * odd
    while order <= min(size, MAX_ORDER):
        if size % order == 0 and _paley_field(order) is not None:
            return order
        order *= 2
    return None


@functools.lru_cache(maxsize=32)
def base_matrix(order: int) -> Tensor:
    """The +1/-1 matrix [order, order] in float32 of an order that `find_base` returns; do not write to it."""
    if order == 1:
        return torch.ones(1, 1)
    found = _paley_field(order)
    if found is None:
        raise ValueError(f"order = {order}: no Paley construction gives a Hadamard matrix of this order")
    kind, prime, degree = found
    conference = _jacobsthal(prime, degree)
    matrix = _paley_one(conference) if kind == 1 else _paley_two(conference)
    return matrix.float()


def sylvester_matrix(order: int) -> Tensor:
    """Sylvester's matrix of a power-of-two order, float32 [order, order]."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def dense(plan: HadamardPlan, signs: Tensor | None = None) -> Tensor:
    """The orthogonal matrix [size, size] in float64 that `transform` applies to rows."""
    block = torch.kron(base_matrix(plan.base), sylvester_matrix(plan.sylvester)).double()
    whole: Tensor = torch.block_diag(*[block] * (plan.size // plan.block)) * plan.scale
    return whole if signs is None else signs.double()[:, None] * whole


def random_signs(size: int, seed: int) -> Tensor:
    """`size` random values +1 or -1 in float32: diag(signs) H is the randomised Hadamard matrix of QuaRot."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


def transform(
    x: Tensor, block: int, base: Tensor | None = None, signs: Tensor | None = None, inverse: bool = False
) -> Tensor:
    """x diag(signs) H / sqrt(block), or its inverse x H^T diag(signs) / sqrt(block), along the last axis.

    x [..., D] with `block` dividing D; base [K, K] is the dense factor (None: block is a power of two);
    signs [D]. H = base x Sylvester, repeated for each block of channels. Cost: D (K + log2 P) additions.
    """
    size = x.shape[-1]
    order = 1 if base is None else base.shape[0]
    power = block // order
    if signs is not None and not inverse:
        x = x * signs.to(x.dtype)
    lead = list(x.shape[:-1])
    y = x.reshape(*lead, size // block, order, power)
    width = 1
    while width < power:
        y = y.reshape(*lead, size // block, order, power // (2 * width), 2, width)
        low, high = y.select(-2, 0), y.select(-2, 1)
        y = torch.stack((low + high, low - high), -2)
        width *= 2
    y = y.reshape(*lead, size // block, order, power)
    if base is not None:
        factor = base.to(y.dtype)
        y = torch.matmul(factor if inverse else factor.t(), y)
    y = y.reshape(*lead, size) * (1.0 / math.sqrt(block))
    return y * signs.to(y.dtype) if signs is not None and inverse else y


def transform_rows(x: Tensor, block: int, base: Tensor | None, signs: Tensor | None) -> Tensor:
    """What `transform` computes, by two matrix products: faster on the large matrices of offline rotation."""
    order = 1 if base is None else base.shape[0]
    power = block // order
    y = x if signs is None else x * signs.to(x.dtype)
    if power > 1:
        y = torch.matmul(y.reshape(-1, power), sylvester_matrix(power).to(x.dtype))
    if base is not None:
        across = y.reshape(-1, order, power).transpose(1, 2).reshape(-1, order)
        y = torch.matmul(across, base.to(x.dtype)).reshape(-1, power, order).transpose(1, 2)
    return y.reshape(x.shape) * (1.0 / math.sqrt(block))


def _paley_field(order: int) -> tuple[int, int, int] | None:
    """(construction, prime, degree) of the field GF(q) behind an order: q = order - 1 or order/2 - 1."""
    if order % 4:
        return None
    for kind, q, rest in ((1, order - 1, 3), (2, order // 2 - 1, 1)):
        power = _prime_power(q)
        if power is not None and q % 4 == rest:
            return kind, *power
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    if q < 2:
        return None
    prime = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    degree, left = 0, q
    while left % prime == 0:
        left, degree = left // prime, degree + 1
    return (prime, degree) if left == 1 else None


def _paley_one(jacobsthal: Tensor) -> Tensor:
    """I + [[0, 1], [-1, Q]]: order q + 1 for q = 3 mod 4."""
    q = jacobsthal.shape[0]
    skew = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
    return skew + torch.eye(q + 1, dtype=torch.int64)


def _paley_two(jacobsthal: Tensor) -> Tensor:
    """C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]], C = [[0, 1], [1, Q]]: order 2 (q + 1), q = 1 mod 4."""
    q = jacobsthal.shape[0]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, jacobsthal
    identity = torch.eye(q + 1, dtype=torch.int64)
    return torch.kron(conference, torch.tensor([[1, 1], [1, -1]])) + torch.kron(
        identity, torch.tensor([[1, -1], [-1, -1]])
    )


def _jacobsthal(prime: int, degree: int) -> Tensor:
    """Q[a, b]: 1 where a - b is a nonzero square of GF(prime^degree), -1 where it is none, 0 where a = b."""
    elements = list(itertools.product(range(prime), repeat=degree))
    modulus = _irreducible(prime, degree)
    squares = {_multiply(e, e, prime, modulus) for e in elements if any(e)}
    character = {e: (1 if e in squares else -1) if any(e) else 0 for e in elements}
    rows = [
        [character[tuple((x - y) % prime for x, y in zip(a, b, strict=True))] for b in elements]
        for a in elements
    ]
    return torch.tensor(rows)


def _multiply(
    a: tuple[int, ...], b: tuple[int, ...], prime: int, modulus: tuple[int, ...]
) -> tuple[int, ...]:
    """Product of two field elements, lowest coefficient first; `modulus` is x^degree in that form."""
    degree = len(a)
    product = [0] * (2 * degree - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    for top in range(2 * degree - 2, degree - 1, -1):
        for k in range(degree):
            product[top - degree + k] += product[top] * modulus[k]
    return tuple(c % prime for c in product[:degree])


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """x^degree modulo an irreducible monic polynomial, lowest coefficient first.

    The test is on the Frobenius orbit of x, which is as long as the degree for irreducible polynomials only,
    up to degree 5; no order up to `MAX_ORDER` needs a higher one.
    """
    if degree == 1:
        return (0,)
    for candidate in itertools.product(range(prime), repeat=degree):
        if _has_no_factor(candidate, prime, degree):
            return candidate
    raise AssertionError("an irreducible polynomial of every degree exists")


def _has_no_factor(modulus: tuple[int, ...], prime: int, degree: int) -> bool:
    """True when taking x to the power of the prime gives x again after `degree` steps and not before."""
    x = tuple(1 if i == 1 else 0 for i in range(degree))
    power = x
    for step in range(1, degree + 1):
        power = _power(power, prime, prime, modulus)
        if power == x:
            return step == degree
    return False


def _power(element: tuple[int, ...], exponent: int, prime: int, modulus: tuple[int, ...]) -> tuple[int, ...]:
    result = element
    for _ in range(exponent - 1):
        result = _multiply(result, element, prime, modulus)
    return result
