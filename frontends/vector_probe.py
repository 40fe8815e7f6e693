"""Inductor's probes of the host's vector instructions, run beside tracing instead of after it, and only those
that it has to know.

Before its first C++ kernel Inductor compiles and loads a small program for every instruction set that the
processor names: five seconds of a compiler, in a row, to take the first of them. The answers are Inductor's
own, found by its own code and kept where it looks for them.
"""

from __future__ import annotations

import contextvars
import platform
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

_LOCK = threading.Lock()
_running: list[Future[Any]] = []
"""The latest run, if any."""
_honest: list[Any] = []
"""Inductor's own list of what is valid, once for each that is inside of `asked_in_order`."""


def begin_early() -> None:
    """Start the probes before a program is known; nothing where torch has an accelerator, which may need
    none."""
    if not torch.accelerator.is_available():
        _start()


def begin(inputs: Sequence[Any]) -> None:
    """Start the probes for a program with these inputs; nothing where none is on the CPU or a run is under
    way. A run that was done before ends at once."""
    if any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in inputs):
        _start()


def finish() -> None:
    """Wait for the probes. What went wrong there Inductor meets, and raises, when it asks again itself."""
    with _LOCK:
        running = list(_running)
    wait(running)


@contextmanager
def asked_in_order() -> Iterator[None]:
    """Inside, Inductor probes an instruction set only when it looks at it: the better ones come first, and it
    looks no further than the one it takes."""
    from torch._inductor import cpu_vec_isa

    if platform.machine() not in ("x86_64", "AMD64"):  # elsewhere there is one, and nothing is compiled
        yield
        return
    with _LOCK:
        _honest.append(_honest[0] if _honest else cpu_vec_isa.valid_vec_isa_list)
        cpu_vec_isa.valid_vec_isa_list = _Valid  # type: ignore[assignment,unused-ignore]
    try:
        yield
    finally:
        with _LOCK:
            honest = _honest.pop()
            if not _honest:
                cpu_vec_isa.valid_vec_isa_list = honest


class _Valid(Sequence[Any]):
    """What Inductor's list of valid instruction sets holds, each asked when it is reached."""

    def __iter__(self) -> Iterator[Any]:
        from torch._inductor import cpu_vec_isa

        named = cpu_vec_isa.x86_isa_checker()
        for isa in cpu_vec_isa.supported_vec_isa_list:
            if all(flag in named for flag in str(isa).split()) and isa:
                yield isa

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, at: Any) -> Any:
        if not isinstance(at, int) or at < 0:
            return list(self)[at]
        found = next(islice(self, at, None), None)
        if found is None:
            raise IndexError(at)
        return found


def _start() -> None:
    # Loaded here: a thread that reads many files gets the interpreter back late each time.
    from torch._inductor import codecache, cpp_builder, cpu_vec_isa

    assert all((codecache, cpp_builder, cpu_vec_isa))
    with _LOCK:
        if _running and not _running[0].done():
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="tilewright-probe")
        _running[:] = [pool.submit(contextvars.copy_context().run, _probe)]
        pool.shutdown(wait=False)


def _probe() -> None:
    from torch._inductor import cpu_vec_isa

    with asked_in_order():
        cpu_vec_isa.pick_vec_isa()
