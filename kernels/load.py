"""Builds a kernel, loads it and registers its op: shapes for fake tensors, autograd on the `_train` name."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewright.compiler.diagnostics import BuildError
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.common.cpp import NAMESPACE
from tilewright.kernels.common.family import KernelFamily
from tilewright.runtime.build import LIBRARY, SOURCE, CompileFailed, compile_cpp
from tilewright.runtime.contracts import KernelKey


@dataclass(frozen=True)
class Built:
    """A kernel that is compiled, loaded and registered."""

    op: torch._ops.OpOverload
    """For inference: no autograd formula, hence the cheapest dispatch."""
    train_op: torch._ops.OpOverload
    source_path: Path


_BUILT: dict[KernelKey, Built] = {}
_LOADED: dict[str, Built] = {}
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


def _build(family: KernelFamily, key: KernelKey) -> Built:
    name, text = family.source(key)
    if name in _LOADED:  # two keys may generate one text
        return _LOADED[name]
    try:
        folder = compile_cpp(text, key.target.arch, {HEADER: TORCH_ABI})
    except CompileFailed as error:
        raise BuildError(
            f"kernel {name}: {error}",
            remedy="the source is generated: report it with the target and versions",
        ) from error
    torch.ops.load_library(str(folder / LIBRARY))  # type: ignore[no-untyped-call]
    for op in (name, f"{name}_train"):
        torch.library.register_fake(f"{NAMESPACE}::{op}", family.fake(key))
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}_train", family.backward(key), setup_context=family.save(key)
    )
    space = getattr(torch.ops, NAMESPACE)
    built = Built(getattr(space, name).default, getattr(space, f"{name}_train").default, folder / SOURCE)
    _LOADED[name] = built
    return built
