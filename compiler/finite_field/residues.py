"""Arithmetic modulo two fixed primes on int64 tensors, and exact residues for Python and float constants.

P = 2 Q + 1 is a safe prime, so 4 (a square) generates the subgroup of order Q of the units mod P and
b -> 4^b maps sums mod Q to products mod P: an exponential. Both primes have 31 bits, so a product of two
residues fits int64, and both are 7 mod 8, so sqrt(2) exists in both fields.
"""

from __future__ import annotations

import functools
import hashlib
import math
from fractions import Fraction

import torch
from torch import Tensor

P = 2147480927
Q = 1073740463
_HALF = 15
"""An exponent below Q < 2^30 is split in two halves of this many bits for the table of powers."""
_LARGEST_ROOT = 65536
"""sqrt(n) and 1/sqrt(n) are recognised for n up to this: head sizes, hidden sizes, Hadamard sizes."""
_LARGEST_DENOMINATOR = 4096


def matmul(x: Tensor, y: Tensor, modulus: int) -> Tensor:
    """x [..., M, K] @ y [..., K, N] of residues in [0, modulus), int64, exact for K up to 2^20.

    Each factor is cut into 16-bit halves whose products stay below 2^32, so a float64 BLAS sums them exactly.
    """
    high_x, low_x = (x >> 16).double(), (x & 0xFFFF).double()
    high_y, low_y = (y >> 16).double(), (y & 0xFFFF).double()
    high = torch.matmul(high_x, high_y).long() % modulus
    middle = (torch.matmul(high_x, low_y) + torch.matmul(low_x, high_y)).long() % modulus
    low = torch.matmul(low_x, low_y).long()
    return ((((high << 16) + middle) % modulus << 16) + low) % modulus


def inverse(x: Tensor, modulus: int) -> Tensor:
    """Elementwise modular inverse of nonzero residues, by products of pairs (Montgomery's trick)."""
    flat = x.reshape(-1)
    if flat.numel() <= 16:
        values = [pow(int(value), -1, modulus) for value in flat.tolist()]
        return torch.tensor(values, dtype=torch.int64).reshape(x.shape)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_ones(1)))
    even, odd = flat[0::2], flat[1::2]
    pair = inverse(even * odd % modulus, modulus)
    both = torch.stack((pair * odd % modulus, pair * even % modulus), -1)
    return both.reshape(-1)[: x.numel()].reshape(x.shape)


@functools.cache
def _power_tables() -> tuple[Tensor, Tensor]:
    def powers(base: int) -> Tensor:
        row = [1]
        for _ in range((1 << _HALF) - 1):
            row.append(row[-1] * base % P)
        return torch.tensor(row, dtype=torch.int64)

    return powers(4), powers(pow(4, 1 << _HALF, P))


def exponential(exponent: Tensor) -> Tensor:
    """4^exponent mod P, elementwise, for residues mod Q."""
    low, high = _power_tables()
    return low[exponent & ((1 << _HALF) - 1)] * high[exponent >> _HALF] % P


def keyed_hash(x: Tensor, key: str, modulus: int) -> Tensor:
    """An arbitrary fixed function of one residue, chosen by `key`: a function with no known laws."""
    digest = hashlib.blake2b(f"{key}:{modulus}".encode(), digest_size=24).digest()
    keys = [int.from_bytes(digest[at : at + 4], "little") % modulus for at in range(0, 24, 4)]
    mixed = (x * (keys[0] | 1) + keys[1]) % modulus
    for multiplier, offset, shift in ((keys[2] | 1, keys[3], 13), (keys[4] | 1, keys[5], 17)):
        mixed = ((mixed ^ (mixed >> shift)) % modulus * multiplier + offset) % modulus
    return mixed


def draw(shape: tuple[int, ...], modulus: int, generator: torch.Generator) -> Tensor:
    """Uniform residues, int64."""
    return torch.randint(0, modulus, shape, generator=generator, dtype=torch.int64)


@functools.lru_cache(maxsize=4096)
def constant(value: float, modulus: int, dtype: torch.dtype = torch.float64) -> int:
    """The residue of a finite number that was written in `dtype`.

    Integers and floats map to their exact rational value, with two exceptions that undo the rounding of
    common constants: a float that is the nearest one to a fraction of small denominator is that fraction
    (1/3, 0.1), and one within 4 units of the last place of sqrt(n) or 1/sqrt(n) is that root, so that
    1/sqrt(8) squared is 1/8. Constants that differ by more than rounding stay different.
    """
    if isinstance(value, int):
        return value % modulus
    exact = Fraction(value)
    if exact.denominator == 1:
        return exact.numerator % modulus
    narrow = dtype != torch.float64
    near = exact.limit_denominator(64 if narrow else _LARGEST_DENOMINATOR)
    if torch.tensor(float(near), dtype=dtype).item() == value:
        return _ratio(near, modulus)
    root = _near_root(value, torch.finfo(dtype).eps, 256 if narrow else _LARGEST_ROOT)
    if root is not None:
        number, inverted = root
        residue = _root_of_integer(number, modulus)
        residue = pow(residue, -1, modulus) if inverted else residue
        return residue if value > 0 else -residue % modulus
    return _ratio(exact, modulus)


def constants(values: Tensor, modulus: int) -> Tensor:
    """The residues of a real tensor of finite numbers, elementwise as `constant`."""
    if not values.is_floating_point():
        return values.long() % modulus
    distinct, place = torch.unique(values.double(), return_inverse=True)
    if distinct.numel() <= 256:
        found = [constant(value, modulus, values.dtype) for value in distinct.tolist()]
        return torch.tensor(found, dtype=torch.int64)[place].reshape(values.shape)
    mantissa, exponent = torch.frexp(values.double())
    whole = (mantissa * 2.0**53).long() % modulus
    steps, where = torch.unique(exponent.long() - 53, return_inverse=True)
    scale = torch.tensor([pow(2, step, modulus) for step in steps.tolist()], dtype=torch.int64)[where]
    return whole * scale.reshape(values.shape) % modulus


def _ratio(value: Fraction, modulus: int) -> int:
    return value.numerator * pow(value.denominator, -1, modulus) % modulus


def _near_root(value: float, eps: float, largest: int) -> tuple[int, bool] | None:
    square = value * value
    for candidate, inverted in ((square, False), (1.0 / square if square > 0.0 else 0.0, True)):
        if not 1.5 < candidate < largest + 0.5:
            continue
        number = round(candidate)
        if abs(candidate / number - 1.0) <= 4 * eps and math.isqrt(number) ** 2 != number:
            return number, inverted
    return None


@functools.lru_cache(maxsize=1024)
def _root_of_integer(number: int, modulus: int) -> int:
    """sqrt(number) as a product over prime factors, so that sqrt(a) sqrt(b) = sqrt(a b) always holds."""
    residue, factor = 1, 2
    while number > 1:
        if factor * factor > number:
            factor = number
        count = 0
        while number % factor == 0:
            number //= factor
            count += 1
        residue = residue * pow(factor, count // 2, modulus) % modulus
        if count % 2:
            residue = residue * _root_of_prime(factor, modulus) % modulus
        factor += 1
    return residue


def _root_of_prime(prime: int, modulus: int) -> int:
    """The root that is itself a square; an arbitrary fixed residue when the prime has no root."""
    root = pow(prime, (modulus + 1) // 4, modulus)
    if root * root % modulus == prime % modulus:
        return root
    return int(keyed_hash(torch.tensor(prime), "square root", modulus).item()) or 1
