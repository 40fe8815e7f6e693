"""`--format kernels`: every generated kernel a model needs, compiled for every target, with C launchers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from tilewright.compiler.diagnostics import ExportError
from tilewright.compiler.ops import semantic_op
from tilewright.compiler.schema import arguments
from tilewright.frontends.compile import CompileOptions
from tilewright.frontends.export.api import Progress
from tilewright.frontends.export.artifact import Artifact
from tilewright.frontends.export.captured import (
    Captured,
    capture,
    describe_entry,
    describe_model,
    release_memory,
    shape_row,
    versions,
)
from tilewright.frontends.export.entries import Entry
from tilewright.frontends.export.launcher import launcher
from tilewright.kernels.load import store_triton_source
from tilewright.kernels.table import KernelChoice, host_target, select_for_node
from tilewright.runtime.contracts import Refusal, Target
from tilewright.runtime.occupancy import occupancy
from tilewright.runtime.offline import FURTHER_TARGETS, STAND_INS, TARGETS, OfflineFailed, compile_whole

GPU_TARGETS = tuple(sorted((*TARGETS, *FURTHER_TARGETS), key=str))


@dataclass(frozen=True)
class Need:
    """A kernel that a node of a program wants."""

    choice: KernelChoice
    columns: int
    """Size of the last axis of the first argument, which sets block sizes."""


def write_kernels(
    artifact: Artifact, name: str, entries: list[Entry], options: CompileOptions, progress: Progress
) -> dict[str, Any]:
    """Capture and rewrite every entry point, then write what its nodes need; returns the description."""
    rows, table, weights = [], dict[str, dict[str, Any]](), dict[str, Tensor]()
    for entry in entries:
        with progress(f"{entry.name}: capturing and rewriting"):
            captured = capture(entry, options, name)
        refused: dict[str, dict[str, int]] = {}
        for target in (host_target(), *GPU_TARGETS):
            with progress(f"{entry.name}: kernels for {target}"):
                for need in _needs(captured, target, refused):
                    write = _write_cpu if target.kind == "cpu" else _write_gpu
                    row = write(artifact, need, target, table)
                    table.setdefault(row["folder"], {**row, "calls": {}})
                    calls = table[row["folder"]]["calls"]
                    calls[entry.name] = calls.get(entry.name, 0) + 1
        shapes = {side: shape_row(captured, side) for side in ("inputs", "outputs")}
        rows.append(describe_entry(captured, {**shapes, "refused": refused}))
        weights |= captured.weights()
        del captured
        release_memory()
    if not table:
        raise ExportError("no kernel of ours fits this model on any target", remedy="see tilewright explain")
    artifact.write("resources.json", json.dumps(list(table.values()), indent=1, sort_keys=True))
    return {
        "model": describe_model(name, weights),
        "versions": versions("triton"),
        "entries": rows,
        "kernels": list(table.values()),
    }


def _needs(captured: Captured, target: Target, refused: dict[str, dict[str, int]]) -> Iterator[Need]:
    """The kernel of each semantic op on a target; what none runs is counted in `refused` by its reason."""
    stand_in = Target(target.kind, STAND_INS.get(target.arch, target.arch))
    for node in captured.program.graph.nodes:
        op = semantic_op(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        values = fx.node.map_arg(tuple(arguments(node).values()), lambda n: n.meta["val"])
        metas = [_on_meta(v) for v in values]
        choice = select_for_node(op.name, metas, stand_in, training=False)
        if isinstance(choice, Refusal):
            reasons = refused.setdefault(str(target), {})
            text = f"{op.name}: {choice.reason}"
            reasons[text] = reasons.get(text, 0) + 1
            continue
        columns = metas[0].shape[-1]
        yield Need(choice, columns if isinstance(columns, int) else 0)


def _on_meta(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_meta(v) for v in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def _write_cpu(artifact: Artifact, need: Need, target: Target, table: dict[str, Any]) -> dict[str, Any]:
    """Source, header and library as they were built for this machine."""
    folder = f"cpu_{target.arch}/{need.choice.name}"
    row = {"folder": folder, "kernel": need.choice.name, "op": need.choice.key.op, "target": str(target)}
    if folder not in table:
        built = need.choice.source_path.parent
        for file in sorted(built.iterdir()):
            if file.suffix in (".cpp", ".so", ".h", ".hpp"):
                shutil.copyfile(file, artifact.path(f"{folder}/{file.name}"))
    return row


def _write_gpu(artifact: Artifact, need: Need, target: Target, table: dict[str, Any]) -> dict[str, Any]:
    family, key = need.choice.family, need.choice.key
    assert family.triton is not None, "a GPU key comes from a family with Triton sources"
    key = family.triton.portable(key) if family.triton.portable is not None else key
    name, text = family.source(key)
    constants = family.triton.constants(key, need.columns)
    parts = [f"{k.lower()}{v}" for k, v in sorted(constants.items())]
    folder = f"{target.arch}/{'_'.join([name, *parts])}"
    if folder in table:
        return dict(table[folder])
    parameters, options = family.triton.parameters(key), family.triton.launch_options(key, need.columns)
    path = store_triton_source(name, text)
    try:
        compiled = compile_whole(path, name, dict(parameters), constants, target, **options)
    except OfflineFailed as error:
        raise ExportError(f"kernel {name}: {error}") from error
    title = text.split('"""', 2)[1].strip().splitlines()[0]
    header, source = launcher(name, title, parameters, constants, compiled, target)
    assembly, binary = ("amdgcn", "hsaco") if target.kind == "hip" else ("ptx", "cubin")
    for suffix, content in (
        ("py", text),
        (assembly, compiled.text),
        (binary, compiled.binary),
        ("h", header),
        ("c", source),
    ):
        artifact.write(f"{folder}/{name}.{suffix}", content)
    used, held = compiled.used, occupancy(compiled.used, compiled.warps, target)
    return {
        "folder": folder,
        "kernel": name,
        "op": key.op,
        "target": str(target),
        "configuration": STAND_INS.get(target.arch, target.arch),
        "constants": constants,
        "parameters": [f"{label}: {kind}" for label, kind in parameters],
        "warps": compiled.warps,
        "registers": used.registers,
        "spill_bytes": used.spill_bytes,
        "stack_bytes": used.stack,
        "shared_bytes": used.shared_bytes,
        "fits": not used.over_limit(target),
        "occupancy": round(held.share, 4),
        "occupancy_limit": held.limit,
    }
