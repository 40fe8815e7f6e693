"""Slow tiers in memory: host memory as it is, and a throttled copy that stands in for a bus or a disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.extents import ExtentError


class HostExtents:
    """Extents of one session in ordinary memory, outside the frames of the fast tier."""

    label = "host memory"

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[int, Tensor]] = {}

    def write(self, extent: Hashable, version: int, data: Tensor) -> bool:
        """Keep a copy; False where this version is kept already."""
        old = self._kept.get(extent)
        if old is not None and old[0] == version:
            return False
        kept = data.clone() if old is None else old[1].copy_(data)
        self._kept[extent] = (version, kept)
        return True

    def read(self, extent: Hashable, out: Tensor) -> None:
        """Fill `out`; ExtentError where the extent is absent."""
        for error in self.read_all([extent], [out]).values():
            raise error

    def read_all(self, extents: Sequence[Hashable], outs: Sequence[Tensor]) -> dict[Hashable, ExtentError]:
        """Fill outs[i] with extents[i]; the errors of those that are absent."""
        kept = [self._kept.get(extent) for extent in extents]
        if here := [(out, found[1]) for out, found in zip(outs, kept, strict=True) if found is not None]:
            torch._foreach_copy_([out for out, _ in here], [data for _, data in here])
        return {
            extent: ExtentError(f"extent {extent} is not in the slow tier")
            for extent, found in zip(extents, kept, strict=True)
            if found is None
        }

    def drop(self, extent: Hashable) -> None:
        """Forget an extent; absent is fine."""
        self._kept.pop(extent, None)

    def close(self) -> None:
        """Forget everything."""
        self._kept.clear()


class SimLink(HostExtents):
    """EMULATION of a slow tier: host memory behind a link that carries one transfer at a time.

    A transfer ends `latency` seconds after the link has carried its bytes; transfers queue for the link but
    their latencies overlap, as requests to a device do.
    """

    def __init__(self, bandwidth: float, latency: float) -> None:
        """bandwidth: bytes per second, above 0; latency: seconds, 0 or more. KVStoreError otherwise."""
        super().__init__()
        self.throttle(bandwidth, latency)
        self._lock = threading.Lock()
        self._free_at = 0.0

    def throttle(self, bandwidth: float, latency: float) -> None:
        """Change the link, for the transfers that begin from now on; as `__init__`."""
        if not bandwidth > 0:
            raise KVStoreError(f"bandwidth = {bandwidth}: expected bytes per second above 0")
        if not latency >= 0:
            raise KVStoreError(f"latency = {latency}: expected 0 seconds or more")
        self.bandwidth, self.latency = bandwidth, latency
        self.label = f"emulated link ({bandwidth / 1e9:g} GB/s, {latency * 1e6:g} us)"

    def write(self, extent: Hashable, version: int, data: Tensor) -> bool:
        """As HostExtents.write, over the link."""
        written = super().write(extent, version, data)
        if written:
            self.carry(data.numel())
        return written

    def read_all(self, extents: Sequence[Hashable], outs: Sequence[Tensor]) -> dict[Hashable, ExtentError]:
        """As HostExtents.read_all, over the link: all arrive when the last one does."""
        ends = self._enter(sum(out.numel() for out in outs))
        errors = super().read_all(extents, outs)
        if len(errors) < len(extents):
            _sleep_until(ends)
        return errors

    def carry(self, size: int) -> None:
        """Take the link for `size` bytes, and return when they have arrived."""
        _sleep_until(self._enter(size))

    def _enter(self, size: int) -> float:
        """Take the link for `size` bytes; the time at which the transfer ends."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self.bandwidth
            return self._free_at + self.latency


def _sleep_until(moment: float) -> None:
    if (left := moment - time.monotonic()) > 0:
        time.sleep(left)
