"""The kernel table: which generated kernel runs a semantic op on a target, or why none does."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright.compiler.diagnostics import LoweringError, nearest
from tilewright.compiler.ops import all_ops
from tilewright.kernels.attention.family import ATTENTION
from tilewright.kernels.block_mass.family import BLOCK_MASS
from tilewright.kernels.block_sparse_attention.family import (
    BLOCK_SPARSE_ATTENTION,
    BLOCK_SPARSE_ATTENTION_BACKWARD,
    BLOCK_SPARSE_ATTENTION_FP8,
    BLOCK_SPARSE_ATTENTION_INT8,
)
from tilewright.kernels.common.family import ARCHS, KernelFamily
from tilewright.kernels.gated_mlp.family import GATED_MLP
from tilewright.kernels.hadamard.family import HADAMARD
from tilewright.kernels.linear.family import LINEAR, LINEAR_MULTI
from tilewright.kernels.load import Built, build_kernel, built_kernels
from tilewright.kernels.measured_copy.family import MEASURED_COPY
from tilewright.kernels.paged.family import PAGED_FAMILIES
from tilewright.kernels.paged.merge_family import MERGE_PARTS
from tilewright.kernels.paged.packed_family import PACKED_FAMILIES
from tilewright.kernels.paged.rotate_family import ROTATE_ROWS
from tilewright.kernels.quantized_linear.family import QUANTIZED_LINEAR, QUANTIZED_LINEAR_MULTI
from tilewright.kernels.rms_norm.family import ADD_RMS_NORM, RMS_NORM
from tilewright.runtime.contracts import KernelKey, Refusal, Target

FAMILIES: dict[str, KernelFamily] = {
    family.op: family
    for family in (
        RMS_NORM,
        ADD_RMS_NORM,
        GATED_MLP,
        LINEAR,
        LINEAR_MULTI,
        QUANTIZED_LINEAR,
        QUANTIZED_LINEAR_MULTI,
        HADAMARD,
        ATTENTION,
        BLOCK_SPARSE_ATTENTION,
        BLOCK_SPARSE_ATTENTION_BACKWARD,
        BLOCK_SPARSE_ATTENTION_INT8,
        BLOCK_SPARSE_ATTENTION_FP8,
        BLOCK_MASS,
        *PAGED_FAMILIES,
        MERGE_PARTS,
        *PACKED_FAMILIES,
        ROTATE_ROWS,
        MEASURED_COPY,
    )
}


@dataclass(frozen=True)
class KernelInfo:
    """What one family offers for one kind of target."""

    op: str
    kind: str
    archs: tuple[str, ...]
    dtypes: tuple[str, ...]
    legality: tuple[str, ...]


@dataclass(frozen=True)
class KernelChoice:
    """A kernel that fits: equal keys share one source and one op. Nothing is compiled before `op` is read."""

    key: KernelKey
    training: bool
    """Take the op that carries the autograd formula."""

    @property
    def family(self) -> KernelFamily:
        return FAMILIES[self.key.op]

    @property
    def name(self) -> str:
        """Name of the kernel op: the semantic op and a digest of the source."""
        return self.family.source(self.key)[0]

    @property
    def built(self) -> Built:
        return build_kernel(self.family, self.key)

    @property
    def op(self) -> torch._ops.OpOverload:
        """The op to call; builds and registers it on first use. BuildError when the compiler refuses."""
        return self.built.train_op if self.training else self.built.op

    @property
    def source_path(self) -> Path:
        """The generated file on disk; builds it on first use."""
        return self.built.source_path

    def rewrite_args(self, args: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Semantic-op arguments (values or graph nodes, in schema order) -> (args, kwargs) of the kernel op.

        The kernel op's result has the structure of the semantic op's: a tensor, or a tuple of them (where the
        semantic op returns a list, a tuple of the same length).
        """
        return self.family.rewrite_args(self.key, full_args(self.key.op, args)), {}


def full_args(op: str, args: Sequence[Any]) -> list[Any]:
    """The arguments with the schema's defaults filled in at the end."""
    schema = all_ops()[op].overload._schema
    missing = schema.arguments[len(args) :]
    for argument in missing:
        if not argument.has_default_value():
            raise LoweringError(f"{op}: argument {argument.name!r} is missing")
    return [*args, *[argument.default_value for argument in missing]]


def candidates(op: str) -> list[KernelInfo]:
    """What there is for a semantic op, by kind of target; empty when no kernel is generated for it."""
    if op not in all_ops():
        raise LoweringError(f"no semantic op {op!r}", remedy=nearest(op, all_ops()))
    family = FAMILIES.get(op)
    if family is None:
        return []
    known = {kind: tuple(arch for arch in ARCHS[kind] if arch in family.archs) for kind in family.generate}
    return [KernelInfo(op, kind, known[kind], family.dtypes, family.legality) for kind in known]


def select(op: str, target: Target, args: Sequence[Any]) -> KernelKey | Refusal:
    """The kernel for these arguments (tensors, fake or meta too, or constants; schema order), or why not."""
    if not candidates(op):
        return Refusal(
            f"no kernel is generated for {op}; there are kernels for {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[op].configure(full_args(op, args), target)


INFERENCE_ONLY = ("attention",)


def select_for_node(
    op_name: str, metas: Sequence[Any], target: Target, *, training: bool
) -> KernelChoice | Refusal:
    """`select` for a graph node: metas are the `val`s of its arguments in schema order. Compiles nothing."""
    if training and op_name in INFERENCE_ONLY:
        return Refusal(f"{op_name} in training: torch's own has a backward kernel, ours has none")
    if training and op_name in FAMILIES and FAMILIES[op_name].backward is None:
        return Refusal(f"{op_name} in training: it is for inference, there is no gradient")
    key = select(op_name, target, metas)
    return key if isinstance(key, Refusal) else KernelChoice(key, training)


ELEMENTWISE = ("rms_norm", "add_rms_norm", "gated_mlp")
SMALL_ELEMENTS = 16384
"""Break-even on AVX2 (loaded Zen 1 cores): an op call costs about 11 us more than a fused Inductor kernel,
which takes about 0.6 ns an element longer."""


def too_small(op_name: str, metas: Sequence[Any], target: Target) -> Refusal | None:
    """Why a call would cost more than what Inductor fuses, or None; a symbolic size is never small."""
    if target.kind != "cpu" or op_name not in ELEMENTWISE:
        return None
    sizes = list(metas[0].shape)
    if not all(isinstance(size, int) for size in sizes) or math.prod(sizes) >= SMALL_ELEMENTS:
        return None
    return Refusal(
        f"{math.prod(sizes)} elements: below {SMALL_ELEMENTS} Inductor's own fusion costs less than a call"
    )


@functools.lru_cache(maxsize=1)
def host_target() -> Target:
    """The CPU this process runs on: cpu:avx512 (which has VNNI), cpu:avx2, or cpu:generic, for which there
    are no kernels."""
    level = torch.backends.cpu.get_cpu_capability()
    if level == "AVX512":
        return Target("cpu", "avx512" if torch.cpu.get_capabilities()["avx512_vnni"] else "avx2")
    return Target("cpu", "avx2" if level == "AVX2" else "generic")


def list_kernels() -> list[dict[str, str]]:
    """One row per family and kind of target, with the sources built in this process."""
    rows = []
    for op in sorted(FAMILIES):
        for info in candidates(op):
            paths = [
                str(b.source_path)
                for k, b in built_kernels().items()
                if k.op == op and k.target.kind == info.kind
            ]
            rows.append(
                {
                    "op": op,
                    "target": ", ".join(f"{info.kind}:{arch}" for arch in info.archs),
                    "dtypes": ", ".join(info.dtypes),
                    "legality": "; ".join(info.legality),
                    "source": "\n".join(paths),
                }
            )
    return rows
