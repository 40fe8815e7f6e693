"""Static analysis of generated GPU code: what its inner loop is made of and what a block of it holds.

Nothing runs: kernels are compiled for targets that are not here and their machine code is read. The attention
kernel stands beside a plain flash kernel and FlexAttention's template that the same toolchain compiles.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tilewright.compiler.devices import device_named
from tilewright.compiler.ops import all_ops
from tilewright.frontends.flex_template import NAME as FLEX
from tilewright.frontends.flex_template import NoTemplate, flex_kernel
from tilewright.kernels.common.family import KernelFamily, config_of
from tilewright.kernels.load import store_triton_source
from tilewright.kernels.table import FAMILIES, full_args
from tilewright.runtime.contracts import KernelKey, Refusal, Target
from tilewright.runtime.occupancy import occupancy
from tilewright.runtime.offline import (
    FURTHER_TARGETS,
    STAND_INS,
    TARGETS,
    Compiled,
    OfflineFailed,
    compile_whole,
)

_TENSOR_CORE = {
    "cuda": re.compile(r"^(?:HMMA|IMMA|QMMA|OMMA|DMMA|[HIQ]GMMA|UTC[A-Z]*MMA)"),
    "hip": re.compile(r"^v_s?mfma"),
}
"""SASS of sm_80, sm_120 / sm_90 / sm_100, and CDNA."""
_MEMORY = {
    "cuda": re.compile(r"^(?:LDG|STG|LDS|STS|LDSM|LDGSTS|UTMA|LDTM|STTM)"),
    "hip": re.compile(r"^(?:global_|buffer_|ds_)"),
}
ASSUMPTIONS = (
    "roofline: the larger of flops / dense peak and bytes / memory bandwidth, plus one launch; every input "
    "and output is read or written once; no cache, no tail of the grid, no clock below boost"
)


REPORTED = (*TARGETS, *FURTHER_TARGETS)


@dataclass(frozen=True)
class Analysis:
    """One kernel on one target."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    occupancy: float
    occupancy_limit: str
    instructions: int
    """Of the whole kernel."""
    loop_instructions: int
    """Of the inner loop: the shortest loop with tensor-core work, else the longest loop; 0 without one."""
    tensor_core_share: float
    """Tensor-core instructions of the inner loop; one of sm_90 or sm_100 does the work of many of sm_80."""
    memory_share: float
    """Loads and stores of the inner loop."""


@dataclass(frozen=True)
class Prediction:
    """Roofline of one kernel's example on one device."""

    flops: float
    bytes: float
    bytes_per_flop: float
    microseconds: float
    bound: str


def analyse(name: str, compiled: Compiled, target: Target) -> Analysis:
    """Read the machine code of a compiled kernel."""
    code = _amd_code(compiled.text) if target.kind == "hip" else _nvidia_code(compiled.binary)
    loop = _inner_loop(code, _TENSOR_CORE[target.kind])
    size = max(1, len(loop))
    held = occupancy(compiled.used, compiled.warps, target)
    return Analysis(
        name,
        str(target),
        compiled.used.registers,
        compiled.used.spill_bytes,
        compiled.used.shared_bytes,
        compiled.warps,
        round(held.share, 4),
        held.limit,
        sum(1 for i in code if not i.label),
        len(loop),
        round(sum(1 for op in loop if _TENSOR_CORE[target.kind].match(op)) / size, 4),
        round(sum(1 for op in loop if _MEMORY[target.kind].match(op)) / size, 4),
    )


@dataclass(frozen=True)
class _Instruction:
    op: str
    label: str = ""
    """A label stands here, no instruction."""
    jump: str = ""
    """Label this one may jump to."""


def _nvidia_code(binary: bytes) -> list[_Instruction]:
    from triton.backends.nvidia import compiler

    tool = Path(compiler.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise OfflineFailed(f"nvdisasm: {' '.join(done.stderr.split())[:200]}")
    code = list[_Instruction]()
    for line in done.stdout.splitlines():
        if label := re.match(r"(\.L_x_\w+):", line.strip()):
            code.append(_Instruction("", label=label[1]))
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            jump = re.search(r"\.L_x_\w+", found[2]) if found[1].startswith("BRA") else None
            code.append(_Instruction(found[1], jump=jump[0] if jump else ""))
    return code


def _amd_code(assembly: str) -> list[_Instruction]:
    code = list[_Instruction]()
    for line in assembly.split(".section", 1)[0].splitlines():
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", text):
            code.append(_Instruction("", label=label[1]))
        elif found := re.match(r"([a-z][a-z0-9_]+)\b(.*)", text):
            jumps = found[1].startswith(("s_cbranch", "s_branch"))
            jump = re.search(r"\.LBB\w+", found[2]) if jumps else None
            code.append(_Instruction(found[1], jump=jump[0] if jump else ""))
    return code


def _inner_loop(code: Sequence[_Instruction], wanted: re.Pattern[str]) -> list[str]:
    """Instructions between a label and a later jump back to it."""
    place = {item.label: i for i, item in enumerate(code) if item.label}
    loops = []
    for i, item in enumerate(code):
        start = place.get(item.jump, i)
        ops = [x.op for x in code[start : i + 1] if not x.label]
        if item.jump and start < i and len(ops) > 1:
            loops.append(ops)
    working = [ops for ops in loops if any(wanted.match(op) for op in ops)]
    return min(working, key=len) if working else max(loops, key=len, default=[])


def predict(flops: float, moved: float, dtype: str, arch: str) -> Prediction:
    """Roofline of so many flops and bytes on the device of an architecture."""
    device = device_named(arch)
    arithmetic, memory = flops / device.peak(dtype) * 1e6, moved / device.bandwidth_gbs / 1e3
    bound = "arithmetic" if arithmetic > memory else "memory"
    total = max(arithmetic, memory) + device.launch_us
    return Prediction(flops, moved, moved / max(flops, 1.0), total, bound)


def notes(archs: Sequence[str]) -> list[str]:
    """What a reader must know about the rows of these architectures."""
    found = [
        f"{arch}: our kernels have no configurations of its own and are compiled with those of "
        f"{STAND_INS[arch]}"
        for arch in archs
        if arch in STAND_INS
    ]
    for arch in archs:
        try:
            flex_kernel(arch)
        except NoTemplate as error:
            found.append(f"FlexAttention has no row: {error}")
    return found


def kernel_rows(ops: Sequence[str], archs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Analysis and roofline of every default configuration; a kernel that does not compile is an error."""
    for op in ops:
        family = FAMILIES[op]
        for target in REPORTED:
            if target.arch in archs and family.triton is not None:
                stand_in = Target(target.kind, STAND_INS.get(target.arch, target.arch))
                for args in family.examples():
                    key = family.configure(full_args(op, args), stand_in)
                    if not isinstance(key, Refusal):
                        yield _row(family, key, args, target)


def _row(family: KernelFamily, key: KernelKey, args: Sequence[Any], target: Target) -> dict[str, Any]:
    assert family.triton is not None, "checked by the caller"
    columns, op = args[0].shape[-1], all_ops()[key.op]
    name, text = family.source(key)
    constants = family.triton.constants(key, columns)
    compiled = compile_whole(
        store_triton_source(name, text),
        name,
        dict(family.triton.parameters(key)),
        constants,
        target,
        **family.triton.launch_options(key, columns),
    )
    given = full_args(key.op, args)
    out = op.overload(*given)
    tensors = [t for t in _flat([given, out]) if hasattr(t, "element_size")]
    moved = float(sum(t.numel() * t.element_size() for t in tensors))
    flops = float(op.flops(*given, out=out))
    options = [f"{k}={v}" for k, v in config_of(key).items() if v is not False and v != "none"]
    options += ["x".join(str(v) for k, v in constants.items() if k.startswith("BLOCK"))]
    analysis = analyse(f"{key.op} {key.dtype} {' '.join(options)}".rstrip(), compiled, target)
    described = {**asdict(analysis), "configuration": key.target.arch}
    return {**described, "roofline": asdict(predict(flops, moved, key.dtype, target.arch))}


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


PLAIN_FLASH = '''"""softmax(scale q k^T) v for whole blocks: the plain flash kernel to read ours beside."""

import triton
import triton.language as tl


@triton.jit
def plain_flash(q, k, v, out, S, T, factor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    head = tl.program_id(1).to(tl.int64)
    q_tile = tl.load(q + head * S * D + rows[:, None] * D + d[None, :])
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum = tl.zeros([BLOCK_M, D], tl.float32)
    for at in range(0, T, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        k_tile = tl.load(k + head * T * D + j[None, :] * D + d[:, None])
        s = tl.dot(q_tile, k_tile) * factor
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(p, 1)
        v_tile = tl.load(v + head * T * D + j[:, None] * D + d[None, :])
        sum = sum * shrink[:, None] + tl.dot(p.to(q_tile.dtype), v_tile)
        m = top
    tl.store(out + head * S * D + rows[:, None] * D + d[None, :], (sum / total[:, None]).to(q_tile.dtype))
'''


def plain_flash_rows(
    archs: Sequence[str], blocks: Sequence[tuple[int, int]] = ((128, 64),)
) -> Iterator[dict[str, Any]]:
    """The plain flash kernel in float16, heads of 64, for the same targets."""
    signature = {**dict.fromkeys(("q", "k", "v", "out"), "*fp16"), "S": "i32", "T": "i32", "factor": "fp32"}
    path = store_triton_source("plain_flash", PLAIN_FLASH)
    for target in REPORTED:
        for rows, keys in blocks if target.arch in archs else ():
            constants = {"BLOCK_M": rows, "BLOCK_N": keys, "D": 64}
            compiled = compile_whole(path, "plain_flash", signature, constants, target, num_warps=8)
            yield asdict(analyse(f"plain flash float16 head=64 {rows}x{keys}", compiled, target))


def flex_rows(archs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """FlexAttention's template in float16, heads of 64, with the tile that Inductor takes on each device."""
    for target in (t for t in REPORTED if t.arch in archs):
        try:
            kernel = flex_kernel(target.arch)
        except NoTemplate:
            continue  # `notes` says why
        name = f"{FLEX}_{target.arch}"
        path = store_triton_source(name, kernel.text.replace(f"def {FLEX}(", f"def {name}("))
        compiled = compile_whole(
            path, name, kernel.signature, {}, target, num_warps=kernel.warps, num_stages=kernel.stages
        )
        title = f"FlexAttention's template float16 head=64 {kernel.rows}x{kernel.keys} stages={kernel.stages}"
        yield asdict(analyse(title, compiled, target))
