"""Writes ONNX models with one weight file beside them, and runs them in onnxruntime to compare."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from tilewright.compiler.diagnostics import ParityError
from tilewright.compiler.parity import relative_rms
from tilewright.frontends.export.artifact import Artifact
from tilewright.frontends.export.captured import Captured
from tilewright.frontends.export.onnx_graph import INLINE_BYTES, OnnxGraph, digest, onnx_type, tensor_bytes
from tilewright.frontends.export.onnx_walk import OnnxModel

WEIGHTS = "weights.data"
_ALIGNMENT = 4096
"""Offset of a weight in its file: a whole page, so that a runtime can map it."""
ROUNDING_LIMIT, INT8_LIMIT = 1e-4, 0.1
"""Relative RMS between onnxruntime and the program: same function in float32; activations cut to 8 bits."""

__all__ = ["WEIGHTS", "OnnxGraph", "WeightFile", "check_parity", "session", "write_model"]


class WeightFile:
    """Weights one after the other; equal ones of several models are held once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """(offset, bytes) of a tensor's elements, written when they are new."""
        key = digest(tensor)
        if key not in self._places:
            start = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
            self._file.write(b"\0" * (start - self._file.tell()))
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._file.write(flat.numpy().data)
            self._places[key] = (start, flat.numel())
        return self._places[key]


def write_model(artifact: Artifact, name: str, model: OnnxModel, weights: WeightFile) -> None:
    """Write `name`; constants above `INLINE_BYTES` go to the weight file."""
    for label, tensor in model.weights.items():
        row = model.proto.graph.initializer.add()
        row.name, row.data_type = label, onnx_type(tensor.dtype)
        row.dims.extend(tensor.shape)
        if tensor.numel() * tensor.element_size() <= INLINE_BYTES:
            row.raw_data = tensor_bytes(tensor)
            continue
        offset, size = weights.place(tensor)
        row.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(size))):
            entry = row.external_data.add()
            entry.key, entry.value = key, value
    model.weights.clear()
    artifact.write(name, model.proto.SerializeToString())


def session(path: Path, *, threads: int = 0, library: Path | None = None) -> Any:
    """An onnxruntime session on the CPU; `library` holds operators of the tilewright domain."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_parity(captured: Captured, model: OnnxModel, opened: Any) -> dict[str, Any]:
    """Run the example call, and one with other dynamic sizes, in onnxruntime and in PyTorch.

    `program`: worst relative RMS against the rewritten program; `model`: against the original model.
    ParityError when the former exceeds what the formats explain.
    """
    limit = INT8_LIMIT if _cuts_activations(captured) else ROUNDING_LIMIT
    found: dict[str, Any] = {"limit": limit}
    calls = {"example": captured.entry.tensors, "other sizes": captured.entry.resized()}
    for name, tensors in calls.items():
        if tensors is None:
            continue
        given = captured.inputs_for(tensors)
        feed = {row["name"]: given[i].numpy() for row, i in zip(model.inputs, model.given, strict=True)}
        got = [torch.from_numpy(value) for value in opened.run(None, feed)]
        with torch.no_grad():
            program = _tensors(captured.program.module(*given))
            original = _tensors(captured.entry.module(*tensors))
        found[name] = {"program": _worst(got, program), "model": _worst(got, original)}
        if not found[name]["program"] <= limit:
            raise ParityError(
                f"{captured.entry.name}: onnxruntime differs from PyTorch by {found[name]['program']:.1e}, "
                f"limit {limit:.0e} ({name})"
            )
    return found


def _cuts_activations(captured: Captured) -> bool:
    """True when a quantized linear layer takes 8-bit activations."""
    nodes = [n for n in captured.program.graph.nodes if "quantized_linear" in str(n.target)]
    return any(re.search(r"\.int8-(group|token)\.", str(n.args[-1])) for n in nodes)


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in (values if isinstance(values, (list, tuple)) else (values,)) if isinstance(v, Tensor)]


def _worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The worst relative RMS over outputs of equal shape; infinite where one differs in shape."""
    errors = [0.0]
    for g, w in zip(got, want, strict=False):
        if g.shape != w.shape:
            return math.inf
        errors.append(relative_rms(g, w) if w.is_floating_point() else float(not torch.equal(g, w)))
    return max(errors)


def operator_counts(proto: ModelProto) -> Mapping[str, int]:
    """How many nodes of each operator a model has."""
    counts: dict[str, int] = {}
    for node in proto.graph.node:
        key = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))
