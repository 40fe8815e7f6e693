"""Tiles of a video grid and the windows that slide over them, in whole tiles (arXiv:2502.04507).

A grid that a tile does not divide has ragged tiles: shorter ones at the far edges (`ceil`) or sizes that
differ by at most one (`balanced`). The token order is then a concatenation of digit permutations, so it is an
index tensor. Windows are counted in tiles; at a border they slide inwards, so every query tile of an axis
sees the same number of key tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import torch

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.digit_perm import DigitPerm, tile_order

Nondivisible = Literal["error", "dense", "ceil", "balanced"]
"""What to do where the tile does not divide the grid: an error, leave the attention dense, ragged tiles."""
Triple = tuple[int, int, int]
AXES = ("T", "Y", "X")


@dataclass(frozen=True)
class Tiling:
    """A (T, Y, X) grid cut into tiles: `sizes[axis]` are the lengths of its tiles, first to last."""

    grid: Triple
    sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def counts(self) -> Triple:
        """Tiles along each axis."""
        return len(self.sizes[0]), len(self.sizes[1]), len(self.sizes[2])

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def is_regular(self) -> bool:
        """True when all tiles have one size."""
        return all(len(set(axis)) == 1 for axis in self.sizes)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each tile, in tile order."""
        return tuple(math.prod(tile) for tile in itertools.product(*self.sizes))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Slot of each tile's first token, and the number of tokens at the end."""
        return tuple(itertools.accumulate(self.lengths, initial=0))

    def permutation(self) -> DigitPerm | None:
        """The tile order as digits; None when tiles are ragged."""
        return tile_order(self.grid, tuple(axis[0] for axis in self.sizes)) if self.is_regular else None

    def table(self) -> torch.Tensor:
        """int64 [tokens]: the token at each slot, tile by tile, in grid order inside a tile."""
        tokens = torch.arange(self.tokens).reshape(self.grid)
        rows = [
            row
            for frames in torch.split(tokens, list(self.sizes[0]), 0)
            for row in torch.split(frames, list(self.sizes[1]), 1)
        ]
        return torch.cat(
            [part.reshape(-1) for row in rows for part in torch.split(row, list(self.sizes[2]), 2)]
        )

    def padded(self, block: int) -> int:
        """Slots when every tile starts at a multiple of `block`."""
        return sum(-(-n // block) * block for n in self.lengths)


def axis_tiles(length: int, tile: int, *, balanced: bool = False) -> tuple[int, ...]:
    """Sizes of the tiles along one axis: `tile, ..., tile, rest`, or sizes that differ by at most one."""
    count = -(-length // tile)
    if balanced:
        small, longer = divmod(length, count)
        return (small + 1,) * longer + (small,) * (count - longer)
    rest = length - tile * (count - 1)
    return (tile,) * (count - 1) + (rest,)


def tile_grid(grid: Sequence[int], tile: Sequence[int], nondivisible: Nondivisible = "ceil") -> Tiling | None:
    """The tiling of a (T, Y, X) grid of tokens; None when it does not divide and stays dense.

    OptionError for a tile that is not three whole numbers from 1, is larger than the grid, or does not divide
    it under `error`.
    """
    for name, value in (("grid", grid), ("tile", tile)):
        if len(value) != 3 or not all(type(n) is int and n >= 1 for n in value):
            raise OptionError(f"{name} = {tuple(value)!r}: expected three whole numbers from 1 (T, Y, X)")
    for axis, n, t in zip(AXES, grid, tile, strict=True):
        if t > n:
            raise OptionError(f"tile = {tuple(tile)!r}: {t} is more than the {n} tokens along {axis}")
        if n % t and nondivisible == "dense":
            return None
        if n % t and nondivisible == "error":
            raise OptionError(
                f"tile = {tuple(tile)!r}: {t} does not divide the {n} tokens along {axis}",
                remedy="choose a divisor, or nondivisible=ceil or balanced for ragged tiles",
            )
    balanced = nondivisible == "balanced"
    frames, rows, columns = (axis_tiles(n, t, balanced=balanced) for n, t in zip(grid, tile, strict=True))
    return Tiling((grid[0], grid[1], grid[2]), (frames, rows, columns))


def check_window(window: Sequence[int], counts: Sequence[int]) -> str | None:
    """Why a window in tiles is not legal over so many tiles, None when it is.

    It is odd and at most the tiles of its axis, or all of them: an even one would be the next odd one.
    """
    if len(window) != 3 or not all(type(w) is int and w >= 1 for w in window):
        return "expected three whole numbers from 1, in tiles along T, Y, X"
    for axis, w, n in zip(AXES, window, counts, strict=True):
        if w > n:
            return f"{w} tiles along {axis}, but the grid has {n}"
        if w % 2 == 0 and w != n:
            return f"{w} tiles along {axis}: it must be odd, or all {n} tiles"
    return None


def axis_window(count: int, window: int) -> tuple[tuple[int, int], ...]:
    """(first, end) key tile of each query tile along one axis: the centre is moved inwards at a border."""
    radius = window // 2
    if 2 * radius + 1 >= count:
        return ((0, count),) * count
    centres = [min(max(q, radius), count - 1 - radius) for q in range(count)]
    return tuple((c - radius, c + radius + 1) for c in centres)


def key_tiles(counts: Sequence[int], window: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The key tiles that each query tile attends, ascending; tiles are numbered in (T, Y, X) order."""
    spans = [axis_window(n, w) for n, w in zip(counts, window, strict=True)]
    _, rows, columns = counts
    return tuple(
        tuple(
            (t * rows + y) * columns + x
            for t in range(*frames)
            for y in range(*lines)
            for x in range(*places)
        )
        for frames, lines, places in itertools.product(*spans)
    )


def window_density(tiling: Tiling, window: Sequence[int]) -> Fraction:
    """Attended (query, key) pairs over all pairs of video tokens, exactly."""
    kept = Fraction(1)
    for sizes, n, w in zip(tiling.sizes, tiling.grid, window, strict=True):
        spans = axis_window(len(sizes), w)
        pairs = sum(size * sum(sizes[slice(*span)]) for size, span in zip(sizes, spans, strict=True))
        kept *= Fraction(pairs, n * n)
    return kept


def padding_waste(grid: Sequence[int], tile: Sequence[int]) -> Fraction:
    """Slots that hold no token, over tokens, when every ragged tile takes as many slots as a whole one."""
    slots = math.prod(-(-n // t) * t for n, t in zip(grid, tile, strict=True))
    return Fraction(slots, math.prod(grid)) - 1


def best_tiles(grid: Sequence[int], volume: int) -> list[Triple]:
    """The tiles of `volume` tokens that waste the fewest slots on a grid, the most cubic first."""
    sides = [d for d in range(1, volume + 1) if volume % d == 0]
    shapes = [
        (t, y, volume // (t * y)) for t in sides for y in sides if volume % (t * y) == 0 and t <= grid[0]
    ]
    fitting = [s for s in shapes if s[1] <= grid[1] and s[2] <= grid[2]]
    if not fitting:
        return []
    least = min(padding_waste(grid, s) for s in fitting)
    return sorted((s for s in fitting if padding_waste(grid, s) == least), key=lambda s: (max(s), s))
