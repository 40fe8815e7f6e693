"""Graph breaks with the user's own line, collected while a model is captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo.utils


@contextmanager
def recorded_breaks() -> Iterator[list[dict[str, str]]]:
    """Yields a list that holds {reason, source} of each graph break once the block is left."""
    known = torch._dynamo.utils.graph_break_reasons
    before = len(known)
    found: list[dict[str, str]] = []
    try:
        yield found
    finally:
        for entry in known[before:]:
            if not entry.graph_break:
                continue
            frame = entry.user_stack[-1] if entry.user_stack else None
            source = f"{frame.filename}:{frame.lineno}" if frame is not None else ""
            found.append({"reason": " ".join(entry.reason.split()), "source": source})
