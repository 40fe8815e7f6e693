"""The fast tier before a slow one: contents are bitwise those of an oracle under every schedule and fault."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch

from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.extents import BLOCK, ExtentError, ExtentFile, FileIO
from tilewright.runtime.kv_store.links import HostExtents, SimLink
from tilewright.runtime.kv_store.tier import TierError, TierManager
from tilewright.runtime.kv_store.tier_state import ExtentKey
from tilewright.runtime.kv_store.transfers import TransferThreads, Urgency

SIZE = 2 * BLOCK


class FaultyIO(FileIO):
    """Full, short of room or broken while told so; slow and short now and then if `seed` is given."""

    def __init__(self, seed: int | None = None) -> None:
        self.full = self.short = self.broken = False
        self.choice = None if seed is None else random.Random(seed)

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.choice and self.choice.random() < 0.2:
            time.sleep(0.001)
            return super().pread(fd, buffer[:BLOCK], offset)
        return super().pread(fd, buffer, offset)

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        if self.full or (self.choice and self.choice.random() < 0.1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.short:
            return 0
        if self.choice and self.choice.random() < 0.3:
            time.sleep(0.001)
            return super().pwrite(fd, buffer[:BLOCK], offset)
        return super().pwrite(fd, buffer, offset)


class PromptThreads(TransferThreads):
    """Writes ahead end before anything else happens, so that counts and the order of evictions are known."""

    def submit(self, jobs) -> None:
        jobs = list(jobs)
        for job, urgency in jobs:
            if urgency is Urgency.WRITE:
                job.run()
        super().submit([pair for pair in jobs if pair[1] is not Urgency.WRITE])


def put(tiers: TierManager, key: ExtentKey, value: int) -> None:
    with tiers.edit(key) as frame:
        frame.fill_(value)


def first_byte(tiers: TierManager, key: ExtentKey) -> int:
    with tiers.resident([key]) as (frame,):
        assert (frame == frame[0]).all()
        return int(frame[0])


@pytest.fixture
def io():
    return FaultyIO()


@pytest.fixture
def tiers(tmp_path, io):
    threads = PromptThreads()
    tiers = TierManager(4 * SIZE + 100, SIZE, lambda: ExtentFile(tmp_path / "kv", SIZE, io), threads)
    yield tiers
    tiers.close()
    threads.close()


@pytest.fixture
def keys(tiers):
    session = tiers.open_session()
    keys = [ExtentKey(session, 0, run) for run in range(8)]
    for value, key in enumerate(keys):
        put(tiers, key, value)
    return keys


def test_eight_extents_in_four_frames_keep_their_bytes(tiers, keys):
    assert tiers.frames == 4
    assert tiers.resident_bytes <= 4 * SIZE
    assert tiers.counters.bytes_written == 6 * SIZE, "the last two are not about to go"
    assert tiers.counters.written_ahead == 6
    for _ in range(3):
        assert [first_byte(tiers, key) for key in keys] == list(range(8))
    # One of the last two was never evicted, and what was is not written twice.
    assert tiers.counters.bytes_written == 7 * SIZE
    counters = tiers.counters
    assert counters.hits + counters.misses == 24
    assert counters.bytes_read == counters.misses * SIZE
    assert counters.clean_evictions == 4 + counters.misses


def misses_of(tiers: TierManager, keys: list[ExtentKey], rounds: int) -> list[int]:
    found = []
    for _ in range(rounds):
        before = tiers.counters.misses
        for key in keys:
            first_byte(tiers, key)
        found.append(tiers.counters.misses - before)
    return found


def test_of_a_round_larger_than_the_fast_tier_what_fits_stays(tiers, keys):
    # Four frames: three extents stay, the others pass through the fourth.
    assert max(misses_of(tiers, keys, 8)[2:]) <= 5
    # Those that nobody asks for any more, unlike in earlier rounds, go.
    assert max(misses_of(tiers, keys[:6], 10)[6:]) <= 3
    assert misses_of(tiers, keys[3:7], 8)[5:] == [0] * 3


def test_what_is_announced_stays_until_it_was_used(tiers, keys):
    misses_of(tiers, keys, 3)
    tiers.demote(keys)
    tiers.wait(tiers.prefetch(keys[:3]))
    for key in keys[4:]:
        first_byte(tiers, key)
    assert tiers.prefetch(keys[3:5]).keys == (keys[3],), "one frame is left"
    assert tiers.counters.dropped == 1
    hits = tiers.counters.hits
    assert [first_byte(tiers, key) for key in keys[:3]] == [0, 1, 2]
    assert tiers.counters.hits == hits + 3


def test_pinned_extents_are_never_evicted(tiers, keys):
    ticket = tiers.fetch(keys[:4])
    tiers.wait(ticket)
    for act in (
        lambda: tiers.demote([keys[0]]),
        lambda: tiers.drop(keys[0]),
        lambda: tiers.close_session(keys[0].session),
    ):
        with pytest.raises(TierError, match=r"\(1, 0, 0\), which is pinned 1 times, is refused"):
            act()
    with pytest.raises(TierError, match="all 4 of the fast tier are pinned"):
        tiers.fetch([keys[4]])
    dropped = tiers.counters.dropped
    tiers.wait(tiers.prefetch([keys[4]]))
    assert tiers.counters.dropped == dropped + 1
    assert [int(tiers.frame(key)[0]) for key in keys[:4]] == [0, 1, 2, 3]
    tiers.release(ticket)
    tiers.release(ticket)
    with pytest.raises(TierError, match="is not pinned"):
        tiers.frame(keys[0])
    tiers.demote(keys[:4])
    assert tiers.resident_bytes == 0


def test_a_refused_fetch_pins_nothing(tiers, keys):
    with pytest.raises(TierError, match="are pinned"):
        tiers.fetch(keys[:5])
    with pytest.raises(KVStoreError, match="there is no extent"):
        tiers.fetch([keys[0], ExtentKey(1, 9, 9)])
    tiers.demote(keys)
    assert [first_byte(tiers, key) for key in keys] == list(range(8))


def test_flushed_extents_leave_without_a_write(tiers, keys):
    tiers.flush(keys)
    written, clean = tiers.counters.bytes_written, tiers.counters.clean_evictions
    tiers.demote(keys)
    assert tiers.counters.bytes_written == written
    assert tiers.counters.clean_evictions == clean + 4


def test_a_full_disk_refuses_and_keeps_what_is_in_memory(tiers, keys, io):
    tiers.demote(keys)
    io.full = True
    for value in range(4, 8):
        put(tiers, keys[value], value)
    for act in (lambda: tiers.fetch([keys[0]]), lambda: tiers.demote([keys[7]]), lambda: tiers.flush(keys)):
        with pytest.raises(ExtentError, match="the disk is full"):
            act()
    assert [first_byte(tiers, key) for key in keys[4:]] == [4, 5, 6, 7]
    io.full = False
    assert [first_byte(tiers, key) for key in keys] == list(range(8))


@pytest.mark.parametrize(("fault", "said"), [("full", "the disk is full"), ("short", "short, 0 of")])
def test_a_write_ahead_that_fails_is_told_to_its_session_alone(tmp_path, fault, said):
    ios = [FaultyIO(), FaultyIO()]
    order = iter(ios)
    threads = PromptThreads()
    tiers = TierManager(4 * SIZE, SIZE, lambda: ExtentFile(tmp_path / "kv", SIZE, next(order)), threads)
    first, second = (
        [ExtentKey(session, 0, run) for run in range(6)]
        for session in (tiers.open_session(), tiers.open_session())
    )
    setattr(ios[0], fault, True)
    for value, key in enumerate(first[:2]):
        put(tiers, key, value)
    for value, key in enumerate(second):
        put(tiers, key, 10 + value)
    assert tiers.counters.failed == 2
    assert [first_byte(tiers, key) for key in second] == list(range(10, 16))
    assert [first_byte(tiers, key) for key in first[:2]] == [0, 1], "what cannot be written stays"
    assert [first_byte(tiers, key) for key in second] == list(range(10, 16))

    def fill() -> None:
        for value in range(2, 6):
            put(tiers, first[value], value)

    with pytest.raises(ExtentError, match=said):
        fill()
    setattr(ios[0], fault, False)
    fill()
    assert [first_byte(tiers, key) for key in second + first] == [*range(10, 16), *range(6)]
    tiers.close()
    threads.close()


def test_an_extent_that_changes_while_it_is_written_stays_changed():
    begun, go = threading.Event(), threading.Event()

    class Slow(HostExtents):
        def write(self, extent, version, data):
            if extent.run == 0 and not begun.is_set():
                data = data.clone()
                begun.set()
                assert go.wait(30)
            return super().write(extent, version, data)

    threads = TransferThreads(1)
    tiers = TierManager(4 * SIZE, SIZE, Slow, threads)
    session = tiers.open_session()
    keys = [ExtentKey(session, 0, run) for run in range(5)]
    for run in (4, 0, 1, 2):
        put(tiers, keys[run], 1)
    assert begun.wait(30), "written ahead"
    put(tiers, keys[3], 1)
    others = tiers.fetch(keys[1:4])
    tiers.wait(others)
    dropped = tiers.counters.dropped
    assert tiers.prefetch([keys[4]]).keys == ()
    assert tiers.counters.dropped == dropped + 1, "nothing else takes its frame meanwhile"
    tiers.release(others)
    put(tiers, keys[0], 2)
    go.set()
    tiers.demote(keys[:1])
    assert first_byte(tiers, keys[0]) == 2
    tiers.close()
    threads.close()


def test_a_read_that_fails_leaves_those_beside_it_whole():
    class Bad(HostExtents):
        def read_all(self, extents, outs):
            good = [i for i, extent in enumerate(extents) if extent.run != 1]
            super().read_all([extents[i] for i in good], [outs[i] for i in good])
            return {extent: ExtentError("extent 1 is lost") for extent in extents if extent.run == 1}

    tiers = TierManager(4 * SIZE, SIZE, Bad)
    session = tiers.open_session()
    keys = [ExtentKey(session, 0, run) for run in range(3)]
    for value, key in enumerate(keys):
        put(tiers, key, value)
    tiers.demote(keys)
    hint = tiers.prefetch(keys)
    assert len(hint.jobs) == 2
    assert first_byte(tiers, keys[0]) == 0, "of the transfer with extent 1"
    with pytest.raises(ExtentError, match="extent 1 is lost"):
        tiers.wait(hint)
    assert (tiers.counters.failed, tiers.counters.bytes_read) == (1, 2 * SIZE)
    with pytest.raises(ExtentError, match="extent 1 is lost"):
        first_byte(tiers, keys[1])
    tiers.close()


def test_a_failed_read_reaches_whoever_waits_and_leaves_no_pin(tiers, keys, io):
    tiers.demote(keys[:7])
    io.broken = True
    ticket = tiers.prefetch([keys[0]])
    with pytest.raises(ExtentError, match="Input/output error"):
        tiers.wait(ticket)
    with (
        pytest.raises(ExtentError, match="Input/output error"),
        tiers.resident([keys[7], keys[1]]),
    ):
        pytest.fail("a read that failed was taken for good")
    assert tiers.counters.failed == 2
    io.broken = False
    tiers.demote(keys)
    assert [first_byte(tiers, key) for key in keys] == list(range(8))


def test_a_late_prefetch_is_waited_for_and_counted():
    tiers = TierManager(SIZE, SIZE, lambda: SimLink(1e12, 0.3))
    session = tiers.open_session()
    keys = [ExtentKey(session, 0, run) for run in range(2)]
    for value, key in enumerate(keys):
        put(tiers, key, value)
    tiers.flush(keys[1:])
    tiers.prefetch([keys[0]])
    # The one frame is under way: neither a demand for it nor one for another extent may go wrong.
    assert first_byte(tiers, keys[0]) == 0
    assert tiers.counters.late == 1
    tiers.prefetch([keys[1]])
    assert first_byte(tiers, keys[0]) == 0
    assert tiers.counters.misses == 1
    tiers.prefetch([keys[1]])
    tiers.demote(keys)
    tiers.prefetch([keys[0]])
    tiers.close()
    with pytest.raises(KVStoreError, match="not open"):
        put(tiers, ExtentKey(session, 0, 0), 1)


def test_a_budget_below_one_extent_is_refused():
    with pytest.raises(KVStoreError, match=f"fast_bytes = {SIZE - 1}"):
        TierManager(SIZE - 1, SIZE, HostExtents)


def random_schedule(seed: int, tiers: TierManager, faults: bool) -> None:
    """60 steps of write, pin, fetch, demote, prefetch, flush, drop on 2 sessions against an oracle."""
    choose = random.Random(seed)
    sessions = [tiers.open_session() for _ in range(2)]
    names = [ExtentKey(session, layer, run) for session in sessions for layer in (0, 1) for run in range(3)]
    oracle: dict[ExtentKey, torch.Tensor] = {}
    pinned: list = []

    def step() -> None:
        key, known = choose.choice(names), sorted(oracle)
        act = choose.choice(
            ("edit", "edit", "read", "read", "pin", "release", "demote", "hint", "flush", "drop")
        )
        if act == "edit":
            with tiers.edit(key) as frame:
                assert torch.equal(frame, oracle.get(key, torch.zeros(SIZE, dtype=torch.uint8)))
                start = choose.randrange(SIZE - 64)
                frame[start : start + 64] = choose.randrange(256)
                oracle[key] = frame.clone()
        elif act == "release" and pinned:
            ticket = pinned.pop(choose.randrange(len(pinned)))
            for key in ticket.keys:
                assert torch.equal(tiers.frame(key), oracle[key])
            tiers.release(ticket)
        elif act == "drop" and key in oracle:
            tiers.drop(key)
            del oracle[key]
        elif known:
            some = choose.sample(known, min(len(known), choose.randint(1, 3)))
            if act == "read":
                with tiers.resident(some) as frames:
                    assert all(torch.equal(f, oracle[k]) for f, k in zip(frames, some, strict=True))
            elif act == "pin" and len(pinned) < 2:
                ticket = tiers.fetch(some[:1])
                tiers.wait(ticket)
                pinned.append(ticket)
            elif act == "hint":
                tiers.prefetch(some)
            elif act in ("demote", "flush"):
                getattr(tiers, act)(some)

    for _ in range(60):
        problem: KVStoreError | None = None
        try:
            step()
        except KVStoreError as error:
            problem = error
        # Legal at any step: a refusal over a pinned extent, and a full disk where there are faults.
        if isinstance(problem, TierError):
            assert pinned or faults
        elif problem is not None:
            assert faults
            assert "the disk is full" in str(problem)
        assert tiers.resident_bytes <= tiers.frames * SIZE
    for ticket in pinned:
        tiers.release(ticket)
    for key in oracle:
        for _ in range(200 if faults else 1):
            try:
                with tiers.resident([key]) as (frame,):
                    assert torch.equal(frame, oracle[key])
                break
            except ExtentError:
                assert faults
        else:
            pytest.fail("an extent never came back")
    for session in sessions:
        tiers.close_session(session)
    assert tiers.resident_bytes == 0


@pytest.mark.parametrize("faults", [False, True])
def test_100_random_schedules_equal_an_oracle(tmp_path, faults):
    threads, ahead = TransferThreads(), 0
    for seed in range(100):
        io = FaultyIO(seed if faults else None)
        tiers = TierManager(4 * SIZE, SIZE, lambda io=io: ExtentFile(tmp_path / "kv", SIZE, io), threads)
        random_schedule(seed, tiers, faults)
        ahead += tiers.counters.written_ahead
        tiers.close()
    threads.close()
    assert ahead > 100


@pytest.mark.parametrize("tier", ["disk", "host", "emulated"])
def test_all_in_memory_and_all_on_a_slow_tier_are_bitwise_equal(tmp_path, tier):
    stores = {
        "disk": lambda: ExtentFile(tmp_path / "kv", SIZE),
        "host": HostExtents,
        "emulated": lambda: SimLink(1e10, 1e-4),
    }
    generator = torch.Generator().manual_seed(0)
    contents = torch.randn(24, SIZE // 4, generator=generator)

    def result(frames: int) -> torch.Tensor:
        tiers = TierManager(frames * SIZE, SIZE, stores[tier])
        session = tiers.open_session()
        keys = [ExtentKey(session, layer, run) for layer in range(4) for run in range(6)]
        for key, values in zip(keys, contents, strict=True):
            with tiers.edit(key) as frame:
                frame.view(torch.float32).copy_(values)
        total = torch.zeros(SIZE // 4)
        for at, key in enumerate(keys):
            tiers.prefetch(keys[at + 1 : at + 2])
            with tiers.resident([key]) as (frame,):
                total = total * 0.7 + frame.view(torch.float32).sin()
        tiers.close()
        return total

    assert torch.equal(result(24), result(2))


def test_threads_on_sessions_of_one_folder_never_meet(tmp_path):
    tiers = TierManager(6 * SIZE, SIZE, lambda: ExtentFile(tmp_path / "kv", SIZE))
    errors: list[BaseException] = []

    def serve(number: int) -> None:
        try:
            session = tiers.open_session()
            keys = [ExtentKey(session, 0, run) for run in range(5)]
            for turn in range(30):
                key = keys[turn % 5]
                put(tiers, key, (number * 64 + turn) % 256)
                tiers.prefetch(keys[: turn % 5])
                if turn >= 5:
                    other = keys[(turn + 1) % 5]
                    assert first_byte(tiers, other) == (number * 64 + turn - 4) % 256
            tiers.close_session(session)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not errors
    assert tiers.resident_bytes == 0
    tiers.close()


PROCESS = """
import hashlib, sys
from pathlib import Path
from tilewright.runtime.kv_store.extents import ExtentFile
from tilewright.runtime.kv_store.tier import TierManager
from tilewright.runtime.kv_store.tier_state import ExtentKey
seed, size = int(sys.argv[2]), int(sys.argv[3])
tiers = TierManager(2 * size, size, lambda: ExtentFile(Path(sys.argv[1]), size))
session = tiers.open_session()
keys = [ExtentKey(session, 0, run) for run in range(20)]
for key in keys:
    with tiers.edit(key) as frame:
        frame.fill_(seed + key.run)
digest = hashlib.sha256()
for _ in range(3):
    for key in keys:
        with tiers.resident([key]) as (frame,):
            digest.update(frame.numpy().tobytes())
print(digest.hexdigest())
"""


def test_two_processes_on_one_folder_keep_their_own(tmp_path):
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "kv")]
    running = [
        subprocess.Popen([*command, str(seed), str(SIZE)], stdout=subprocess.PIPE, text=True)
        for seed in (10, 100)
    ]
    for seed, process in zip((10, 100), running, strict=True):
        output, _ = process.communicate(timeout=120)
        expected = hashlib.sha256(b"".join(bytes([seed + run]) * SIZE for run in range(20)) * 3).hexdigest()
        assert output.strip() == expected
    # They ended without closing their sessions; nothing stays behind.
    assert os.listdir(tmp_path / "kv") == []


def test_a_demand_overtakes_prefetches():
    tiers = TierManager(20 * SIZE, SIZE, lambda: SimLink(1e12, 0.04))
    session = tiers.open_session()
    keys = [ExtentKey(session, 0, run) for run in range(20)]
    for value, key in enumerate(keys):
        put(tiers, key, value)
    tiers.demote(keys)
    hint = tiers.prefetch(keys)
    assert len(hint.jobs) == 5
    demand = tiers.fetch([keys[19]], Urgency.DEMAND)
    tiers.wait(demand)
    assert not hint.done
    tiers.release(demand)
    tiers.close()
