"""DigitPerm against reshape and permute, its inverse, products and compositions."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.digit_perm import DigitPerm, axis_order, tile_order, token_major


def drawn(generator: random.Random, radices: tuple[int, ...]) -> DigitPerm:
    order = list(range(len(radices)))
    generator.shuffle(order)
    return DigitPerm(radices, tuple(order))


def permutations(seed: int, count: int) -> list[DigitPerm]:
    generator = random.Random(seed)
    return [
        drawn(generator, tuple(generator.choice((1, 2, 3, 4, 5)) for _ in range(generator.randint(1, 5))))
        for _ in range(count)
    ]


@pytest.mark.parametrize("perm", permutations(0, 30), ids=str)
def test_address_arithmetic_is_the_table(perm: DigitPerm) -> None:
    slots = torch.arange(perm.size)
    table = perm.table()
    assert torch.equal(perm.source(slots), table)
    assert [perm.source(s) for s in range(perm.size)] == table.tolist()
    assert torch.equal(perm.slot(table), slots)
    assert torch.equal(perm.inverse().table(), torch.argsort(table))
    assert torch.equal(perm.simplified().table(), table)
    assert perm.inverse().inverse() == perm
    assert perm.is_identity == torch.equal(table, slots)


def test_the_orders_of_the_papers() -> None:
    grid, tile = (4, 6, 10), (2, 3, 5)
    x = torch.arange(math.prod(grid)).reshape(grid)
    tiles = x.reshape(2, 2, 2, 3, 2, 5).permute(0, 2, 4, 1, 3, 5).reshape(-1)
    assert torch.equal(tile_order(grid, tile).table(), tiles)
    for order in itertools.permutations(range(3)):
        assert torch.equal(axis_order(grid, order).table(), x.permute(order).reshape(-1))
    assert torch.equal(token_major(grid).table(), x.reshape(4, 60).t().reshape(-1))
    assert token_major((1, 4, 5)).is_identity
    assert not token_major(grid).is_identity


@pytest.mark.parametrize("seed", range(12))
def test_composition_of_powers_of_two(seed: int) -> None:
    """Weights that are powers of two always have a common refinement."""
    generator = random.Random(seed)
    chosen = generator.sample(list(itertools.permutations((2, 4, 8))) + [(8, 8), (2, 2, 16), (64,)], 2)
    first, second = (drawn(generator, radices) for radices in chosen)
    assert torch.equal(first.then(second).table(), first.table()[second.table()])


def test_compositions_that_exist() -> None:
    grid = (4, 6, 10)
    tiles = tile_order(grid, (2, 3, 5))
    assert tiles.then(tiles.inverse()).is_identity
    halves = tiles.then(DigitPerm((8, 30), (1, 0)))
    assert torch.equal(halves.table(), tiles.table()[DigitPerm((8, 30), (1, 0)).table()])
    with pytest.raises(OptionError, match="no common refinement"):
        DigitPerm((2, 3), (1, 0)).then(DigitPerm((2, 3), (1, 0)))
    with pytest.raises(OptionError, match="expected 6"):
        DigitPerm((2, 3), (1, 0)).then(DigitPerm((5,), (0,)))


def test_product_acts_on_groups() -> None:
    outer, inner = DigitPerm((3, 2), (1, 0)), DigitPerm((2, 5), (1, 0))
    want = (outer.table()[:, None] * inner.size + inner.table()).reshape(-1)
    assert torch.equal(outer.product(inner).table(), want)


@pytest.mark.parametrize(
    ("radices", "order", "said"),
    [((2, 0), (0, 1), "whole numbers from 1"), ((2, 3), (0, 0), "each of 0..1 once"), ((2,), (0, 1), "0..0")],
)
def test_illegal_permutations(radices, order, said) -> None:
    with pytest.raises(OptionError, match=said):
        DigitPerm(radices, order)


def test_a_tile_must_divide() -> None:
    with pytest.raises(OptionError, match="8 does not divide the 30 tokens along Y"):
        tile_order((21, 30, 52), (3, 8, 4))
