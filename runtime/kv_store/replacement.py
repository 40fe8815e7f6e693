"""Which resident extent leaves a fast tier for one that is wanted.

A step of decode asks for the extents of one layer after another, and so does the next step. In such a round
the least recently used extent is the one wanted soonest: where it goes first and not all have room, every
extent is read in every round. So the most recently used one goes, whose next use is farthest, and what there
is room for beside the layer at work stays. An extent that nobody asked for in some rounds goes before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from tilewright.runtime.kv_store.tier_state import ExtentKey, Placed

ROUNDS = 3
"""An extent is no longer wanted when this many times the mean between two uses of one went by."""
SAMPLES = 32
"""Latest uses over which that mean is taken, more or less."""


class Replacement:
    """The resident extents that no pin holds, in three orders, the earliest first."""

    def __init__(self, frames: int) -> None:
        self.clean: OrderedDict[ExtentKey, Placed] = OrderedDict()
        """Used, and kept by the slow tier as they are."""
        self.changed: OrderedDict[ExtentKey, Placed] = OrderedDict()
        """Used, and to be written before they may leave."""
        self.ahead: OrderedDict[ExtentKey, Placed] = OrderedDict()
        """Announced, and not used since; some are still on their way."""
        self.asked = 0
        """Extents asked for on demand."""
        self._between, self._samples = float(frames), 0
        """Of those, from one use of an extent to the next; a guess while none was used twice."""

    def ask(self, key: ExtentKey, entry: Placed) -> None:
        """An extent is wanted now; it stays until `rest`."""
        self.asked += 1
        if entry.used:
            self._samples = min(self._samples + 1, SAMPLES)
            self._between += (self.asked - entry.used - self._between) / self._samples
        entry.used = entry.announced = self.asked
        self.leave(key, entry)

    def announce(self, key: ExtentKey, entry: Placed) -> None:
        """An extent that is resident, or on its way, will be wanted."""
        entry.announced = self.asked
        if not entry.pins:
            self._move(key, entry, self.ahead)

    def rest(self, key: ExtentKey, entry: Placed) -> None:
        """A resident extent may go: it was the last in use."""
        self._move(key, entry, self.changed if entry.dirty else self.clean)

    def leave(self, key: ExtentKey, entry: Placed) -> None:
        """An extent is in none of the orders: pinned, or no longer resident."""
        if entry.order is not None:
            del entry.order[key]
            entry.order = None

    def victims(self, demand: bool) -> Iterator[ExtentKey]:
        """Extents that may leave, first those that should. For a read ahead none is written, and none that
        was announced goes while it may still be wanted."""
        if (first := self.first_clean()) is not None:
            yield first
        for key, entry in self.ahead.items():
            if not self._is_stale(entry):
                break
            if not entry.moving and not entry.dirty:
                yield key
        if demand:
            for order in (self._in_order(self.changed), iter(self.ahead.items())):
                yield from (key for key, entry in order if not entry.moving)

    def first_clean(self) -> ExtentKey | None:
        """Of those that were used and need no write, the one that should leave first; None: there is none."""
        for key, entry in self.clean.items():
            return key if self._is_stale(entry) else next(reversed(self.clean))
        return None

    def to_write(self, count: int) -> list[tuple[ExtentKey, Placed]]:
        """Of the changed extents those that are no longer wanted, and then up to `count` of those that would
        leave first; each once after a change."""
        found: list[tuple[ExtentKey, Placed]] = []
        for key, entry in self._in_order(self.changed):
            if len(found) >= count and not self._is_stale(entry):
                break
            if not entry.moving and entry.tried != entry.version:
                found.append((key, entry))
        return found

    def _in_order(self, order: OrderedDict[ExtentKey, Placed]) -> Iterator[tuple[ExtentKey, Placed]]:
        for entry in order.values():
            return iter(order.items()) if self._is_stale(entry) else reversed(order.items())
        return iter(())

    def _is_stale(self, entry: Placed) -> bool:
        return self.asked - entry.announced > ROUNDS * self._between

    def _move(self, key: ExtentKey, entry: Placed, order: OrderedDict[ExtentKey, Placed]) -> None:
        self.leave(key, entry)
        order[key] = entry
        entry.order = order
