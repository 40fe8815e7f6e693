"""Tiles and windows: the published densities, counts and widths exactly; ragged tiles against brute force."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from tilewright.compiler.bands import (
    band_density,
    band_pairs,
    band_width,
    half_width,
    width_in_frames,
    with_text,
)
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.tiles import (
    Tiling,
    axis_tiles,
    axis_window,
    best_tiles,
    check_window,
    key_tiles,
    padding_waste,
    tile_grid,
    window_density,
)


def tiles_of(counts) -> Tiling:
    """A tiling with so many tiles of 6 x 8 x 8 tokens."""
    tiling = tile_grid([n * t for n, t in zip(counts, (6, 8, 8), strict=True)], (6, 8, 8), "error")
    assert tiling is not None
    return tiling


PUBLISHED = {
    ((5, 6, 10), (3, 3, 3)): 0.0900,
    ((5, 6, 10), (5, 5, 5)): 0.4167,
    ((5, 6, 10), (5, 3, 5)): 0.2500,
    ((5, 6, 10), (3, 3, 5)): 0.1500,
    ((5, 6, 10), (5, 6, 1)): 0.1000,
    ((5, 6, 10), (1, 6, 10)): 0.2000,
    ((5, 6, 10), (5, 1, 10)): 0.1667,
    ((5, 6, 10), (5, 3, 3)): 0.1500,
    ((5, 6, 10), (5, 5, 7)): 0.5833,
    ((3, 6, 10), (3, 3, 3)): 0.1500,
    ((3, 6, 10), (3, 1, 10)): 0.1667,
    ((3, 6, 10), (1, 5, 7)): 0.1944,
    ((3, 6, 10), (1, 6, 5)): 0.1667,
    ((3, 6, 10), (1, 3, 10)): 0.1667,
    ((3, 6, 10), (3, 6, 1)): 0.1000,
}


@pytest.mark.parametrize(("counts", "window"), PUBLISHED)
def test_published_densities(counts, window) -> None:
    tiling = tiles_of(counts)
    assert check_window(window, counts) is None
    density = window_density(tiling, window)
    assert round(float(density), 4) == PUBLISHED[counts, window]
    rows = key_tiles(counts, window)
    assert density == Fraction(sum(map(len, rows)), len(rows) ** 2)


@pytest.mark.parametrize(("window", "percent"), [(12, 1.5625), (20, 7.2338)])
def test_cube_of_the_paper(window: int, percent: float) -> None:
    tiling = tile_grid((48, 48, 48), (4, 4, 4), "error")
    assert round(100 * float(window_density(tiling, (window // 4,) * 3)), 4) == percent


def test_released_table_of_72000_windows() -> None:
    """Its histogram (50 steps x 60 layers x 24 heads; 15 dense steps) gives the published means."""
    histogram = {(5, 3, 3): 20_380, (1, 6, 10): 15_916, (3, 3, 5): 7_396, (5, 1, 10): 5_244, (5, 6, 1): 1_464}
    dense, entries = 21_600, 50 * 60 * 24
    assert dense == 15 * 60 * 24
    assert dense + sum(histogram.values()) == entries == 72_000
    tiling = tiles_of((5, 6, 10))
    kept = sum(window_density(tiling, w) * n for w, n in histogram.items())
    assert (dense + kept) / entries == Fraction("0.41625")
    assert 1 - (dense + kept) / entries == Fraction("0.58375")
    assert round(float(kept / (entries - dense)), 5) == 0.16607


def test_even_windows_are_the_next_odd_one() -> None:
    tiling = tiles_of((5, 6, 10))
    assert window_density(tiling, (3, 4, 4)) == Fraction(1, 4)
    assert window_density(tiling, (2, 2, 2)) == Fraction(9, 100)
    assert "must be odd, or all 6 tiles" in check_window((3, 4, 5), (5, 6, 10))
    assert "the grid has 5" in check_window((7, 3, 3), (5, 6, 10))
    assert "three whole numbers" in check_window((3, 3), (5, 6, 10))
    assert "three whole numbers" in check_window((3, 0, 3), (5, 6, 10))


@pytest.mark.parametrize("count", range(1, 9))
def test_axis_window_is_the_clamp_rule(count: int) -> None:
    for window in range(1, count + 1):
        radius = window // 2
        for q, (first, end) in enumerate(axis_window(count, window)):
            assert end - first == min(count, 2 * radius + 1)
            if 2 * radius + 1 < count:
                centre = min(max(q, radius), count - 1 - radius)
                assert set(range(first, end)) == {k for k in range(count) if abs(centre - k) <= radius}


WASTE = {
    (21, 30, 52): ((31.3, 21.9, 31.3, 0.0), ((2, 8, 4), 11.7), ((3, 16, 8), 14.9)),
    (21, 45, 80): ((21.9, 21.9, 21.9, 0.0), ((1, 8, 8), 6.7), ((3, 8, 16), 6.7)),
    (33, 45, 80): ((16.4, 16.4, 16.4, 0.0), ((2, 2, 16), 5.3), ((3, 8, 16), 6.7)),
    (30, 48, 80): ((0.0, 6.7, 6.7, 4.2), ((1, 8, 8), 0.0), ((6, 8, 8), 0.0)),
    (18, 48, 80): ((0.0, 11.1, 11.1, 4.2), ((1, 8, 8), 0.0), ((6, 8, 8), 0.0)),
    (13, 30, 45): ((57.5, 40.0, 40.0, 23.1), ((1, 8, 8), 13.8), ((2, 16, 12), 22.5)),
    (11, 48, 85): ((12.9, 12.9, 12.9, 17.6), ((1, 8, 8), 3.5), ((12, 16, 2), 10.4)),
    (21, 16, 22): ((24.7, 24.7, 24.7, 36.4), ((2, 16, 2), 4.8), ((3, 16, 8), 9.1)),
    (28, 30, 53): ((20.8, 12.7, 12.7, 13.2), ((4, 2, 8), 5.7), ((4, 16, 6), 8.7)),
}
TILES = ((6, 8, 8), (4, 4, 4), (4, 8, 8), (3, 5, 4))


@pytest.mark.parametrize("grid", WASTE)
def test_published_waste(grid) -> None:
    published, small, large = WASTE[grid]
    for tile, percent in zip(TILES, published, strict=True):
        assert round(100 * float(padding_waste(grid, tile)), 1) == percent, tile
        sizes = tile_grid(grid, tile, "ceil").sizes
        assert tuple(map(sum, sizes)) == grid
    for volume, (tile, percent) in ((64, small), (384, large)):
        assert math.prod(tile) == volume
        assert round(100 * float(padding_waste(grid, tile)), 1) == percent
    assert round(100 * float(padding_waste(grid, best_tiles(grid, 64)[0])), 1) <= small[1]


@pytest.mark.parametrize("policy", ["ceil", "balanced"])
@pytest.mark.parametrize(
    ("grid", "tile"), [((3, 5, 7), (2, 2, 3)), ((4, 6, 8), (2, 3, 4)), ((5, 4, 9), (5, 3, 2))]
)
def test_ragged_order_against_brute_force(grid, tile, policy) -> None:
    tiling = tile_grid(grid, tile, policy)
    starts = [list(itertools.accumulate(axis, initial=0)) for axis in tiling.sizes]
    want = []
    for t, y, x in itertools.product(*(range(n) for n in tiling.counts)):
        spans = [range(s[i], s[i + 1]) for s, i in zip(starts, (t, y, x), strict=True)]
        want += [(a * grid[1] + b) * grid[2] + c for a, b, c in itertools.product(*spans)]
    assert tiling.table().tolist() == want
    assert tiling.offsets[-1] == tiling.tokens == math.prod(grid)
    assert len(tiling.lengths) == math.prod(tiling.counts)
    perm = tiling.permutation()
    assert (perm is not None) == tiling.is_regular
    if perm is not None:
        assert torch.equal(perm.table(), tiling.table())


def test_axis_tiles() -> None:
    assert axis_tiles(45, 8) == (8, 8, 8, 8, 8, 5)
    assert axis_tiles(45, 8, balanced=True) == (8, 8, 8, 7, 7, 7)
    assert axis_tiles(48, 8) == axis_tiles(48, 8, balanced=True) == (8,) * 6
    assert axis_tiles(3, 5) == (3,)


def test_ragged_density_counts_tokens() -> None:
    tiling = tile_grid((5, 6, 7), (2, 4, 3), "ceil")
    window = (1, 1, 3)
    rows = key_tiles(tiling.counts, window)
    pairs = sum(tiling.lengths[q] * sum(tiling.lengths[k] for k in row) for q, row in enumerate(rows))
    assert window_density(tiling, window) == Fraction(pairs, tiling.tokens**2)
    assert window_density(tiling, tiling.counts) == 1


def test_padded_slots() -> None:
    tiling = tile_grid((21, 30, 52), (3, 5, 4), "error")
    assert set(tiling.lengths) == {60}
    assert tiling.padded(64) == 32_760 // 60 * 64


@pytest.mark.parametrize(
    ("grid", "tile", "policy", "said"),
    [
        ((21, 30, 52), (6, 8, 8), "error", "6 does not divide the 21 tokens along T"),
        ((4, 4, 4), (8, 4, 4), "ceil", "8 is more than the 4 tokens along T"),
        ((4, 4), (2, 2, 2), "ceil", "grid = \\(4, 4\\)"),
        ((4, 4, 4), (2, 0, 2), "ceil", "tile = \\(2, 0, 2\\)"),
    ],
)
def test_illegal_tiles(grid, tile, policy, said) -> None:
    with pytest.raises(OptionError, match=said):
        tile_grid(grid, tile, policy)
    assert tile_grid((21, 30, 52), (6, 8, 8), "dense") is None


def test_band_widths_of_sparse_videogen() -> None:
    wan = dict(tokens=75_600, text=0, frame=3_600)
    assert round(width_in_frames(0.30, **wan), 3) == 3.430
    assert band_width(0.30, **wan) == 12_349
    assert round(float(band_density(75_600, 12_349)), 4) == 0.3000
    hunyuan = dict(tokens=118_800 + 256, text=256, frame=3_600)
    assert round(width_in_frames(0.25, **hunyuan), 3) == 4.349
    assert band_width(0.25, **hunyuan) == 15_655
    with pytest.raises(OptionError, match="text tokens"):
        width_in_frames(0.01, tokens=1_000, text=100, frame=10)
    with pytest.raises(OptionError, match="more than 0"):
        width_in_frames(0.0, **wan)


def test_band_densities_of_rettention() -> None:
    assert half_width(4_096, 0.03125) == 64
    assert round(float(band_density(4_096, 64)), 4) == 0.0312
    assert half_width(1_350, 0.03125) == 21
    video = band_density(1_350, 21)
    assert round(float(video), 4) == 0.0316
    assert round(float(with_text(video, tokens=17_550, text=226)), 4) == 0.0561
    with pytest.raises(OptionError, match="share"):
        half_width(10, 1.5)


@pytest.mark.parametrize(("tokens", "width"), [(7, 0), (7, 2), (7, 6), (7, 9)])
def test_band_pairs_by_counting(tokens: int, width: int) -> None:
    counted = sum(abs(i - j) <= width for i in range(tokens) for j in range(tokens))
    assert band_pairs(tokens, width) == counted
