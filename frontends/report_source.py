"""Lines of the user's model behind `file:line`, for the views of a report."""

from __future__ import annotations

import stat
from functools import lru_cache
from pathlib import Path

_LARGEST = 4 * 2**20
"""Bytes; a Python file above this is not read."""


def source_lines(source: str, around: int = 3) -> list[tuple[int, str]]:
    """(line number, text) of the line named by `file:line` and its neighbours; empty when it cannot be read.

    Only regular `.py` files are read: a report may come from elsewhere and name any file.
    """
    file, _, line = source.rpartition(":")
    if not file.endswith(".py") or not line.isdigit():
        return []
    lines, at = _lines_of(file), int(line)
    if not 1 <= at <= len(lines):
        return []
    first, last = max(1, at - around), min(len(lines), at + around)
    return [(n, lines[n - 1]) for n in range(first, last + 1)]


@lru_cache(maxsize=64)
def _lines_of(file: str) -> tuple[str, ...]:
    path = Path(file)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            return ()
        return tuple(path.read_text(encoding="utf-8", errors="replace").split("\n"))
    except (OSError, ValueError):
        # An absent file, or a name no file can have: the report shows the place without its text.
        return ()
