"""Transfers on threads of their own, the most urgent first, and the tickets that wait for them."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from enum import IntEnum

from tilewright.runtime.kv_store.errors import KVStoreError

THREADS = 2
"""One reads while the other checks what it read; more gain nothing on one disk."""


class Urgency(IntEnum):
    """Order of transfers."""

    DEMAND = 0
    """Somebody waits for it."""
    WRITE = 1
    """An extent that is to be evicted soon and has changed: few, and behind all prefetches too late."""
    PREFETCH = 2


class Job:
    """One transfer: waiting, running or done."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._claim = threading.Lock()
        self._done = threading.Event()
        self.error: Exception | None = None
        """What the work raised, for whoever waits."""

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def run(self) -> None:
        """Do it, unless another thread did: an urgent job stands in the queue twice."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._work()
        except Exception as error:
            self.error = error  # raised again by Ticket.wait, on the thread that asked
        finally:
            self._done.set()

    def wait(self, timeout: float | None) -> bool:
        """Whether it ended within `timeout` seconds."""
        return self._done.wait(timeout)


class Ticket:
    """The transfers of one request."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for."""
        return all(job.done for job in self.jobs)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for all; raises the first error, or KVStoreError after `timeout` seconds each.

        Without a timeout the caller does what no thread has begun yet: waking another costs a read's time.
        """
        for job in self.jobs if timeout is None else ():
            job.run()
        for job in self.jobs:
            if not job.wait(timeout):
                raise KVStoreError(f"a transfer took more than {timeout} s")
        for job in self.jobs:
            if job.error is not None:
                raise job.error


class TransferThreads:
    """Threads that run jobs; equal urgency runs in order of arrival."""

    def __init__(self, threads: int = THREADS) -> None:
        self._queue: list[tuple[int, int, Job]] = []
        self._order = itertools.count()
        self._ready = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"kv-transfer-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Iterable[tuple[Job, Urgency]]) -> None:
        """Queue jobs. A job that waits already may be queued again, more urgent."""
        with self._ready:
            if self._closed:
                raise KVStoreError("the transfer threads are closed")
            for job, urgency in jobs:
                heapq.heappush(self._queue, (int(urgency), next(self._order), job))
            if self._queue:
                self._ready.notify()  # one: a thread that finds more wakes the next, not who submits

    def close(self) -> None:
        """Finish what is queued and end the threads; twice is fine."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                job = heapq.heappop(self._queue)[2]
                if self._queue:
                    self._ready.notify()
            job.run()
