"""`--format onnx`: one model file per entry point and one weight file for all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tilewright.frontends.compile import CompileOptions
from tilewright.frontends.export.api import Progress
from tilewright.frontends.export.artifact import Artifact
from tilewright.frontends.export.captured import (
    capture,
    describe_entry,
    describe_model,
    release_memory,
    versions,
)
from tilewright.frontends.export.entries import Entry
from tilewright.frontends.export.onnx_custom import CustomOperators
from tilewright.frontends.export.onnx_file import (
    WEIGHTS,
    WeightFile,
    operator_counts,
    runner,
    session,
    write_model,
)
from tilewright.frontends.export.onnx_walk import to_onnx
from tilewright.frontends.export.parity import check_parity


def write_onnx(
    artifact: Artifact,
    name: str,
    entries: list[Entry],
    options: CompileOptions,
    progress: Progress,
    *,
    operators: str = "standard",
) -> dict[str, Any]:
    """Capture, rewrite, write and check every entry point; returns the manifest's description.

    operators: `custom` calls our kernels where there are any, from a library that lies beside the model.
    """
    rows, held = [], dict[str, Tensor]()
    with artifact.path(WEIGHTS).open("wb") as file:
        weights = WeightFile(file)
        for entry in entries:
            with progress(f"{entry.name}: capturing and rewriting"):
                captured = capture(entry, options, name)
            with progress(f"{entry.name}: writing ONNX"):
                custom = CustomOperators() if operators == "custom" else None
                if custom is not None and entry.shared:
                    custom.attend_to_held(captured)
                names = captured.names()
                position = {n: p for p, n in names.items()}["position_ids"] if entry.shared else ""
                own = "" if custom is not None else position
                model = to_onnx(captured.program, names, entry.outputs, captured.axes, custom, own)
                write_model(artifact, f"{entry.name}.onnx", model, weights)
                file.flush()
            library = None
            if custom is not None and custom.operators:
                with progress(f"{entry.name}: building the operators"):
                    library = f"operators/{entry.name}.so"
                    custom.save(artifact, library)
            with progress(f"{entry.name}: checking in onnxruntime"):
                place = artifact.folder / f"{entry.name}.onnx"
                opened = partial(session, place, library=artifact.folder / library if library else None)
                parity = check_parity(captured, captured.program.module, runner(opened, model, captured))
            extra: dict[str, Any] = {
                "file": f"{entry.name}.onnx",
                "inputs": model.inputs,
                "outputs": model.outputs,
                "operators": operator_counts(model.proto),
                "parity": parity,
            }
            if custom is not None:
                extra |= {"library": library, "standard": custom.refused}
            rows.append(describe_entry(captured, extra))
            held |= captured.weights()
            del captured, model, opened, custom
            release_memory()
    if artifact.path(WEIGHTS).stat().st_size == 0:
        artifact.path(WEIGHTS).unlink()
    return {
        "model": describe_model(name, held),
        "versions": versions("onnx", "onnxruntime"),
        "entries": rows,
    }
