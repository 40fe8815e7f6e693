"""Writes ONNX models with one weight file beside them, and runs them in onnxruntime to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from tilewright.frontends.export.artifact import Artifact
from tilewright.frontends.export.captured import Captured
from tilewright.frontends.export.onnx_check import check_external_data
from tilewright.frontends.export.onnx_graph import INLINE_BYTES, digest, onnx_type, tensor_bytes
from tilewright.frontends.export.onnx_walk import OnnxModel

WEIGHTS = "weights.data"
_ALIGNMENT = 4096
"""Offset of a weight in its file: a whole page, so that a runtime can map it."""


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
    """An onnxruntime session on the CPU; `library` holds operators of the tilewright domain. LoadError for a
    model that would read files outside its folder."""
    import onnxruntime

    check_external_data(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(
    opening: Callable[[], Any], model: OnnxModel, captured: Captured
) -> Callable[[list[Tensor]], list[Tensor]]:
    """A session as a function of the entry point's tensors; it is opened by the first call."""
    opened: Any = None

    def run(tensors: list[Tensor]) -> list[Tensor]:
        nonlocal opened
        opened = opening() if opened is None else opened
        given = captured.inputs_for(tensors)
        feed = {row["name"]: given[i].numpy() for row, i in zip(model.inputs, model.given, strict=True)}
        return [torch.from_numpy(value) for value in opened.run(None, feed)]

    return run


def operator_counts(proto: ModelProto) -> Mapping[str, int]:
    """How many nodes of each operator a model has."""
    counts: dict[str, int] = {}
    for node in proto.graph.node:
        key = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))
