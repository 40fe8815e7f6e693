"""The truth a bisection compares with: the captured program run in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tilewright.compiler.diagnostics import CaptureError
from tilewright.compiler.float64 import Float64
from tilewright.compiler.program import Program
from tilewright.compiler.replay import relative_rms, tensors_in
from tilewright.frontends.capture import from_dynamo, normalize


def captured_program(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """The normalized program of the model's largest graph."""
    programs: list[Program] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, inputs)
        normalize(program)
        programs.append(program)
        return gm.forward

    with torch.no_grad():
        torch.compile(module, backend=backend)(*args, **kwargs)
    if not programs:
        raise CaptureError("nothing was captured", remedy="the call ran no tensor operation")
    return max(programs, key=lambda p: len(p.graph.nodes))


def float64_check(program: Program, tolerance: float) -> Callable[[Program], bool]:
    """A test that runs a rewritten program in float64 and compares every output with the original's."""
    want = tensors_in(Float64(program).run_on(program.example_inputs))

    def accept(other: Program) -> bool:
        got = tensors_in(Float64(other).run_on(other.example_inputs))
        return all(relative_rms(g, w) <= tolerance for g, w in zip(got, want, strict=True))

    return accept
