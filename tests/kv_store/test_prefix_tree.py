"""The prefix tree against plain dictionaries: what is held, what is found, what goes first."""

from __future__ import annotations

import random

import pytest

from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.prefix_tree import CostTable, PrefixTree

P = 4


def cost(cached: int, new: int) -> float:
    return new * (10 + cached + new / 2)


class Requests:
    """A tree whose page of a run of tokens is the number of that run."""

    def __init__(self, capacity: int) -> None:
        self.held: set[int] = set()
        self.numbers: dict[tuple[int, ...], int] = {}
        self.dropped: list[int] = []
        self.tree = PrefixTree(P, capacity, cost, self.drop)

    def drop(self, pages) -> None:
        for (page,) in pages:
            self.held.remove(page)
            self.dropped.append(page)

    def pages(self, tokens) -> list[tuple[int]]:
        ends = range(P, len(tokens) + 1, P)
        return [(self.numbers.setdefault(tuple(tokens[:end]), len(self.numbers)),) for end in ends]

    def start(self, tokens):
        """(lease, tokens found, kept?) of one request; what it finds must be what it asked for."""
        whole = tokens[: len(tokens) // P * P]
        lease = self.tree.match(tokens)
        found = len(lease.pages) * P
        assert lease.pages == self.pages(whole)[: found // P]
        kept = found < len(whole) and self.tree.add(lease, whole[found:], self.pages(whole)[found // P :])
        if kept:
            self.held |= {page for (page,) in self.pages(whole)[found // P :]}
        return lease, found, kept

    def check(self) -> None:
        in_tree = [page for node in self.tree.nodes() for (page,) in node.pages]
        assert sorted(in_tree) == sorted(self.held)
        assert self.tree.tokens == len(in_tree) * P <= self.tree.capacity


def documents(path) -> list[int]:
    """Tokens of a path of documents; document d has d % 3 + 1 pages."""
    return [1000 * (i + 1) + 10 * d for i, d in enumerate(path) for _ in range((d % 3 + 1) * P)]


class Plain:
    """PGDSF as it is written down, over paths of documents in a dictionary."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.clock, self.time = capacity, 0.0, 0
        self.known: dict[tuple[int, ...], list[float]] = {}

    def request(self, path) -> None:
        self.time += 1
        paths = [tuple(path[: i + 1]) for i in range(len(path))]
        hits = [p for p in paths if p in self.known]
        sizes = [(p[-1] % 3 + 1) * P for p in paths]
        cached = sum(sizes[: len(hits)])
        for p in hits:
            entry = self.known[p]
            entry[0] += 1
            entry[2:] = [self.clock + entry[0] * entry[1], self.time]
        for p, size in list(zip(paths, sizes, strict=True))[len(hits) :]:
            busy = set(paths[: paths.index(p)])
            while sum((q[-1] % 3 + 1) * P for q in self.known) + size > self.capacity:
                leaves = [
                    q
                    for q in self.known
                    if q not in busy and not any(r[:-1] == q for r in self.known if len(r) > 1)
                ]
                worst = min(leaves, key=lambda q: self.known[q][2:])
                self.clock = max(self.clock, self.known.pop(worst)[2])
            each = cost(cached, size) / size
            self.known[p] = [1, each, self.clock + each, self.time]
            cached += size


@pytest.mark.parametrize("seed", range(6))
def test_replacement_is_that_of_a_plain_simulation(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.choice([30, 48, 72]) // P * P
    mine, plain = Requests(capacity), Plain(capacity)
    for _ in range(250):
        path = [min(int(rng.paretovariate(0.8)), 12) for _ in range(rng.randint(1, 2))]
        plain.request(path)
        whole = documents(path)
        lease = mine.tree.match(whole)
        for i in range(len(path)):  # document by document, as the simulation does
            have, need = len(lease.pages) * P, len(documents(path[: i + 1]))
            if have < need:
                pages = mine.pages(whole[:need])[have // P :]
                assert mine.tree.add(lease, whole[have:need], pages)
                mine.held |= {page for (page,) in pages}
        mine.tree.release(lease)
        mine.check()
        want = {page for p in plain.known for (page,) in mine.pages(documents(p))[-(p[-1] % 3 + 1) :]}
        assert mine.held == want
        assert mine.tree.clock == pytest.approx(plain.clock)
    assert len(mine.dropped) > 50


@pytest.mark.parametrize("seed", range(8))
def test_random_requests_find_what_they_left(seed: int) -> None:
    rng = random.Random(seed)
    mine, open_leases = Requests(rng.choice([5, 12, 40]) * P), []
    for _ in range(200):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(0, 10))]
        tokens = [t for t in tokens for _ in range(rng.choice([2, P]))]
        lease, found, kept = mine.start(tokens)
        if kept:
            again = mine.tree.match(tokens)
            assert len(again.pages) == len(tokens) // P
            mine.tree.release(again)
        open_leases.append((lease, list(lease.pages)))
        while len(open_leases) > 3 or (open_leases and rng.random() < 0.5):
            lease, pages = open_leases.pop(rng.randrange(len(open_leases)))
            assert lease.pages == pages, "what is leased stays, however its nodes are cut"
            assert {page for (page,) in pages} <= mine.held
            mine.tree.release(lease)
        mine.check()
    for lease, _ in open_leases:
        mine.tree.release(lease)
    mine.tree.clear()
    assert not mine.held


def test_more_capacity_never_hits_less() -> None:
    rates = []
    for capacity in (16, 32, 64, 128, 256):
        rng, mine, hits = random.Random(7), Requests(capacity), 0
        for _ in range(600):
            path = [min(int(rng.paretovariate(0.7)), 30) for _ in range(2)]
            lease, found, _ = mine.start(documents(path))
            hits += found
            mine.tree.release(lease)
        rates.append(hits)
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_leases_hold_and_misuse_is_named() -> None:
    mine = Requests(2 * P)
    lease, _, kept = mine.start([1] * 8)
    assert kept
    other, found, kept = mine.start([2] * 8)
    assert (found, kept) == (0, False), "everything is leased"
    with pytest.raises(KVStoreError, match="a request reads it"):
        mine.tree.clear()
    mine.tree.release(lease)
    mine.tree.release(lease)
    assert mine.start([2] * 8)[2]
    with pytest.raises(KVStoreError, match="1 pages of 4 tokens for 3"):
        mine.tree.add(other, [1, 2, 3], [(0,)])
    with pytest.raises(KVStoreError, match="capacity = 3"):
        PrefixTree(P, 3, cost, print)


def test_costs_between_measured_ones() -> None:
    table = CostTable((0, 100), (10, 20, 40), ((1.0, 2.0, 4.0), (3.0, 4.0, 6.0)))
    assert [table(0, 10), table(100, 40), table(50, 15), table(0, 30)] == [1.0, 6.0, 2.5, 3.0]
    assert table(200, 40) == 8.0
    with pytest.raises(KVStoreError, match="ascending"):
        CostTable((0, 0), (1, 2), ((1.0, 1.0), (1.0, 1.0)))
    with pytest.raises(KVStoreError, match="2 rows of 2"):
        CostTable((0, 1), (1, 2), ((1.0,), (1.0,)))
