"""The torch.compile backend: `torch.compile(model, backend="tilewright", options={...})`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from tilewright.compiler.diagnostics import CaptureError, OptionError
from tilewright.compiler.report import Report
from tilewright.frontends import kv_compiled, vector_probe
from tilewright.frontends.capture import from_dynamo
from tilewright.frontends.compile import (
    REPORTS,
    CompileOptions,
    compile_graph,
    compile_lowered,
    lower_program,
    optimize_program,
)

_LOG = logging.getLogger("tilewright.frontends")


def tilewright_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph; registered under the entry-point group `torch_dynamo_backends`.

    Raises OptionError for an unknown option or value, PipelineError for an illegal pipeline, VerifyError
    when a rewrite was found wrong. May be called twice for one frame: the Dynamo graph is never changed.
    """
    if mode is not None:
        raise OptionError(
            f"mode = {mode!r}: this backend has no modes", remedy="use options={'pipeline': ...}"
        )
    parsed = CompileOptions.parse(options)
    if parsed.lower == "inductor":
        vector_probe.begin(example_inputs)
    started = time.perf_counter()
    try:
        program = from_dynamo(gm, example_inputs)
    except CaptureError as error:
        return _left_alone(gm, example_inputs, parsed, error)
    if parsed.verify == "outputs" and any(n.target is kv_compiled.attend for n in program.graph.nodes):
        raise OptionError(
            "verify = outputs runs a program many times, and this one stores what it sees in a cache",
            remedy="verify='shapes', or a call without tilewright.kv_cache",
        )
    captured = time.perf_counter() - started
    report = optimize_program(program, parsed)
    report.seconds["capture"] = captured
    lower_program(program, parsed, report)
    return compile_lowered(program, parsed, report)


def _left_alone(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions, error: CaptureError
) -> Callable[..., Any]:
    """Hand a graph that is not understood on as it was, and say so in a warning and in the report."""
    _LOG.warning("a graph is left as it was: %s", error.line())
    REPORTS.append(Report(origin="dynamo", left_alone=error.line()))
    return compile_graph(gm, example_inputs, options)


vector_probe.begin_early()  # torch loads this module when the backend is first looked up: tracing comes next
