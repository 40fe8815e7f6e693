"""Which sequences have which pages in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SharedRun:
    """Sequences `rows` have the same pages at the places start .. stop - 1 of their tables."""

    rows: tuple[int, ...]
    start: int
    stop: int


def shared_runs(
    pages: Sequence[Sequence[int]], start: int, stop: int, least_rows: int, least_pages: int
) -> list[SharedRun]:
    """The runs of pages that at least `least_rows` sequences share, by place, then by first sequence.

    pages: of each sequence, its page at every place, -1 for none. A run is as long as its sequences stay
    together: where some part, it ends, and those that still share go on in runs of their own. Runs shorter
    than `least_pages` are left out. No page of a sequence is in two runs.
    """
    found: list[SharedRun] = []
    together = [(tuple(range(len(pages))), start)] if len(pages) >= least_rows else []
    while together:
        rows, at = together.pop()
        end = at
        while end < stop and len({pages[row][end] for row in rows}) == 1 and pages[rows[0]][end] >= 0:
            end += 1
        if end - at >= max(1, least_pages):
            found.append(SharedRun(rows, at, end))
        if end == stop:
            continue
        classes: dict[int, list[int]] = {}
        for row in rows:
            classes.setdefault(pages[row][end], []).append(row)
        if len(classes) == 1:  # all without a page here
            together.append((rows, end + 1))
        else:
            together += [(tuple(c), end) for c in classes.values() if len(c) >= least_rows]
    return sorted(found, key=lambda run: (run.start, run.rows))
