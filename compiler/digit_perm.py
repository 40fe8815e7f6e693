"""Token permutations that need no table: digits of a mixed-radix index written in another order.

Almost every token order of the video attention papers is one: tiles of a grid, the axes of a grid in another
order, all frames of one pixel together. A kernel turns a slot into a token by divisions and remainders
instead of a gather through memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from tilewright.compiler.diagnostics import OptionError

Index = TypeVar("Index", int, torch.Tensor)


@dataclass(frozen=True)
class DigitPerm:
    """A permutation of prod(radices) tokens.

    A token index has one digit per radix, most significant first. Slots count the same digits in the order
    `order`: digit `order[0]` of the token is the most significant digit of its slot.
    """

    radices: tuple[int, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(type(r) is int and r >= 1 for r in self.radices):
            raise OptionError(f"radices = {self.radices!r}: expected whole numbers from 1")
        if sorted(self.order) != list(range(len(self.radices))):
            raise OptionError(
                f"order = {self.order!r}: expected each of 0..{len(self.radices) - 1} once, one per radix"
            )

    @classmethod
    def identity(cls, tokens: int) -> DigitPerm:
        """The permutation of `tokens` tokens that moves none."""
        return cls((tokens,), (0,))

    @property
    def size(self) -> int:
        """How many tokens it permutes."""
        return math.prod(self.radices)

    @property
    def is_identity(self) -> bool:
        return len(self.simplified().radices) <= 1

    def source(self, slot: Index) -> Index:
        """The token that stands at a slot; an int, or elementwise over an integer tensor."""
        weights = _weights(self.radices)
        token = slot * 0
        for digit in reversed(self.order):
            token = token + slot % self.radices[digit] * weights[digit]
            slot = slot // self.radices[digit]
        return token

    def slot(self, token: Index) -> Index:
        """The slot at which a token stands: the inverse of `source`."""
        return self.inverse().source(token)

    def inverse(self) -> DigitPerm:
        """The permutation with `inverse().source(s) == slot(s)`."""
        back = [0] * len(self.order)
        for place, digit in enumerate(self.order):
            back[digit] = place
        return DigitPerm(tuple(self.radices[d] for d in self.order), tuple(back))

    def product(self, inner: DigitPerm) -> DigitPerm:
        """This one over groups of `inner.size` tokens, and `inner` within each group."""
        shift = len(self.radices)
        return DigitPerm(self.radices + inner.radices, self.order + tuple(o + shift for o in inner.order))

    def then(self, after: DigitPerm) -> DigitPerm:
        """First this one, then `after` on its slots: source(s) == self.source(after.source(s)).

        OptionError when the digits of one cannot be cut along those of the other, so that the result is no
        permutation of digits.
        """
        if after.size != self.size:
            raise OptionError(f"after.size = {after.size}: expected {self.size}, the tokens permuted so far")
        middle = tuple(self.radices[d] for d in self.order)
        cuts = sorted({*_weights(middle), *_weights(after.radices), self.size})
        if any(high % low for low, high in itertools.pairwise(cuts)):
            raise OptionError(
                f"radices {middle} and {after.radices} have no common refinement: "
                "the two permutations together are no permutation of digits"
            )
        first, second = self.inverse()._refined(cuts).inverse(), after._refined(cuts)
        return DigitPerm(first.radices, tuple(first.order[o] for o in second.order)).simplified()

    def simplified(self) -> DigitPerm:
        """The same permutation with as few digits as possible: its address arithmetic is the shortest."""
        kept = [d for d in range(len(self.radices)) if self.radices[d] > 1]
        order = [d for d in self.order if self.radices[d] > 1]
        runs: list[list[int]] = []
        for digit in order:
            if runs and kept.index(digit) == kept.index(runs[-1][-1]) + 1:
                runs[-1].append(digit)
            else:
                runs.append([digit])
        ranked = sorted(runs)
        radices = tuple(math.prod(self.radices[d] for d in run) for run in ranked)
        return DigitPerm(radices or (1,), tuple(ranked.index(run) for run in runs) or (0,))

    def table(self) -> torch.Tensor:
        """int64 [size]: the token at each slot."""
        tokens = torch.arange(self.size).reshape(self.radices)
        return tokens.permute(self.order).reshape(-1)

    def _refined(self, cuts: Sequence[int]) -> DigitPerm:
        """The same permutation with the digits of its tokens cut at all the given weights, ascending."""
        pieces: list[list[int]] = []
        count = 0
        radices: list[int] = []
        for weight, radix in zip(_weights(self.radices), self.radices, strict=True):
            inside = [c for c in cuts if weight <= c <= weight * radix]
            parts = [high // low for low, high in itertools.pairwise(inside)][::-1] or [1]
            pieces.append(list(range(count, count + len(parts))))
            count += len(parts)
            radices += parts
        return DigitPerm(tuple(radices), tuple(p for d in self.order for p in pieces[d]))


def _weights(radices: Sequence[int]) -> tuple[int, ...]:
    """What one unit of each digit counts."""
    return tuple(math.prod(radices[i + 1 :]) for i in range(len(radices)))


def tile_order(grid: Sequence[int], tile: Sequence[int]) -> DigitPerm:
    """Tokens of one tile of a (T, Y, X) grid together, tiles in grid order; every axis must divide."""
    for axis, n, t in zip("TYX", grid, tile, strict=True):
        if t < 1 or n % t:
            raise OptionError(f"tile = {tuple(tile)!r}: {t} does not divide the {n} tokens along {axis}")
    (tt, ty, tx), (gt, gy, gx) = tile, grid
    return DigitPerm((gt // tt, tt, gy // ty, ty, gx // tx, tx), (0, 2, 4, 1, 3, 5))


def axis_order(grid: Sequence[int], order: Sequence[int]) -> DigitPerm:
    """The axes of a grid in another order, the first one outermost."""
    return DigitPerm(tuple(grid), tuple(order))


def token_major(grid: Sequence[int]) -> DigitPerm:
    """All frames of one place of a (T, Y, X) grid together, places in row order."""
    return DigitPerm((grid[0], grid[1] * grid[2]), (1, 0))
