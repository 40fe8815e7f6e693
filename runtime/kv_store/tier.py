"""A fast tier of fixed size before a slow one: who is resident, who is pinned, and what moves.

Contents are extents (uint8, one size), named by session, layer and run of pages. Placement never changes a
byte: an extent is read where it lies, in its frame, and comes back from the slow tier as it was written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.extents import ExtentError, ExtentStore, aligned
from tilewright.runtime.kv_store.replacement import Replacement
from tilewright.runtime.kv_store.tier_state import Begun, ExtentKey, Fetch, Placed, Reading, TierCounters
from tilewright.runtime.kv_store.transfers import Job, TransferThreads, Urgency


class TierError(KVStoreError):
    """The fast tier cannot do what was asked: all frames are pinned, or an extent to be evicted is."""


class TierManager:
    """Frames of the fast tier; `Replacement` says who leaves. Safe to use from several threads.

    Transfers run on the transfer threads. Changed extents are written ahead until half of the frames could be
    had without a write; one that comes to its eviction unwritten is written by the thread that asks for the
    frame, with the manager held, and only for a demand.
    A write ahead that fails leaves its extent as it was, resident and changed: the error is that of the
    write at its eviction, which only its own session makes; another session takes another extent.
    """

    def __init__(
        self,
        fast_bytes: int,
        extent_bytes: int,
        open_store: Callable[[], ExtentStore],
        threads: TransferThreads | None = None,
    ) -> None:
        """fast_bytes: most bytes ever resident; open_store: makes the slow tier of one session.

        KVStoreError where fast_bytes is below one extent.
        """
        if extent_bytes < 1 or fast_bytes < extent_bytes:
            raise KVStoreError(f"fast_bytes = {fast_bytes}: expected an extent or more, {extent_bytes} bytes")
        self.extent_bytes = extent_bytes
        self.counters = TierCounters()
        self.frames = fast_bytes // extent_bytes
        self.memory = aligned(self.frames * extent_bytes).view(self.frames, extent_bytes)
        """The frames; only those of pinned extents may be read."""
        self._views = self.memory.unbind()
        self._free = list(range(self.frames))
        self._extents: dict[ExtentKey, Placed] = {}
        self._order = Replacement(self.frames)
        self._writes = 0
        """Under way."""
        self._evicted = 0
        """When one was last evicted, counted in extents asked for."""
        self._stores: dict[int, ExtentStore] = {}
        self._sessions = 0
        self._open_store = open_store
        self._threads = threads or TransferThreads()
        self._owns_threads = threads is None
        self._changed = threading.Condition(threading.RLock())

    @property
    def resident_bytes(self) -> int:
        """Bytes of the frames in use."""
        return (self.frames - len(self._free)) * self.extent_bytes

    def open_session(self) -> int:
        """A new session with a slow tier of its own."""
        store = self._open_store()
        with self._changed:
            self._sessions += 1
            self._stores[self._sessions] = store
            return self._sessions

    def close_session(self, session: int) -> None:
        """Forget all extents of a session. TierError where one is pinned."""
        with self._changed:
            if session not in self._stores:
                raise KVStoreError(f"session {session} is not open")
            keys = [key for key in self._extents if key.session == session]
            self._refuse_pinned(keys, "closing the session of")
            for key in keys:
                self.drop(key)
            self._stores.pop(session).close()

    def close(self) -> None:
        """Close every session and the threads, if they are this manager's own."""
        for session in tuple(self._stores):
            self.close_session(session)
        if self._owns_threads:
            self._threads.close()

    @contextmanager
    def edit(self, key: ExtentKey) -> Iterator[Tensor]:
        """The frame of an extent, uint8 [extent_bytes], to be changed: made of zeros if the extent is new.

        TierError without a free frame, ExtentError where it cannot be read.
        """
        with self._changed:
            new = key not in self._extents and self._create(key)
            ticket = Fetch([key], [], pinned=True) if new else self.fetch([key])
        self.wait(ticket)
        try:
            yield self.frame(key)
        finally:
            with self._changed:
                entry = self._extents[key]
                entry.version += 1
                entry.dirty = True
                self.release(ticket)

    @contextmanager
    def resident(self, keys: Sequence[ExtentKey]) -> Iterator[list[Tensor]]:
        """The frames of extents, uint8 [extent_bytes] each, to be read; pinned meanwhile."""
        ticket = self.fetch(keys)
        self.wait(ticket)
        try:
            yield [self.frame(key) for key in keys]
        finally:
            self.release(ticket)

    def fetch(self, keys: Sequence[ExtentKey], urgency: Urgency = Urgency.DEMAND) -> Fetch:
        """Begin to make extents resident. On demand they are pinned, from now until `release`.

        A prefetch pins nothing, and ends before the first extent that finds no frame; the rest is counted.
        KVStoreError for an unknown extent, TierError where a demand finds every frame pinned: nothing is
        pinned then.
        """
        demand = urgency is Urgency.DEMAND
        jobs: dict[Job, None] = {}
        with self._changed:
            entries = self._known(keys)
            begun, here = Begun(sum([entry.frame is None for entry in entries])), 0
            try:
                for key, entry in zip(keys, entries, strict=True):
                    if not self._begin(key, entry, urgency, begun):
                        self.counters.dropped += len(keys) - here
                        break
                    if entry.loading is not None:
                        jobs[entry.loading] = None
                    here += 1
            except KVStoreError:
                if demand:
                    self._unpin(keys[:here])
                raise
            finally:
                self._submit(begun)
        return Fetch(keys[:here], list(jobs), pinned=demand)

    def prefetch(self, keys: Sequence[ExtentKey]) -> Fetch:
        """A hint: begin to make extents resident, after everything asked for on demand."""
        return self.fetch(keys, Urgency.PREFETCH)

    def wait(self, ticket: Fetch) -> None:
        """Wait for a fetch. On an error its pins are given back and the error is raised."""
        try:
            ticket.wait()
        except Exception:
            self.release(ticket)
            raise

    def release(self, ticket: Fetch) -> None:
        """Unpin what a fetch pinned; twice is fine."""
        with self._changed:
            if ticket.pinned:
                ticket.pinned = False
                self._unpin(ticket.keys)

    def frame(self, key: ExtentKey) -> Tensor:
        """The frame of a pinned extent, uint8 [extent_bytes]; TierError where it is not pinned."""
        return self._views[self.places([key])[0]]

    def places(self, keys: Sequence[ExtentKey]) -> list[int]:
        """The numbers of the frames of pinned extents; TierError where one is not pinned."""
        found = []
        with self._changed:
            for key in keys:
                entry = self._extents.get(key)
                if entry is None or entry.frame is None or entry.loading is not None or not entry.pins:
                    raise TierError(f"extent {tuple(key)} is not pinned in the fast tier: fetch it and wait")
                found.append(entry.frame)
        return found

    def demote(self, keys: Sequence[ExtentKey]) -> None:
        """Move extents to the slow tier; only what it lacks is written. TierError where one is pinned."""
        with self._changed:
            self._refuse_pinned(keys, "evicting")
            for key in keys:
                entry = self._settled(key)
                self._refuse_pinned([key], "evicting")  # again: settling may have let another thread in
                if entry.frame is not None:
                    self._evict(key, entry)

    def flush(self, keys: Sequence[ExtentKey]) -> None:
        """Write changed extents to the slow tier and keep them resident: their eviction is free then."""
        with self._changed:
            for key in keys:
                self._write_back(key, self._settled(key))

    def drop(self, key: ExtentKey) -> None:
        """Forget an extent in both tiers. TierError where it is pinned."""
        with self._changed:
            entry = self._settled(key)
            self._refuse_pinned([key], "dropping")
            if entry.frame is not None:
                self._vacate(key, entry)
            del self._extents[key]
            self._stores[key.session].drop(key)

    def _create(self, key: ExtentKey) -> bool:
        """Make an extent of zeros, pinned once; False where another thread made it meanwhile. Runs held."""
        if key.session not in self._stores:
            raise KVStoreError(f"session {key.session} is not open")
        frame = self._await_frame(key)
        if key in self._extents or key.session not in self._stores:
            self._free.append(frame)
            return False
        self._views[frame].zero_()
        self._extents[key] = entry = Placed(frame, pins=1)
        self._order.ask(key, entry)
        self._submit(Begun())
        return True

    def _known(self, keys: Sequence[ExtentKey]) -> list[Placed]:
        try:
            return [self._extents[key] for key in keys]
        except KeyError as error:
            raise KVStoreError(f"there is no extent {tuple(error.args[0])}") from None

    def _begin(self, key: ExtentKey, entry: Placed, urgency: Urgency, begun: Begun) -> bool:
        """Whether an extent is resident or on its way, and pinned on demand; False for want of a frame. Runs
        held."""
        demand = urgency is Urgency.DEMAND
        if entry.frame is None:
            frame = self._await_frame(key) if demand else self._take_frame(key, urgency)
            if frame is None:
                return False
            if self._extents.get(key) is not entry:
                self._free.append(frame)
                raise KVStoreError(f"extent {tuple(key)} was dropped while it was fetched")
            if entry.frame is not None:  # another thread fetched it while this one waited
                self._free.append(frame)
                return self._begin(key, entry, urgency, begun)
            self.counters.misses += demand
            self.counters.prefetched += not demand
            entry.frame = frame
            begun.read(key, entry, urgency, self._read)
        elif entry.loading is None:
            self.counters.hits += demand
        elif demand:
            self.counters.late += 1
            begun.queue[entry.loading] = urgency  # before the other prefetches
        if demand:
            entry.pins += 1
            self._order.ask(key, entry)
        else:
            self._order.announce(key, entry)
        return True

    def _unpin(self, keys: Sequence[ExtentKey]) -> None:
        for key in keys:
            entry = self._extents[key]
            entry.pins -= 1
            if not entry.pins and entry.frame is not None:
                self._order.rest(key, entry)

    def _read(self, job: Reading) -> None:
        with self._changed:
            job.begun = True
            store = self._stores[job.session]
        try:
            job.read(store, self._views)
        finally:
            with self._changed:
                for key, entry in job.parts:
                    entry.loading = None
                    if key in job.whole:
                        self.counters.bytes_read += self.extent_bytes
                    else:
                        self.counters.failed += 1
                        self._vacate(key, entry)
                self._changed.notify_all()

    def _submit(self, begun: Begun) -> None:
        """Hand transfers to the threads, with writes ahead while extents are evicted at all."""
        if not self._free and self._order.asked - self._evicted <= self.frames:
            lacking = max(1, self.frames // 2) - len(self._order.clean) - self._writes
            for key, entry in self._order.to_write(lacking):
                entry.tried = entry.version
                entry.writing = self._writing(key, entry)
                begun.queue[entry.writing] = Urgency.WRITE
                self._writes += 1
        if begun.queue:
            self._threads.submit(begun.queue.items())

    def _writing(self, key: ExtentKey, entry: Placed) -> Job:
        assert entry.frame is not None
        store, memory = self._stores[key.session], self._views[entry.frame]

        def write() -> None:
            version, done, written = entry.version, False, False
            try:
                written = store.write(key, version, memory)
                done = True
            finally:
                with self._changed:
                    entry.writing = None
                    self._writes -= 1
                    self.counters.failed += not done
                    self.counters.written_ahead += written
                    self.counters.bytes_written += self.extent_bytes if written else 0
                    if done and entry.version == version:
                        self._clean(key, entry)
                    self._changed.notify_all()

        return Job(write)

    def _await_frame(self, key: ExtentKey) -> int:
        """A frame, waiting for prefetches under way if there is no other; TierError where all are pinned."""
        while (frame := self._take_frame(key, Urgency.DEMAND)) is None:
            if not any(e.moving and not e.pins for e in self._extents.values()):
                raise TierError(
                    f"no frame for extent {tuple(key)}: all {self.frames} of the fast tier are pinned, or of "
                    "other sessions that cannot write them"
                )
            self._changed.wait()
        return frame

    def _take_frame(self, wanted: ExtentKey, urgency: Urgency) -> int | None:
        """A free frame, evicting an extent that may go; None where none may.

        ExtentError where it is of the session of `wanted` and cannot be written.
        """
        if self._free:
            return self._free.pop()
        if (first := self._order.first_clean()) is not None:
            self._evict(first, self._extents[first])
            return self._free.pop()
        for key in self._order.victims(urgency is Urgency.DEMAND):
            try:
                self._evict(key, self._extents[key])
                break
            except ExtentError:
                if key.session == wanted.session:
                    raise  # another session is told when it asks for a frame itself
        return self._free.pop() if self._free else None

    def _evict(self, key: ExtentKey, entry: Placed) -> None:
        if not self._write_back(key, entry):
            self.counters.clean_evictions += 1
        self._evicted = self._order.asked
        self._vacate(key, entry)

    def _write_back(self, key: ExtentKey, entry: Placed) -> bool:
        """Whether anything was written; on an error the extent stays resident and changed."""
        if not entry.dirty or entry.frame is None:
            return False
        written = self._stores[key.session].write(key, entry.version, self._views[entry.frame])
        self._clean(key, entry)
        self.counters.bytes_written += self.extent_bytes if written else 0
        return written

    def _clean(self, key: ExtentKey, entry: Placed) -> None:
        """The slow tier has an extent as it is."""
        entry.dirty = False
        if entry.order is self._order.changed:
            self._order.rest(key, entry)

    def _vacate(self, key: ExtentKey, entry: Placed) -> None:
        if entry.frame is not None:
            self._free.append(entry.frame)
            entry.frame = None
            self._order.leave(key, entry)

    def _settled(self, key: ExtentKey) -> Placed:
        """An extent that nothing is moving; KVStoreError where it does not exist."""
        while (entry := self._known([key])[0]).moving:
            self._changed.wait()
        return entry

    def _refuse_pinned(self, keys: Sequence[ExtentKey], what: str) -> None:
        for key in keys:
            if (entry := self._extents.get(key)) is not None and entry.pins:
                raise TierError(f"{what} extent {tuple(key)}, which is pinned {entry.pins} times, is refused")
