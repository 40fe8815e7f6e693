"""The torch.compile backend: `torch.compile(model, backend="tilewright", options={...})`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.capture import from_dynamo
from tilewright.frontends.compile import CompileOptions, compile_lowered, lower_program, optimize_program


def tilewright_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph; registered under the entry-point group `torch_dynamo_backends`.

    Raises OptionError for an unknown option or value, PipelineError for an illegal pipeline, VerifyError
    when a
    rewrite was found wrong. May be called twice for one frame: the Dynamo graph is never changed.
    """
    if mode is not None:
        raise OptionError(
            f"mode = {mode!r}: this backend has no modes", remedy="use options={'pipeline': ...}"
        )
    parsed = CompileOptions.parse(options)
    started = time.perf_counter()
    program = from_dynamo(gm, example_inputs)
    captured = time.perf_counter() - started
    report = optimize_program(program, parsed)
    report.seconds["capture"] = captured
    lower_program(program, parsed, report)
    return compile_lowered(program, parsed, report)
