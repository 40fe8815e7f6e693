"""A kernel family: what the table needs of a generator to select, build and register its kernels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import LoweringError, shown
from tilewright.runtime.contracts import KernelKey, Refusal, Target

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
CPU_ARCHS = ("avx2", "avx512")
CUDA_ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
HIP_ARCHS = ("gfx942",)
FP8_ARCHS = ("sm_90", "sm_100", "sm_120")
"""Archs with OCP fp8 (e4m3 and e5m2). gfx942 has other formats (no negative zero)."""
ARCHS = {"cpu": CPU_ARCHS, "cuda": CUDA_ARCHS, "hip": HIP_ARCHS}
PLACEHOLDER_NAME = "tw_op"


@dataclass(frozen=True)
class TritonKernel:
    """What launching or compiling a generated Triton kernel needs beside its text."""

    parameters: Callable[[KernelKey], list[tuple[str, str]]]
    """(name, Triton type) of the run-time arguments."""
    constants: Callable[[KernelKey, int], dict[str, int]]
    """constants(key, size of the last axis): the compile-time arguments."""
    warps: Callable[[int], int]
    """warps(size of the last axis)."""
    launcher: Callable[[KernelKey, Any], Callable[..., Any]]
    """launcher(key, jitted function) -> the op's implementation."""
    options: Callable[[KernelKey], dict[str, int]] | None = None
    """num_warps and num_stages of a key, where they depend on more than the last axis."""
    portable: Callable[[KernelKey], KernelKey] | None = None
    """The key nearest to a key whose kernel takes pointers and numbers only; None: that of every key does."""

    def launch_options(self, key: KernelKey, columns: int) -> dict[str, int]:
        """num_warps and num_stages that the launcher takes for a key and size of the last axis."""
        if self.options is not None:
            return self.options(key)
        return {"num_warps": self.warps(columns), "num_stages": 2}


@dataclass(frozen=True)
class KernelFamily:
    """What one generator makes for one semantic op."""

    op: str
    """Semantic op."""
    dtypes: tuple[str, ...]
    legality: tuple[str, ...]
    """What an input must satisfy, one clause each; `configure` refuses what does not, with the values."""
    configure: Callable[[Sequence[Any], Target], KernelKey | Refusal]
    """configure(args in full schema order, target): the specialisation for these arguments."""
    schema: Callable[[KernelKey], str]
    """`(Tensor x, ...) -> Tensor`: the kernel op's schema after its name."""
    generate: dict[str, Callable[[KernelKey, str], str]]
    """By target kind: generate(key, op name) -> source text."""
    triton: TritonKernel | None
    """How the Triton sources are launched and compiled; None where there are none."""
    fake: Callable[[KernelKey], Callable[..., Any]]
    """Shapes and dtypes of the outputs for fake tensors."""
    save: Callable[[KernelKey], Callable[..., None]] | None
    """`setup_context` for torch.library.register_autograd; None where the op is for inference only."""
    backward: Callable[[KernelKey], Callable[..., Any]] | None
    """The gradient of the semantic op's definition, in plain PyTorch; None with `save`."""
    rewrite_args: Callable[[KernelKey, Sequence[Any]], tuple[Any, ...]]
    """Full semantic-op arguments -> the kernel op's positional arguments (nodes pass through untouched)."""
    examples: Callable[[], Sequence[tuple[Any, ...]]]
    """Arguments on the meta device whose configurations are the defaults that resource tables show."""
    archs: tuple[str, ...] = tuple(arch for archs in ARCHS.values() for arch in archs)
    """What it has kernels for, of the kinds of target in `generate`; `configure` refuses others."""
    needs_torch: Callable[[KernelKey], bool] = lambda key: False
    """Whether a CPU kernel computes with torch, not just on its tensors and threads."""

    def source(self, key: KernelKey) -> tuple[str, str]:
        """(op name, source text); the name is the semantic op and a digest of the text. LoweringError for a
        key whose words are not from our own tables."""
        _check_words(self.op, key)
        emit = self.generate[key.target.kind]
        digest = hashlib.sha256(emit(key, PLACEHOLDER_NAME).encode()).hexdigest()[:10]
        name = f"{self.op}_{digest}"
        return name, emit(key, name)


_WORD = re.compile(r"[a-z][a-z0-9_]*")


def _check_words(op: str, key: KernelKey) -> None:
    """Nothing but numbers, names of targets and dtypes, and plain words may reach generated text."""
    if key.target.arch not in ARCHS.get(key.target.kind, ()):
        raise LoweringError(f"{op}: no kernel for target {shown(str(key.target))}")
    if key.dtype not in DTYPE_NAMES.values():
        raise LoweringError(f"{op}: no kernel for dtype {shown(key.dtype)}")
    for name, value in key.config:
        word = isinstance(value, str) and _WORD.fullmatch(value)
        if not (_WORD.fullmatch(name) and (word or type(value) in (int, bool))):
            raise LoweringError(
                f"{op}: kernel option {shown(name)} = {shown(value)}: expected a word or number"
            )


def config_of(key: KernelKey) -> dict[str, Any]:
    """The specialising options of a key by name."""
    return dict(key.config)


def make_key(op: str, target: Target, dtype: str, **config: int | bool | str) -> KernelKey:
    """A KernelKey with its options in sorted order."""
    return KernelKey(op, target, dtype, tuple(sorted(config.items())))


def dtype_name(tensor: Tensor, dtypes: Sequence[str], what: str) -> str | Refusal:
    """The dtype's name when it is one of `dtypes`, else a refusal."""
    name = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    if name not in dtypes:
        return Refusal(f"{what} is {name}, the kernels take {', '.join(dtypes)}")
    return name


def check_target(tensors: Sequence[Tensor], target: Target) -> Refusal | None:
    """A refusal when there is no generator for the target or a tensor lives on another device."""
    if target.arch not in ARCHS.get(target.kind, ()):
        known = ", ".join(f"{kind}:{arch}" for kind in ARCHS for arch in ARCHS[kind])
        return Refusal(f"no kernel for target {target}, there are {known}")
    device = "cuda" if target.kind == "hip" else target.kind
    for tensor in tensors:
        if tensor.device.type not in (device, "meta"):
            return Refusal(f"a tensor is on {tensor.device.type}, the target is {target}")
    return None
