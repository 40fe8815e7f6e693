"""Inductor's probes of the host's vector instructions, run beside capture and passes instead of after them.

Before its first C++ kernel Inductor compiles and loads a small program for every instruction set that the
processor names: five seconds of a compiler, in a row. The answers are Inductor's own, found by its own code
and kept where it looks for them.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

_LOCK = threading.Lock()
_running: list[Future[Any]] = []
"""The latest run, if any."""


def begin(inputs: Sequence[Any]) -> None:
    """Start the probes for a program with these inputs; nothing where none is on the CPU or a run is under
    way. A run that was done before ends at once."""
    if not any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in inputs):
        return
    with _LOCK:
        if _running and not _running[0].done():
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="tilewright-probe")
        _running[:] = [pool.submit(contextvars.copy_context().run, _probe)]
        pool.shutdown(wait=False)


def finish() -> None:
    """Wait for the probes. What went wrong there Inductor meets, and raises, when it asks again itself."""
    with _LOCK:
        running = list(_running)
    wait(running)


def _probe() -> None:
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list()
