"""From a plan to a registered op: compiled once per machine, loaded once per process."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import torch

from tilewright.compiler.diagnostics import BuildError
from tilewright.kernels.chain import cpp
from tilewright.kernels.chain.plan import Plan
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.common.cpp import NAMESPACE
from tilewright.kernels.common.operators import load_operator
from tilewright.runtime.build import LIBRARY, SOURCE, CompileFailed, compile_cpp
from tilewright.runtime.contracts import Refusal, Target

_LOADED: dict[str, tuple[torch._ops.OpOverload, Path]] = {}
_LOCK = threading.Lock()


def refusal(target: Target) -> Refusal | None:
    """Why no chain can be generated for this process, None when it can."""
    if target.kind != "cpu" or target.arch not in ("avx2", "avx512"):
        return Refusal(f"chains are generated for cpu:avx2 and cpu:avx512, the target is {target}")
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return Refusal("torch's threads are not OpenMP's: threads of one call need not run at the same time")
    return None


def missing_sources(plans: Iterable[Plan], target: Target) -> list[str]:
    """The C++ of plans that this process has not built."""
    named = dict(cpp.source(plan, target.arch) for plan in plans)
    return [text for name, text in named.items() if name not in _LOADED]


def build(plan: Plan, target: Target) -> tuple[torch._ops.OpOverload, Path]:
    """The op of a plan and its generated source. BuildError when the compiler refuses it."""
    name, text = cpp.source(plan, target.arch)
    with _LOCK:
        if name not in _LOADED:
            _LOADED[name] = _load(plan, name, text, target)
        return _LOADED[name]


def _load(plan: Plan, name: str, text: str, target: Target) -> tuple[torch._ops.OpOverload, Path]:
    try:
        folder = compile_cpp(text, target.arch, {HEADER: TORCH_ABI})
    except CompileFailed as error:
        raise BuildError(
            f"kernel {name}: {error}",
            remedy="the source is generated: report it with the target and versions",
        ) from error
    load_operator(name, folder / LIBRARY)
    shapes = plan.shapes

    def fake(*given: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        made = tuple(given[0].new_empty(shape, dtype=torch.float32) for shape in shapes)
        return made if len(made) > 1 else made[0]

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default, folder / SOURCE
