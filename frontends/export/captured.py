"""An entry point as a program after its passes, with what the manifest says about it."""

from __future__ import annotations

import gc
import hashlib
import inspect
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor

from tilewright.compiler.diagnostics import CaptureError, ExportError
from tilewright.compiler.paging import give_back_freed, page_out
from tilewright.compiler.pipeline import Pipeline
from tilewright.compiler.program import InputKind, Program
from tilewright.compiler.report import Report
from tilewright.compiler.stage import Exactness
from tilewright.frontends.capture import from_export
from tilewright.frontends.compile import CompileOptions, optimize_program
from tilewright.frontends.export.entries import Entry

_STRENGTH = [e.value for e in (Exactness.BITWISE, Exactness.ROUNDING, Exactness.APPROXIMATE)]
_UNBOUNDED = 1 << 30
"""A size that no call reaches: PyTorch proves less about sizes without an end."""


@dataclass
class Captured:
    """One entry point: the program, how it was rewritten, and its dynamic sizes."""

    entry: Entry
    program: Program
    report: Report
    axes: dict[str, str]
    """Symbol of a dynamic size -> the user's name."""
    bounds: dict[str, list[int | None]]
    """The user's name -> [least, most] size that was captured; None: no bound."""

    @property
    def exactness(self) -> str:
        """The weakest promise among the passes that changed something."""
        changed = [p.exactness for p in self.report.passes if p.applied]
        return max(changed, key=_STRENGTH.index, default=_STRENGTH[0])

    def names(self) -> dict[str, str]:
        """Placeholder -> name of the input."""
        users = [spec.name for spec in self.program.inputs if spec.kind is InputKind.USER]
        return dict(zip(users, self.entry.inputs, strict=True))

    def weights(self) -> dict[str, Tensor]:
        """The model's own weights by path, without what tracing found in its calls (a cache's empty keys)."""
        module = self.entry.module
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        own = {path.removeprefix("inner.") for path, _ in named}
        pairs = zip(self.program.inputs, self.program.example_inputs, strict=True)
        return {spec.source: value for spec, value in pairs if spec.source in own}

    def inputs_for(self, tensors: list[Tensor]) -> list[Any]:
        """The program's inputs in order, with these tensors as the user's."""
        given = iter(tensors)
        pairs = zip(self.program.inputs, self.program.example_inputs, strict=True)
        return [next(given) if spec.kind is InputKind.USER else value for spec, value in pairs]


def _exported(entry: Entry, dims: Mapping[str, Any]) -> torch.export.ExportedProgram:
    shapes = tuple(
        {axis: dims[text] for axis, text in entry.axes.get(name, {}).items()} or None for name in entry.inputs
    )
    try:
        with torch.no_grad():
            return torch.export.export(
                entry.module,
                tuple(entry.tensors),
                dynamic_shapes=(shapes,) if any(shapes) else None,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except torch._dynamo.exc.UserError as error:
        if any(dim is not torch.export.Dim.DYNAMIC for dim in dims.values()):  # type: ignore[attr-defined]
            raise
        raise _not_captured(entry, error) from error
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise _not_captured(entry, error) from error


def _not_captured(entry: Entry, error: Exception) -> CaptureError | ExportError:
    if any(entry.axes.values()) and "dynamic" in str(error).lower():
        return ExportError(f"{entry.name}: {_first_line(error)}", remedy="name fewer axes")
    return CaptureError(f"{entry.name} cannot be captured: {_first_line(error)}")


def capture(entry: Entry, options: CompileOptions, model: str = "") -> Captured:
    """Capture one entry point with torch.export and run the pipeline; ExportError, errors of the passes."""
    names = {text for named in entry.axes.values() for text in named.values()}
    try:
        # One symbol for a name: sizes that are equal by name are equal in the graph.
        exported = _exported(entry, {n: torch.export.Dim(n, min=2, max=_UNBOUNDED) for n in names})
    except torch._dynamo.exc.UserError:
        # The model bounds a size, or relates sizes: PyTorch finds the bounds.
        exported = _exported(entry, dict.fromkeys(names, torch.export.Dim.DYNAMIC))  # type: ignore[attr-defined]
    program = from_export(exported)
    for spec in program.inputs:
        spec.source = spec.source.removeprefix("inner.")
    ranges = exported.range_constraints
    axes, bounds = _symbols(entry, program, ranges)
    del exported
    release_memory()
    report = optimize_program(program, options, model)
    program.module.recompile()
    kept, _ = _symbols(entry, program, ranges)
    lost = sorted(set(axes.values()) - set(kept.values()))
    if lost:
        raise ExportError(
            f"{entry.name}: the pipeline fixed the dynamic axis {', '.join(lost)}",
            remedy="leave out the pass that needs a known size, or name no dynamic axis",
        )
    entry.release()
    release_memory()
    return Captured(entry, program, report, axes, bounds)


def _symbols(
    entry: Entry, program: Program, ranges: Mapping[Any, Any]
) -> tuple[dict[str, str], dict[str, list[int | None]]]:
    users = [spec.name for spec in program.inputs if spec.kind is InputKind.USER]
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    axes: dict[str, str] = {}
    bounds: dict[str, list[int | None]] = {}
    for placeholder, name in zip(users, entry.inputs, strict=True):
        for axis, text in entry.axes.get(name, {}).items():
            size = nodes[placeholder].meta["val"].shape[axis]
            if isinstance(size, int) or size.node.expr.is_number:
                continue
            axes.setdefault(str(size.node.expr), text)
            found = ranges.get(size.node.expr)
            if found is not None:
                bounds[text] = [_number(found.lower), _number(found.upper)]
    return axes, bounds


def _number(bound: Any) -> int | None:
    try:
        value = int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    return value if value < _UNBOUNDED else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] if lines else type(error).__name__


def release_memory() -> None:
    """Collect graphs, which are cycles, and give free pages back: passes leave the heap full of holes.

    torch.export keeps the last graph of each trace, with its weights, in a map that its error messages read.
    """
    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
    gc.collect()
    give_back_freed()


def shape_row(captured: Captured, side: str) -> list[dict[str, Any]]:
    """name, dtype and shape of the `inputs` or `outputs`; dynamic sizes by the user's names."""
    graph = captured.program.graph
    if side == "inputs":
        users = captured.names()
        nodes = [n for n in graph.nodes if n.op == "placeholder" and n.name in users]
        names = [users[n.name] for n in nodes]
    else:
        end = next(n for n in reversed(graph.nodes) if n.op == "output")
        nodes = [n for n in end.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        names = captured.entry.outputs
    rows = []
    for name, node in zip(names, nodes, strict=False):
        value = node.meta["val"]
        shape = [n if isinstance(n, int) else axis_text(n, captured.axes) for n in value.shape]
        rows.append({"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape})
    return rows


def axis_text(size: Any, axes: Mapping[str, str]) -> str:
    """A symbolic size in the user's names: `past + 1`."""
    return re.sub(r"[A-Za-z_]\w*", lambda m: axes.get(m[0], m[0]), str(size))


def describe_model(name: str, rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name and SHA-256 of every weight (path, dtype, shape, values)."""
    digest = hashlib.sha256()
    for path, value in sorted(rows.items()):
        digest.update(f"{path} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        page_out(value)
    return {"name": name, "weights": len(rows), "fingerprint": digest.hexdigest()}


def describe_pipeline(pipeline: Any) -> dict[str, Any]:
    """Text of a pipeline and SHA-256 of it and of the source of its passes."""
    parsed = Pipeline.parse(pipeline)
    digest = hashlib.sha256(parsed.text().encode())
    for source in sorted({inspect.getsource(inspect.getmodule(type(p)) or type(p)) for p in parsed.passes}):
        digest.update(source.encode())
    return {"text": parsed.text(), "fingerprint": digest.hexdigest()}


def versions(*packages: str) -> dict[str, str]:
    """Versions of what took part in an export."""
    found = {name: metadata.version(name) for name in ("torch", *packages)}
    return {"python": platform.python_version(), **found}


def describe_entry(captured: Captured, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's row of one entry point."""
    return {
        "name": captured.entry.name,
        "exactness": captured.exactness,
        "dynamic": captured.bounds,
        **({"shared": captured.entry.shared} if captured.entry.shared else {}),
        **({"written": captured.entry.written} if captured.entry.written else {}),
        "passes": {p.name: len(p.applied) for p in captured.report.passes if p.applied},
        **extra,
    }
