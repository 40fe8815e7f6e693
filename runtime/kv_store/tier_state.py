"""What a fast tier keeps of every extent, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tilewright.runtime.kv_store.transfers import Job, Ticket


class ExtentKey(NamedTuple):
    """Names an extent."""

    session: int
    layer: int
    run: int
    """Which run of pages of the layer."""


@dataclass
class TierCounters:
    """What moved; bytes and numbers of extents."""

    hits: int = 0
    """Asked for on demand and resident."""
    misses: int = 0
    """Asked for on demand and neither resident nor on its way."""
    late: int = 0
    """Asked for on demand while an earlier read of it was still under way."""
    prefetched: int = 0
    dropped: int = 0
    """Prefetches given up for want of a frame."""
    failed: int = 0
    """Reads, and writes ahead of an eviction, that ended in an error."""
    bytes_read: int = 0
    bytes_written: int = 0
    clean_evictions: int = 0
    """Evicted without a write: the slow tier had that version already."""
    written_ahead: int = 0
    """Written by the transfer threads before anything needed the frame."""


@dataclass
class Placed:
    """Where an extent is, and what happens to it."""

    frame: int | None = None
    version: int = 0
    dirty: bool = False
    pins: int = 0
    loading: Job | None = None
    writing: Job | None = None
    """A write of it that is queued or under way: it stays in its frame meanwhile, and may change."""
    used: int = 0
    """When it was last asked for, in requests."""

    @property
    def moving(self) -> bool:
        """Whether a transfer of it is queued or under way."""
        return self.loading is not None or self.writing is not None


class Fetch(Ticket):
    """The ticket of a fetch: on demand it pins its extents until `TierManager.release`."""

    def __init__(self, keys: Sequence[ExtentKey], jobs: list[Job], *, pinned: bool) -> None:
        super().__init__(jobs)
        self.keys = tuple(keys)
        self.pinned = pinned
