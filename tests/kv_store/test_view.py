"""The RAM store against plain lists: what was appended is there, what was freed is free."""

from __future__ import annotations

import random

import pytest
import torch

from tilewright.compiler import ops
from tilewright.runtime.kv_store.errors import KVStoreError, OutOfPages
from tilewright.runtime.kv_store.pool import PagePool
from tilewright.runtime.kv_store.view import LayerView

HEADS, SIZE, VALUE = 2, 3, 5


def make_pool(**options):
    options = {"page": 8, "dtype": torch.float32, "device": torch.device("cpu"), **options}
    return PagePool(HEADS, SIZE, VALUE, **options)


def rows(batch, tokens):
    return torch.randn(batch, HEADS, tokens, SIZE), torch.randn(batch, HEADS, tokens, VALUE)


def check(view, oracle):
    """oracle: per sequence a list of (key, value, position given up?)."""
    assert view.lengths == [len(x) for x in oracle]
    for row, want in enumerate(oracle):
        at, keys, values = view.rows(row)
        kept = [p for p, entry in enumerate(want) if entry is not None]
        assert at.tolist() == kept
        for i, p in enumerate(kept):
            assert torch.equal(keys[:, i], want[p][0])
            assert torch.equal(values[:, i], want[p][1])


def grow(view, oracle, tokens):
    k, v = rows(view.batch, tokens)
    view.append(k, v)
    for row, want in enumerate(oracle):
        want += [(k[row, :, t], v[row, :, t]) for t in range(tokens)]


def one_schedule(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pool = make_pool(page=rng.choice([8, 16]), extremes=rng.random() < 0.5)
    live = []
    for _ in range(22):
        move = rng.choice(["new", "append", "append", "append", "crop", "fork", "drop", "free"])
        if move == "new" or not live:
            batch = rng.randint(1, 3)
            live.append((LayerView(pool, batch, ops.paged_append), [[] for _ in range(batch)]))
            continue
        view, oracle = rng.choice(live)
        if move == "append":
            lengths = view.lengths
            if not any(n % pool.page and x[n - 1] is None for n, x in zip(lengths, oracle, strict=True)):
                grow(view, oracle, rng.randint(1, 20))
        elif move == "crop":
            lengths = [rng.randint(0, n) for n in view.lengths]
            view.crop(lengths)
            for want, n in zip(oracle, lengths, strict=True):
                del want[n:]
        elif move == "fork":
            order = [rng.randrange(view.batch) for _ in range(rng.randint(1, 3))]
            lengths = [rng.randint(0, view.lengths[row]) for row in order]
            copies = [list(oracle[row][:n]) for row, n in zip(order, lengths, strict=True)]
            live.append((view.fork(order, lengths), copies))
        elif move == "drop":
            row = rng.randrange(view.batch)
            full = view.lengths[row] // pool.page
            if full:
                place = rng.randrange(full)
                view.drop(row, [place])
                oracle[row][place * pool.page : (place + 1) * pool.page] = [None] * pool.page
        else:
            view.free()
            live.remove((view, oracle))
        for other, want in live:
            check(other, want)
    for view, _ in live:
        view.free()
    assert pool.used == 0


@pytest.mark.parametrize("block", range(10))
def test_random_schedules_against_lists(block):
    for seed in range(10 * block, 10 * block + 10):
        one_schedule(seed)


def test_a_thousand_sessions_leave_nothing():
    pool = make_pool()
    for i in range(1000):
        view = LayerView(pool, 1 + i % 3, ops.paged_append)
        view.append(*rows(view.batch, 11))
        other = view.fork([0])
        other.append(*rows(1, 2))
        view.free()
        other.free()
        other.free()
    assert pool.used == 0
    assert pool.k_pages.shape[0] <= 16


def test_shared_pages_are_shared_and_copied_when_written():
    pool = make_pool(extremes=True)
    view = LayerView(pool, 1, ops.paged_append)
    view.append(*rows(1, 20))
    fork = view.fork([0, 0])
    assert pool.used == 3
    before = view.rows(0)
    k, v = rows(2, 1)
    fork.append(k, v)
    assert pool.used == 5  # the two full pages stay shared, each sequence of the fork has its own last one
    assert all(torch.equal(a, b) for a, b in zip(before, view.rows(0), strict=True))
    assert torch.equal(fork.rows(1)[1][:, -1], k[1, :, 0])
    table, _ = fork.tables()
    assert torch.equal(pool.low[int(table[1, 2])], fork.rows(1)[1][:, 16:].amin(1))


def extremes_are_exact(view):
    table, _ = view.tables()
    for row, held in enumerate(view.lengths):
        keys = view.rows(row)[1]
        for place in range(-(-held // view.pool.page)):
            part = keys[:, place * view.pool.page : (place + 1) * view.pool.page]
            assert torch.equal(view.pool.low[int(table[row, place])], part.amin(1))
            assert torch.equal(view.pool.high[int(table[row, place])], part.amax(1))


@pytest.mark.parametrize("length", [11, 16, 17])
def test_extremes_forget_what_was_taken_back(length):
    pool = make_pool(extremes=True)
    view = LayerView(pool, 2, ops.paged_append)
    k, v = rows(2, 21)
    view.append(100 * k, v)
    fork = view.fork([1, 0], [length, 21])
    again = fork.fork([0])
    for other in (fork, again):
        other.append(*rows(other.batch, 2))
        extremes_are_exact(other)
    extremes_are_exact(view)
    view.crop([length, 3])
    view.append(*rows(2, 9))
    for other in (fork, again, view):
        extremes_are_exact(other)


def test_out_of_pages_leaves_everything_as_it_was():
    pool = make_pool(limit=3)
    view = LayerView(pool, 2, ops.paged_append)
    view.append(*rows(2, 3))
    before = view.rows(1)
    with pytest.raises(OutOfPages, match="all 3 pages are in use"):
        view.append(*rows(2, 6))
    assert pool.used == 2
    assert view.lengths == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(before, view.rows(1), strict=True))
    view.append(*rows(2, 5))


def test_misuse_is_named():
    pool = make_pool()
    view = LayerView(pool, 2, ops.paged_append)
    view.append(*rows(2, 9))
    with pytest.raises(KVStoreError, match=r"k is \[1, 2, 1, 3\]"):
        view.append(*rows(1, 1))
    with pytest.raises(KVStoreError, match="torch.float64"):
        view.append(*(x.double() for x in rows(2, 1)))
    with pytest.raises(KVStoreError, match="crop to"):
        view.crop([10, 3])
    with pytest.raises(KVStoreError, match="1 full pages"):
        view.drop(0, [1])
    with pytest.raises(KVStoreError, match="the view holds"):
        view.fork([0], [12])
    view.free()
    with pytest.raises(KVStoreError, match="freed"):
        view.append(*rows(2, 1))
    with pytest.raises(KVStoreError, match="not held"):
        pool.release(0)
    with pytest.raises(KVStoreError, match="page = 0"):
        make_pool(page=0)
