"""Time page reads of the disk tier on this machine: both sides in turn in one process, the least counts.

Prefetched: an extent whose read has ended, pinned and copied out, over a copy of as many bytes in memory.
Cold: extents that are not resident, fetched on demand, over plain reads of a like file past the page cache on
one thread. Neither side of a pair finds its bytes in the page cache of this system; what lies below it (a
hypervisor, a disk with a cache) serves both alike.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tilewright.runtime.kv_store.extents import ExtentFile, aligned, checksum
from tilewright.runtime.kv_store.tier import TierManager
from tilewright.runtime.kv_store.tier_state import ExtentKey

GOALS = {"prefetched": 2.2, "cold": 1.1}
"""The most that a read may take over its other side."""
BATCH = 16
"""Extents of one turn."""


class PlainFile:
    """As many extents in a file that is read by nothing but pread past the page cache."""

    def __init__(self, path: Path, extents: int, size: int) -> None:
        self.size = size
        buffers = aligned(4 * BATCH * size).view(-1, size).random_(0, 256)
        self.views = [memoryview(buffer.numpy()) for buffer in buffers]  # type: ignore[arg-type]
        self.turn = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECT
        self.fd = os.open(path, flags, 0o600)
        for extent in range(extents):
            os.pwrite(self.fd, self.views[extent % len(self.views)], extent * size)

    def read(self, extents: list[int]) -> None:
        """Read extents one after another, into as many buffers as the tier has frames."""
        for extent in extents:
            self.turn = (self.turn + 1) % len(self.views)
            if os.preadv(self.fd, [self.views[self.turn]], extent * self.size) != self.size:
                raise OSError("a plain read was short")


def seconds(work: Callable[[], object]) -> float:
    """What one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_resident(tiers: TierManager, keys: list[ExtentKey], out: Tensor) -> None:
    """Copy extents out, one at a time as a decoder step asks."""
    for key in keys:
        with tiers.resident([key]) as (frame,):
            out.copy_(frame)


def use_resident(tiers: TierManager, keys: list[ExtentKey]) -> None:
    """Pin extents and read nothing: what the bookkeeping costs where attention reads frames in place."""
    for key in keys:
        with tiers.resident([key]):
            pass


def fetch_cold(tiers: TierManager, keys: list[ExtentKey]) -> None:
    """Fetch a batch on demand and wait for all of it."""
    with tiers.resident(keys):
        pass


def fetch_singly(tiers: TierManager, keys: list[ExtentKey]) -> None:
    """Fetch and wait for one extent after another."""
    for key in keys:
        fetch_cold(tiers, [key])


def measure(folder: Path, size: int, extents: int, rounds: int) -> dict[str, float]:
    """Seconds per extent of every side: the least over the rounds."""
    tiers = TierManager(4 * BATCH * size, size, lambda: ExtentFile(folder, size))
    session = tiers.open_session()
    keys = [ExtentKey(session, 0, run) for run in range(extents)]
    source, out = torch.randint(0, 256, (extents, size), dtype=torch.uint8), aligned(size)
    for key in keys:
        with tiers.edit(key) as frame:
            frame.copy_(source[key.run])
    tiers.demote(keys)
    plain = PlainFile(folder / "plain", extents, size)
    least: dict[str, float] = {}
    choose = random.Random(0)

    def copy_plain(some: list[ExtentKey]) -> None:
        for key in some:
            out.copy_(source[key.run])

    for turn in range(rounds):
        some = choose.sample(keys, BATCH)
        other = choose.sample(range(extents), BATCH)
        tiers.demote(keys)
        cold: dict[str, Callable[[], object]] = {
            "cold batch": lambda some=some: fetch_cold(tiers, some),  # type: ignore[misc]
            "plain batch": lambda other=other: plain.read(other),  # type: ignore[misc]
        }
        single: dict[str, Callable[[], object]] = {
            "cold single": lambda some=some: fetch_singly(tiers, some),  # type: ignore[misc]
            "plain single": cold["plain batch"],
        }
        warm: dict[str, Callable[[], object]] = {
            "prefetched": lambda some=some: read_resident(tiers, some, out),  # type: ignore[misc]
            "memory copy": lambda some=some: copy_plain(some),  # type: ignore[misc]
            "in place": lambda some=some: use_resident(tiers, some),  # type: ignore[misc]
            "checksum": lambda some=some: [checksum(source[key.run]) for key in some],  # type: ignore[misc]
        }
        for group in (cold, single, warm):
            tiers.demote(keys)
            if group is warm:
                tiers.wait(tiers.prefetch(some))
            for name in sorted(group, reverse=bool(turn % 2)):
                torch.empty(16 << 20, dtype=torch.uint8).fill_(turn)  # no side finds its bytes in a cache
                least[name] = min(least.get(name, 1e9), seconds(group[name]) / BATCH)
    tiers.close()
    os.close(plain.fd)
    return least


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="bench_kv_tier", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kib", type=int, default=256, help="size of an extent")
    parser.add_argument("--extents", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        least = measure(folder, options.kib << 10, options.extents, options.rounds)
    finally:
        shutil.rmtree(folder)
    size = options.kib << 10
    for name, time_of in least.items():
        print(f"{name:<12} {time_of * 1e6:>8.1f} us {size / time_of / 1e9:>7.2f} GB/s")
    ratios = {
        "prefetched": least["prefetched"] / least["memory copy"],
        "cold": least["cold batch"] / least["plain batch"],
    }
    for name, ratio in ratios.items():
        print(f"{name:<12} {ratio:.2f}, goal <= {GOALS[name]}{' MISSED' if ratio > GOALS[name] else ''}")
    print(f"cold, one at a time {least['cold single'] / least['plain single']:.2f} (no goal)")
    print(f"checksum {least['checksum'] / least['cold single']:.2f} of a cold read, one at a time")
    return int(any(ratio > GOALS[name] for name, ratio in ratios.items()))


if __name__ == "__main__":
    sys.exit(main())
