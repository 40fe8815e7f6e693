"""`tilewright.export`: a model, a pipeline and a format become an artifact."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tilewright.compiler.diagnostics import OptionError, nearest
from tilewright.frontends.compile import DEFAULT_PIPELINE, CompileOptions
from tilewright.frontends.export.artifact import check_place, new_artifact, read_manifest
from tilewright.frontends.export.captured import describe_pipeline
from tilewright.frontends.export.description import write_description
from tilewright.frontends.export.entries import LOGITS, Axes, entries_of, entry_of
from tilewright.frontends.loaded_model import LoadedModel

Progress = Callable[[str], Any]
"""Told what is being done; gives a context manager."""
_WRITERS = {
    "onnx": ("onnx_export", "write_onnx"),
    "pt2": ("pt2_export", "write_pt2"),
    "kernels": ("kernels_export", "write_kernels"),
}
FORMATS = tuple(_WRITERS)
OPERATORS = ("standard", "custom")


@contextmanager
def _silent(what: str) -> Iterator[None]:
    yield


def export(
    model: nn.Module | LoadedModel | str,
    args: Sequence[Any] = (),
    pipeline: Any = DEFAULT_PIPELINE,
    path: str | Path = "",
    format: str = "onnx",
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Axes | None = None,
    static: bool = False,
    kind: str | None = None,
    length: int | None = None,
    operators: str = "standard",
    capacity: int | None = None,
    logits: str | None = None,
    weights: str | None = None,
    progress: Progress = _silent,
    **options: Any,
) -> dict[str, Any]:
    """Write a model, rewritten by a pipeline, as a folder that needs neither the model nor this package.

    model: a module with one example call `args`, `kwargs`, or a loaded model or MODEL text, which brings its
    own (a language model: prefill and decode with keys and values as tensors). path: the folder to make.
    format: `onnx`, `pt2` or `kernels`. dynamic: {"input_ids": {1: "sequence"}}; static: no dynamic sizes for
    a language model. operators: `custom` has onnxruntime run our kernels from a library beside the model
    (format onnx). capacity: a language model's decode step keeps keys and values in buffers of that many
    tokens, so that a step copies none of them: a caller binds them as input and output at once (onnx), or
    the step writes into its inputs (pt2), over which `tilewright.load_language_model` generates. logits:
    prefill gives those of `all` tokens or of the `last` (default of pt2 with a capacity). weights: a file
    (.safetensors) to load over those of a MODEL text. options: those of the torch.compile backend. Returns
    the manifest. Raises ExportError, ParityError, OptionError and those of the passes; nothing is left at
    `path` then.
    """
    parsed = CompileOptions.parse({"pipeline": pipeline, **options})
    final = check_request(format, Path(path), operators, capacity, logits)
    if weights is not None and not isinstance(model, str):
        raise OptionError(f"weights = {weights!r} belongs to a MODEL text, not a model that is loaded")
    loaded = None
    if isinstance(model, nn.Module):
        for option, value in (("capacity", capacity), ("logits", logits)):
            if value is not None:
                raise OptionError(f"{option} = {value} belongs to a loaded language model, not a module")
        name, entries = type(model).__name__, [entry_of("call", model, args, kwargs or {}, dynamic or {})]
    elif args or kwargs:
        raise OptionError("args and kwargs belong to a module; a loaded model brings its own call")
    else:
        loaded = _loaded(model, weights, progress, final)
        name = loaded.name
        entries = entries_of(
            loaded, dynamic or {}, static=static, kind=kind, length=length, capacity=capacity,
            in_place=format == "pt2", logits=logits,
        )  # fmt: skip
    with new_artifact(final) as artifact:
        more = {"operators": operators} if format == "onnx" else {}
        described = _writer(format)(artifact, name, entries, parsed, progress, **more)
        if loaded is not None and format == "pt2" and any(entry.written for entry in entries):
            write_description(artifact, loaded)
        with progress("writing to disk"):
            artifact.finish({"kind": format, "pipeline": describe_pipeline(parsed.pipeline), **described})
    return read_manifest(final)


def check_request(
    format: str,
    path: Path,
    operators: str = "standard",
    capacity: int | None = None,
    logits: str | None = None,
) -> Path:
    """What can be judged before a model is loaded; returns the absolute path. OptionError, ExportError."""
    if format not in FORMATS:
        raise OptionError(f"format = {format!r}", remedy=nearest(format, FORMATS))
    if operators not in OPERATORS:
        raise OptionError(f"operators = {operators!r}", remedy=nearest(operators, OPERATORS))
    if operators != "standard" and format != "onnx":
        raise OptionError(f"operators = {operators!r} belongs to the format onnx, not {format}")
    if capacity is not None and format not in ("onnx", "pt2"):
        raise OptionError(f"capacity = {capacity} belongs to the formats onnx and pt2, not {format}")
    if logits is not None and logits not in LOGITS:
        raise OptionError(f"logits = {logits!r}", remedy=nearest(logits, LOGITS))
    if not path.name:
        raise OptionError(f"path = {str(path)!r}", remedy="name the folder to make")
    return check_place(path)


Writer = Callable[..., dict[str, Any]]
"""writer(artifact, name, entries, options, progress, *, operators for onnx)."""


def _writer(format: str) -> Writer:
    module, function = _WRITERS[format]
    found: Writer = getattr(importlib.import_module(f"tilewright.frontends.export.{module}"), function)
    return found


def _loaded(model: LoadedModel | str, weights: str | None, progress: Progress, final: Path) -> LoadedModel:
    """A MODEL text as its model, the weights in a file beside `final` as long as nothing reads them."""
    if not isinstance(model, str):
        return model
    from tilewright.frontends.loaders import resolve
    from tilewright.frontends.weight_offload import offload_weights

    with progress(f"loading {model}"):
        loaded = resolve(model, weights=weights)
        offload_weights(loaded.module, final.parent)  # what is derived from them stays in memory
    return loaded
