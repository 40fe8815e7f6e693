"""Compiles a generated Triton file for a GPU that is not here and reads back what it would use."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tilewright.runtime.contracts import Target

TARGETS = (
    Target("cuda", "sm_80"),
    Target("cuda", "sm_90"),
    Target("cuda", "sm_100"),
    Target("cuda", "sm_120"),
    Target("hip", "gfx942"),
)
FURTHER_TARGETS = (Target("cuda", "sm_89"), Target("hip", "gfx950"))
"""Compiled for export, with the configurations of `STAND_INS`."""
STAND_INS = {"sm_89": "sm_120", "gfx950": "gfx942"}
"""Arch -> the arch whose configurations it takes: as much shared memory, or less."""
SHARED_LIMIT_KIB = {
    "sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160,
}  # fmt: skip
"""Shared memory one block may use, by the vendors' tables; the compilers do not check it offline."""


class OfflineFailed(RuntimeError):
    """A kernel cannot be compiled for a target, or its resources cannot be read; one line."""


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses."""

    registers: int
    """Per thread; vector registers on AMD."""
    spill_bytes: int
    """Per thread, stores to local memory."""
    shared_bytes: int
    """Per block, static and dynamic."""
    stack: int
    """Bytes of stack frame per thread."""

    def over_limit(self, target: Target) -> bool:
        """True when the block's shared memory does not fit the target."""
        return self.shared_bytes > SHARED_LIMIT_KIB[target.arch] * 1024


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target."""

    text: str
    """PTX, or AMD assembly."""
    binary: bytes
    """cubin, or hsaco."""
    used: Resources
    warps: int
    scratch_bytes: int
    """Global memory that a program of the grid wants, 0 for none."""


def import_source(path: Path, name: str) -> ModuleType:
    """Import a generated Python file by its path under a unique module name; Triton reads its text."""
    full = f"tilewright_generated_{name}"
    if full in sys.modules:
        return sys.modules[full]
    spec = importlib.util.spec_from_file_location(full, path)
    if spec is None or spec.loader is None:
        raise OfflineFailed(f"{path} is not an importable Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module


def compile_offline(
    source_path: Path,
    fn_name: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, int],
    target: Target,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Resources:
    """Compile function `fn_name` of a generated file for `target`, as Triton would on that machine.

    signature: Triton type of each run-time argument in order (`*fp32`, `i32`, ...); pointers and integers are
    taken to be multiples of 16. constexprs: the compile-time arguments. OfflineFailed when a compiler
    refuses.
    """
    return compile_whole(
        source_path, fn_name, signature, constexprs, target, num_warps=num_warps, num_stages=num_stages
    ).used


def compile_whole(
    source_path: Path,
    fn_name: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, int],
    target: Target,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """`compile_offline` with everything the compiler made."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = (*TARGETS, *FURTHER_TARGETS)
    if target not in known:
        raise OfflineFailed(f"target {target} is not one of {', '.join(map(str, known))}")
    function = getattr(import_source(source_path, fn_name), fn_name)
    types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(function, types, dict(constexprs), attributes)
    gpu = (
        GPUTarget("hip", target.arch, 64)
        if target.kind == "hip"
        else GPUTarget("cuda", int(target.arch[3:]), 32)
    )
    # Triton 3.10 turns fusion off by default: said here, so that figures do not change with the version.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    try:
        built = triton.compile(source, target=gpu, options=options)
    except (triton.CompilationError, RuntimeError, subprocess.CalledProcessError) as error:
        text = " ".join(str(error).split())
        raise OfflineFailed(f"{fn_name} for {target}: {text[:400]}") from error
    text, binary = ("amdgcn", "hsaco") if target.kind == "hip" else ("ptx", "cubin")
    read = _amd_resources if target.kind == "hip" else _nvidia_resources
    used, scratch = read(built.asm[text], built.metadata.shared), built.metadata.global_scratch_size
    return Compiled(built.asm[text], built.asm[binary], used, num_warps, scratch)


def _nvidia_resources(ptx: str, shared: int) -> Resources:
    """Registers, stack and spills as the assembler reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = _found(r"\.target\s+(sm_\w+)", ptx, "ptx target")
    number = int(_found(r"(\d+)", arch, "ptx target"))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "kernel.ptx")
        text.write_text(ptx, encoding="utf-8")
        done = subprocess.run(
            [
                get_ptxas(number).path,
                "-v",
                f"-arch={arch}",
                str(text),
                "-o",
                str(Path(folder, "kernel.cubin")),
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    if done.returncode != 0:
        raise OfflineFailed(f"ptxas: {' '.join(done.stderr.split())[:400]}")
    report = done.stderr
    return Resources(
        registers=int(_found(r"Used (\d+) registers", report, "register count")),
        spill_bytes=int(_found(r"(\d+) bytes spill stores", report, "spill count")),
        shared_bytes=shared,
        stack=int(_found(r"(\d+) bytes stack frame", report, "stack size")),
    )


def _amd_resources(assembly: str, shared: int) -> Resources:
    """Registers, spills and scratch from the kernel descriptor in the assembly text."""
    spilled = int(_found(r"\.vgpr_spill_count:\s*(\d+)", assembly, "spill count"))
    return Resources(
        registers=int(_found(r"\.vgpr_count:\s*(\d+)", assembly, "register count")),
        spill_bytes=4 * spilled,
        shared_bytes=shared,
        stack=int(_found(r"\.private_segment_fixed_size:\s*(\d+)", assembly, "scratch size")),
    )


def _found(pattern: str, text: str, what: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise OfflineFailed(f"the compiler's output names no {what}")
    return match.group(1)
