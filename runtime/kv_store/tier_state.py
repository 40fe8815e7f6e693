"""What a fast tier keeps of every extent, and what it counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tilewright.runtime.kv_store.extents import ExtentError, ExtentStore
from tilewright.runtime.kv_store.transfers import THREADS, Job, Ticket, Urgency

TOGETHER = 4
"""Extents of one job at most: a thread that is woken for each costs as much as the transfer."""


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


@dataclass(eq=False)
class Placed:
    """Where an extent is, and what happens to it."""

    frame: int | None = None
    version: int = 0
    dirty: bool = False
    pins: int = 0
    loading: Reading | None = None
    writing: Job | None = None
    """A write of it that is queued or under way: it stays in its frame meanwhile, and may change."""
    tried: int = -1
    """The version that was last to be written ahead."""
    used: int = 0
    """When it was last asked for, counted in extents asked for; 0 for never."""
    announced: int = 0
    """When it was last asked for or announced."""
    order: OrderedDict[ExtentKey, Placed] | None = None
    """Of those that may leave, the order that has it."""

    @property
    def moving(self) -> bool:
        """Whether a transfer of it is queued or under way."""
        return self.loading is not None or self.writing is not None


class Reading(Job):
    """The reads of some extents of one session, each into its frame; one that fails stops no other."""

    def __init__(self, session: int, work: Callable[[Reading], None]) -> None:
        super().__init__(lambda: work(self))
        self.session = session
        self.parts: list[tuple[ExtentKey, Placed]] = []
        self.begun = False
        """No more extents may be added."""
        self.whole: set[ExtentKey] = set()
        self.errors: dict[ExtentKey, ExtentError] = {}

    def read(self, store: ExtentStore, frames: Sequence[Tensor]) -> None:
        """Read everything into its frames, uint8 [extent_bytes] each."""
        keys = [key for key, _ in self.parts]
        outs = [frames[entry.frame] for _, entry in self.parts if entry.frame is not None]
        errors = store.read_all(keys, outs)
        self.whole.update(key for key in keys if key not in errors)
        # Raised by Fetch.wait, for those who asked for these extents.
        self.errors.update((key, errors[key]) for key in keys if key in errors)


class Begun:
    """The transfers that one request begins; reads are in jobs of a few, in as many as there are threads."""

    def __init__(self, reads: int = 0) -> None:
        """reads: about how many extents will be read."""
        self.queue: dict[Job, Urgency] = {}
        self._together = min(-(-reads // THREADS), TOGETHER)
        self._open: Reading | None = None

    def read(self, key: ExtentKey, entry: Placed, urgency: Urgency, work: Callable[[Reading], None]) -> None:
        """Read an extent into its frame, together with others of this request."""
        job = self._open
        if job is None or job.begun or job.session != key.session or len(job.parts) >= self._together:
            self._open = job = Reading(key.session, work)
            self.queue[job] = urgency
        job.parts.append((key, entry))
        entry.loading = job


class Fetch(Ticket):
    """The ticket of a fetch: on demand it pins its extents until `TierManager.release`."""

    def __init__(self, keys: Sequence[ExtentKey], jobs: list[Job], *, pinned: bool) -> None:
        super().__init__(jobs)
        self.keys = tuple(keys)
        """The extents that are resident or on their way; a prefetch ends where no frame is left."""
        self.pinned = pinned

    def wait(self, timeout: float | None = None) -> None:
        """As Ticket.wait; of transfers that others began too, only errors of these extents are raised."""
        super().wait(timeout)
        for job in self.jobs:
            if isinstance(job, Reading):
                for key in job.errors.keys() & self.keys:
                    raise job.errors[key]
