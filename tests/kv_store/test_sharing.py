"""Shared runs against a count by hand: every page in at most one run, nothing that is shared left out."""

from __future__ import annotations

import random

from tilewright.runtime.kv_store.sharing import SharedRun, shared_runs


def test_runs_follow_the_sequences_that_stay_together():
    pages = [[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 2, 6, 7, -1], [1, 2, 6, 7, -1], [8, 2, 6, 7, -1]]
    assert shared_runs(pages, 0, 5, 2, 1) == [
        SharedRun((0, 1, 2, 3), 0, 2),
        SharedRun((0, 1), 2, 3),
        SharedRun((2, 3), 2, 4),
    ]
    assert shared_runs(pages, 0, 5, 2, 2) == [SharedRun((0, 1, 2, 3), 0, 2), SharedRun((2, 3), 2, 4)]
    assert shared_runs(pages, 0, 5, 3, 1) == [SharedRun((0, 1, 2, 3), 0, 2)]
    assert shared_runs(pages, 1, 2, 2, 1) == [SharedRun((0, 1, 2, 3, 4), 1, 2)]
    assert shared_runs(pages[:1], 0, 5, 2, 1) == []


def test_random_trees_of_sequences():
    for seed in range(300):
        rng = random.Random(seed)
        pages, fresh = [[] for _ in range(rng.randint(1, 6))], iter(range(10_000))
        for place in range(8):
            for row, mine in enumerate(pages):
                kin = [other for other in pages[:row] if other[:place] == mine[:place]]
                share = kin and rng.random() < 0.7
                mine.append(rng.choice(kin)[place] if share else -1 if rng.random() < 0.1 else next(fresh))
        least = rng.randint(2, 3)
        covered = set()
        for run in shared_runs(pages, 0, 8, least, 1):
            assert len(run.rows) >= least
            for place in range(run.start, run.stop):
                assert len({pages[row][place] for row in run.rows}) == 1
                assert pages[run.rows[0]][place] >= 0
                for row in run.rows:
                    assert (row, place) not in covered
                    covered.add((row, place))
        for row, mine in enumerate(pages):
            for place in range(8):
                kin = [r for r, other in enumerate(pages) if other[: place + 1] == mine[: place + 1]]
                assert ((row, place) in covered) == (len(kin) >= least and mine[place] >= 0)
