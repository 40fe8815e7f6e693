"""Several graphs through Inductor with one wait for all their C++: the compiler works on the kernels of one
while Inductor writes those of the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.RLock()


@contextmanager
def waiting_at_the_end() -> Iterator[None]:
    """Inside, what this thread compiles does not wait for its kernels and must not be called; the end waits.

    What the compiler refuses is raised there. Other threads wait as ever, and two may not be in here at once.
    """
    from torch._inductor.async_compile import AsyncCompile

    honest, owner = AsyncCompile.wait, threading.get_ident()
    held: list[tuple[Any, dict[str, Any]]] = []

    def wait(self: Any, scope: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            held.append((self, scope))
        else:
            honest(self, scope)

    with _LOCK:
        AsyncCompile.wait = wait  # type: ignore[method-assign]
        try:
            yield
        finally:
            AsyncCompile.wait = honest  # type: ignore[method-assign]
    for compiling, scope in held:
        honest(compiling, scope)
