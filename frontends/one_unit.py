"""Inductor's C++ kernels of one graph as few translation units instead of one each.

Most of what a compiler does for one of these kernels is the same for all: it reads 150 MB of precompiled
headers and links torch. The machine code of a kernel is the same whether it stands alone or among others.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

LIMIT = 8
"""Kernels in one unit: more take longer than what two units do twice."""
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(\w+)", re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[^\n]*\n", re.MULTILINE)

Kernel = tuple[Sequence[str], str]
"""Types of the arguments and the source, as Inductor hands them over."""


def may_share(source: str) -> bool:
    """Whether a kernel's source may stand in a namespace beside others: it defines nothing for the
    preprocessor, and `kernel` is its one name for the linker."""
    directives = set(_DIRECTIVE.findall(source))
    return directives <= {"include", "pragma"} and source.count('extern "C"') == 1


def begin(kernels: Sequence[Kernel]) -> list[Callable[[], Any]]:
    """Start to compile kernels in as few units as have at most LIMIT each; what waits for each function."""
    units = -(-len(kernels) // LIMIT)
    bounds = [len(kernels) * k // units for k in range(units + 1)]
    return [f for a, b in zip(bounds, bounds[1:], strict=False) for f in _begin_unit(kernels[a:b])]


def _begin_unit(kernels: Sequence[Kernel]) -> list[Callable[[], Any]]:
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    if len(kernels) == 1:
        return [CppPythonBindingsCodeCache.load_pybinding_async(*kernels[0], submit_fn=AsyncCompile.submit)]
    get = CppPythonBindingsCodeCache.load_async(unit_text(kernels), "cpu", submit_fn=AsyncCompile.submit)
    return [lambda i=i: _function(get(), i) for i in range(len(kernels))]  # type: ignore[misc]


def _function(first: Any, number: int) -> Any:
    """The function of one kernel; the library holds a Python module for each."""
    if number == 0:
        return first.kernel
    name = _entry(number)
    spec = importlib.util.spec_from_file_location(f"{first.key}.{name}", first.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _entry(number: int) -> str:
    return f"kernel_{number}" if number else "kernel"


def unit_text(kernels: Sequence[Kernel]) -> str:
    """One source of several kernels, each with Inductor's own bindings in a namespace of its own."""
    texts = [_with_bindings(kernel, number) for number, kernel in enumerate(kernels)]
    includes = dict.fromkeys(line.strip() for text in texts for line in _INCLUDE.findall(text))
    parts = ["#define PY_SSIZE_T_CLEAN", *includes]
    for number, text in enumerate(texts):
        name = f"kernel_of_unit_{number}"
        parts += [f"namespace unit_{number} {{", f"#define kernel {name}"]
        parts += [_INCLUDE.sub("", text), "#undef kernel", "}"]
    return "\n".join(parts) + "\n"


def _with_bindings(kernel: Kernel, number: int) -> str:
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    texts: list[str] = []

    class Bindings(CppPythonBindingsCodeCache):
        """Writes what it would compile."""

        entry_function = _entry(number)

        @classmethod
        def load_async(cls, main_code: str, *_: Any, **__: Any) -> Any:
            texts.append(main_code)

    Bindings.load_pybinding_async(*kernel)
    return texts[0]
