"""`--format pt2`: an AOTInductor package per entry point, and the kernels of ours that it calls beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.package import package_aoti

from tilewright.compiler.diagnostics import BuildError, ExportError
from tilewright.compiler.ops import semantic_op
from tilewright.compiler.program import InputKind, Program, copy_graph
from tilewright.frontends.chains import find_chains, raise_chains
from tilewright.frontends.compile import INDUCTOR_PATCHES, CompileOptions
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
from tilewright.frontends.export.package import check_archive, open_package
from tilewright.frontends.export.package_weights import (
    content_name,
    own_name,
    read_weights,
    write_weights,
)
from tilewright.frontends.export.parity import check_parity
from tilewright.frontends.export.runner import RUNNER, RUNNER_TEXT
from tilewright.frontends.lowering import lower
from tilewright.kernels.common.cpp import NAMESPACE
from tilewright.kernels.table import host_target
from tilewright.runtime.build import LIBRARY

_OPTIONS = {
    **INDUCTOR_PATCHES,
    "size_asserts": True,
    "aot_inductor.package": True,
    # What is not a kernel is one long function that calls them: -O1 takes twice as long over it for nothing.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    # Weights are handed over, neither linked into the library nor pickled: `_store` writes them.
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}


def write_pt2(
    artifact: Artifact, name: str, entries: list[Entry], options: CompileOptions, progress: Progress
) -> dict[str, Any]:
    """Capture, rewrite, lower, compile and check every entry point; returns the manifest's description."""
    rows, held, stored = [], dict[str, Tensor](), dict[str, str]()
    for entry in entries:
        with progress(f"{entry.name}: capturing and rewriting"):
            captured = capture(entry, options, name)
            shapes = {side: shape_row(captured, side) for side in ("inputs", "outputs")}
            defined = fx.GraphModule(captured.program.module, copy_graph(captured.program.graph))
            if options.kernels:
                chains = find_chains(captured.program, host_target(), captured.report)
                raise_chains(captured.program, chains, captured.report)
            lower(captured.program, captured.report, use_kernels=options.kernels)
        operators = _write_operators(artifact, captured)
        file = f"{entry.name}.pt2"
        with progress(f"{entry.name}: compiling"):
            weights = _compile(captured, artifact.path(file))
            files = _store(artifact, entry.name, weights, stored)
            del weights
            release_memory()
        with progress(f"{entry.name}: checking"):
            check_archive(artifact.folder / file)
            parity = check_parity(captured, defined, _Opened(artifact.folder, file, operators, files))
        extra = {**shapes, "file": file, "operators": operators, "weights": files, "parity": parity}
        rows.append(describe_entry(captured, extra))
        held |= captured.weights()
        del captured, defined
        release_memory()
    artifact.write(RUNNER, RUNNER_TEXT)
    return {"model": describe_model(name, held), "versions": versions("triton"), "entries": rows}


class _Opened:
    """A package, opened when first called: its weights and the model's are not in memory at once."""

    def __init__(self, folder: Path, file: str, operators: list[str], weights: list[str]) -> None:
        self._package, self._operators = folder / file, [folder / name for name in operators]
        self._weights = [folder / name for name in weights]
        self._call: Callable[..., tuple[Tensor, ...]] | None = None

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._call is None:
            self._call = open_package(self._package, self._operators, read_weights(self._weights))
        return list(self._call(*tensors))


def _write_operators(artifact: Artifact, captured: Captured) -> list[str]:
    """Copy the library of each kernel the lowered program calls. ExportError for ops that only Python has."""
    missing = sorted({str(n.target) for n in captured.program.graph.nodes if semantic_op(n.target)})
    if missing:
        raise ExportError(
            f"{captured.entry.name} calls {', '.join(missing)}, which no compiled kernel runs here",
            remedy="tilewright explain says why; other options of the pass may have a kernel",
        )
    paths = {row["kernel"]: Path(row["source"]).parent for row in captured.report.kernels if row["source"]}
    called = {
        n.target._schema.name.split("::")[1]
        for n in captured.program.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == NAMESPACE
    }
    names = []
    for kernel in sorted(called):
        names.append(f"operators/{kernel}.so")
        if not artifact.path(names[-1]).exists():
            shutil.copyfile(paths[kernel] / LIBRARY, artifact.path(names[-1]))
    return names


def _store(artifact: Artifact, program: str, weights: dict[str, Tensor], stored: dict[str, str]) -> list[str]:
    """Write the weights that no file has yet; the files that hold those of the program.

    stored: name -> file, of the programs before it and then of this one.
    """
    new = {name: tensor for name, tensor in weights.items() if name not in stored}
    if new:
        file = f"{program}.safetensors"
        write_weights(artifact.path(file), new)
        stored |= dict.fromkeys(new, file)
    return sorted({stored[name] for name in weights})


def _compile(captured: Captured, path: Path) -> dict[str, Tensor]:
    """Write a package without weights; what its program reads, by the names of `package_weights`."""
    entry = captured.entry
    symbol = torch.export.Dim.DYNAMIC  # type: ignore[attr-defined]
    shapes = tuple({axis: symbol for axis in entry.axes.get(name, {})} or None for name in entry.inputs)
    try:
        with torch.no_grad():
            exported = torch.export.export(
                bound_module(captured.program),
                tuple(entry.tensors),
                dynamic_shapes=shapes if any(shapes) else None,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            made: Any = torch._inductor.aot_compile(
                exported.module(check_guards=False), tuple(entry.tensors), options=_OPTIONS
            )
    except torch._inductor.exc.InductorError as error:
        raise BuildError(f"{entry.name}: {str(error).splitlines()[0][:300]}") from error
    package_aoti(str(path), [file for file in made if isinstance(file, str)])
    (found,) = [part for part in made if not isinstance(part, str)]
    bound = set(exported.state_dict)
    return {
        name if name in bound else own_name(entry.name, name): tensor.detach()
        for name, (tensor, _) in found.items()
    }


def bound_module(program: Program) -> fx.GraphModule:
    """The program as a module that holds its weights and derived tensors; only the user's inputs are left."""
    graph, root = copy_graph(program.graph), nn.Module()
    kinds = {spec.name: spec for spec in program.inputs}
    values = dict(zip(kinds, program.example_inputs, strict=True))
    for node in list(graph.nodes):
        if node.op == "placeholder" and kinds[node.name].kind is InputKind.WEIGHT:
            if kinds[node.name].mutated:
                raise ExportError(
                    f"the model changes its buffer {kinds[node.name].source}",
                    remedy="a language model with --capacity takes the buffers of its cache as inputs",
                )
            tensor = values[node.name]
        elif node.op == "get_attr":
            tensor = program.module.get_buffer(str(node.target))
        else:
            continue
        if node.users:
            name = content_name(tensor)
            if not hasattr(root, name):
                root.register_buffer(name, tensor.detach().contiguous())
            with graph.inserting_after(node):
                read = graph.get_attr(name)
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
        graph.erase_node(node)
    return fx.GraphModule(root, graph)
