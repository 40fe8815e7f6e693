"""What an ONNX model may read besides its own file: weights in files of its own folder, and nothing else."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.export.artifact import is_safe
from tilewright.frontends.model_files import show


def check_external_data(path: Path) -> None:
    """LoadError unless every tensor of the model lies in it, or in a regular file of its folder that holds
    as many bytes as the tensor names. Follows no link and opens no other file."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise LoadError(f"is not an ONNX model: {str(error)[:80]!a}", where=str(path)) from None
    for tensor in _tensors(model):
        fault = _fault(tensor, path.parent) if tensor.data_location == TensorProto.EXTERNAL else ""
        if fault:
            raise LoadError(f"the data of its tensor {show(tensor.name)} {fault}", where=str(path))


def _fault(tensor: Any, folder: Path) -> str:
    """What is wrong with the place of one tensor's data, empty for nothing."""
    given = {entry.key: entry.value for entry in tensor.external_data}
    name = given.get("location", "")
    if not is_safe(name):
        return f"would be read from {show(name)}, outside its folder"
    for at in (folder / name, *[folder / part for part in Path(name).parents if part.name]):
        if at.is_symlink():
            return f"would be read through the link {show(name)}"
    try:
        info = (folder / name).lstat()
        offset, length = int(given.get("offset", "0")), int(given.get("length", "0"))
    except (OSError, ValueError):
        return f"has no place in {show(name)}"
    if not stat.S_ISREG(info.st_mode) or offset < 0 or length < 0 or offset + length > info.st_size:
        return f"has no place in {show(name)}"
    return ""


def _tensors(model: Any) -> Iterator[Any]:
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)
