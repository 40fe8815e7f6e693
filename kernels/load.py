"""Builds a kernel, loads it and registers its op: shapes for fake tensors, autograd on the `_train` name."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright.compiler.diagnostics import BuildError
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.common.cpp import NAMESPACE
from tilewright.kernels.common.family import KernelFamily
from tilewright.kernels.common.operators import load_operator
from tilewright.kernels.common.triton_text import is_interpreted
from tilewright.runtime.build import LIBRARY, SOURCE, CompileFailed, begin_cpp, compile_cpp
from tilewright.runtime.contracts import KernelKey, Target
from tilewright.runtime.offline import import_source
from tilewright.runtime.store import ArtifactStore


@dataclass(frozen=True)
class Built:
    """A kernel that is compiled, loaded and registered."""

    op: torch._ops.OpOverload
    """For inference: no autograd formula, hence the cheapest dispatch."""
    train_op: torch._ops.OpOverload
    source_path: Path


_BUILT: dict[KernelKey, Built] = {}
_LOADED: dict[str, Built] = {}
_LIBRARIES: list[Any] = []
"""Kept: an op disappears with its library."""
_LOCK = threading.Lock()


def built_kernels() -> dict[KernelKey, Built]:
    """What this process has built or loaded so far."""
    return dict(_BUILT)


def build_kernel(family: KernelFamily, key: KernelKey) -> Built:
    """The kernel for a key: compiled once per machine, loaded and registered once per process."""
    found = _BUILT.get(key)
    if found is not None:
        return found
    with _LOCK:
        if key not in _BUILT:
            _BUILT[key] = _build(family, key)
        return _BUILT[key]


def missing_sources(wanted: Iterable[tuple[KernelFamily, KernelKey]]) -> list[str]:
    """The C++ of kernels that this process has not built."""
    given = [(family, key) for family, key in wanted if key.target.kind == "cpu" and key not in _BUILT]
    return list(dict.fromkeys(family.source(key)[1] for family, key in given))


def begin_compiling(sources: Iterable[str], target: Target) -> None:
    """Start to compile these, on every core, and return: what needs them waits, and tells what is refused."""
    begin_cpp(sources, target.arch, {HEADER: TORCH_ABI})


def compile_side_by_side(wanted: Iterable[tuple[KernelFamily, KernelKey]]) -> None:
    """Compile the C++ of several kernels at once, on every core: `build_kernel` then only loads it.

    BuildError tells the first, in the order given, that the compiler refuses.
    """
    texts: dict[str, tuple[str, KernelKey]] = {}
    for family, key in wanted:
        if key.target.kind == "cpu" and key not in _BUILT:
            name, text = family.source(key)
            texts.setdefault(name, (text, key))
    missing = [(name, text, key) for name, (text, key) in texts.items() if name not in _LOADED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda given: _compiled(*given), missing))


def _build(family: KernelFamily, key: KernelKey) -> Built:
    name, text = family.source(key)
    if name in _LOADED:  # two keys may generate one text
        return _LOADED[name]
    path = _load_cpp(name, text, key) if key.target.kind == "cpu" else _load_triton(family, name, text, key)
    for op in (name, f"{name}_train"):
        torch.library.register_fake(f"{NAMESPACE}::{op}", family.fake(key))
    if family.save is not None and family.backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}_train", family.backward(key), setup_context=family.save(key)
        )
    space = getattr(torch.ops, NAMESPACE)
    built = Built(getattr(space, name).default, getattr(space, f"{name}_train").default, path)
    _LOADED[name] = built
    return built


def _load_cpp(name: str, text: str, key: KernelKey) -> Path:
    folder = _compiled(name, text, key)
    load_operator(name, folder / LIBRARY)
    return folder / SOURCE


def _compiled(name: str, text: str, key: KernelKey) -> Path:
    try:
        return compile_cpp(text, key.target.arch, {HEADER: TORCH_ABI})
    except CompileFailed as error:
        raise BuildError(
            f"kernel {name}: {error}",
            remedy="the source is generated: report it with the target and versions",
        ) from error


def store_triton_source(name: str, text: str) -> Path:
    """The generated Triton file on disk: content-addressed, importable."""

    def write(folder: Path) -> None:
        (folder / f"{name}.py").write_text(text, encoding="utf-8")

    return (
        ArtifactStore.default().get_or_build({"kind": "triton-kernel", "source": text}, write) / f"{name}.py"
    )


def _load_triton(family: KernelFamily, name: str, text: str, key: KernelKey) -> Path:
    """Register an opaque op that launches the kernel on CUDA, or in Triton's interpreter on the CPU."""
    assert family.triton is not None, "a source for this target was generated"
    path = store_triton_source(name, text)
    run = family.triton.launcher(key, getattr(import_source(path, name), name))
    library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    for op in (name, f"{name}_train"):
        library.define(f"{op}{family.schema(key)}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, run, "CPU" if is_interpreted() else "CUDA")
    _LIBRARIES.append(library)
    return path
