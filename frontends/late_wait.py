"""Several graphs through Inductor with one wait for all their C++: the compiler works on the kernels of one
while Inductor writes those of the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tilewright.frontends import one_unit

_LOCK = threading.RLock()


@contextmanager
def waiting_at_the_end() -> Iterator[None]:
    """Inside, what this thread compiles does not wait for its kernels and must not be called; the end waits.
    The kernels of one graph share translation units.

    What the compiler refuses is raised there. Other threads wait as ever, and two may not be in here at once.
    """
    from torch._inductor.async_compile import AsyncCompile

    owner = threading.get_ident()
    wait_now, compile_alone = AsyncCompile.wait, AsyncCompile.cpp_pybinding
    held: list[tuple[Any, dict[str, Any]]] = []
    shared: dict[Any, _Shared] = {}

    def wait(self: Any, scope: dict[str, Any]) -> None:
        if threading.get_ident() != owner:
            wait_now(self, scope)
            return
        if self in shared:
            shared.pop(self).begin()
        held.append((self, scope))

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        from torch._inductor.async_compile import get_compile_threads

        inside = threading.get_ident() == owner and get_compile_threads() > 1
        if inside and one_unit.may_share(source_code):
            return shared.setdefault(self, _Shared()).add(argtypes, source_code)
        return compile_alone(self, argtypes, source_code)

    with _LOCK:
        AsyncCompile.wait = wait  # type: ignore[method-assign]
        AsyncCompile.cpp_pybinding = cpp_pybinding  # type: ignore[method-assign]
        try:
            yield
        finally:
            AsyncCompile.wait = wait_now  # type: ignore[method-assign]
            AsyncCompile.cpp_pybinding = compile_alone  # type: ignore[method-assign]
    for compiling, scope in held:
        wait_now(compiling, scope)


class _Shared:
    """The kernels of one graph, before and after they are handed to the compiler."""

    def __init__(self) -> None:
        self.kernels: list[one_unit.Kernel] = []
        self.functions: list[Any] = []

    def add(self, argtypes: list[str], source: str) -> Any:
        from torch._inductor.async_compile import kernel_code_log
        from torch._inductor.codecache import LambdaFuture

        kernel_code_log.info("CPP+Bindings Kernel:\n%s", source)
        number = len(self.kernels)
        self.kernels.append((argtypes, source))
        return LambdaFuture(lambda: self.functions[number]())

    def begin(self) -> None:
        self.functions = one_unit.begin(self.kernels)
