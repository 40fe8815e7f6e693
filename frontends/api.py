"""The Python surface: optimize, explain, evaluate. Everything here goes through the torch.compile
backend's road."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from tilewright.compiler.diagnostics import CaptureError
from tilewright.compiler.float64 import Float64, concrete
from tilewright.compiler.pipeline import clone_inputs
from tilewright.compiler.program import Program
from tilewright.compiler.replay import relative_rms, tensors_in
from tilewright.compiler.report import Report
from tilewright.frontends import vector_probe
from tilewright.frontends.breaks import recorded_breaks
from tilewright.frontends.capture import from_dynamo
from tilewright.frontends.compile import (
    DEFAULT_PIPELINE,
    CompileOptions,
    compile_lowered,
    lower_program,
    optimize_program,
)
from tilewright.frontends.loaded_model import Call


@dataclass
class Executable:
    """A compiled model: call it like the model. `reports` holds one report per captured graph, largest
    first."""

    call: Callable[..., Any]
    reports: list[Report] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.call(*args, **kwargs)

    @property
    def report(self) -> Report:
        """The report of the largest graph."""
        if not self.reports:
            raise CaptureError("nothing was captured", remedy="the call ran no tensor operation")
        return self.reports[0]


class _Collecting:
    """A backend that keeps the reports of what it compiles."""

    def __init__(self, options: CompileOptions, *, run: bool, measure: bool = False, model: str = "") -> None:
        self.options = options
        self.reports: list[Report] = []
        self.programs: list[Program] = []
        self._run = run
        self._measure = measure
        self._model = model

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self._run and self.options.lower == "inductor":
            vector_probe.begin(example_inputs)
        started = time.perf_counter()
        program = from_dynamo(gm, example_inputs)
        captured = time.perf_counter() - started
        want = _float64_outputs(program) if self._measure else []
        report = optimize_program(program, self.options, self._model)
        report.seconds["capture"] = captured
        self.reports.append(report)
        self.programs.append(program)
        lower_program(program, self.options, report, run=self._run)
        if self._run:
            return compile_lowered(program, self.options, report)
        if self._measure:
            report.errors = _errors(gm, program, example_inputs, want)
        return gm.forward


def _float64_outputs(program: Program) -> list[torch.Tensor]:
    return tensors_in(Float64(program).run_on(program.example_inputs))


def _errors(
    gm: fx.GraphModule, program: Program, inputs: Sequence[Any], want: list[torch.Tensor]
) -> dict[str, float]:
    """Relative RMS error of eager and of the lowered program against the float64 run, worst output."""
    given = concrete(inputs)
    with torch.no_grad():
        eager = tensors_in(gm(*clone_inputs(given)))
        ours = tensors_in(program.module(*clone_inputs(given)))

    def worst(got: list[torch.Tensor]) -> float:
        return max(
            (relative_rms(g.double(), w.double()) for g, w in zip(got, want, strict=True)), default=0.0
        )

    return {"eager": worst(eager), "tilewright": worst(ours)}


def _largest_first(reports: list[Report]) -> list[Report]:
    return sorted(reports, key=lambda r: -max((p.nodes_before for p in r.passes), default=0))


def optimize(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    pipeline: Any = DEFAULT_PIPELINE,
    *,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Executable:
    """Compile a model for inference by running it once on example arguments.

    model: a module or function of tensors; args, kwargs: one call of it, real tensors. pipeline: text,
    list or Pipeline. options: those of the torch.compile backend. Raises OptionError, PipelineError,
    VerifyError.
    """
    parsed = CompileOptions.parse({"pipeline": pipeline, **options})
    collecting = _Collecting(parsed, run=True)
    compiled = torch.compile(model, backend=collecting)
    with recorded_breaks() as breaks, torch.no_grad():
        compiled(*args, **dict(kwargs or {}))
    reports = _largest_first(collecting.reports)
    for report in reports:
        report.graph_breaks = list(breaks)
    return Executable(compiled, reports)


def explain(
    model: nn.Module | Callable[..., Any],
    args: Sequence[Any] = (),
    pipeline: Any = DEFAULT_PIPELINE,
    *,
    kwargs: Mapping[str, Any] | None = None,
    measure: bool = False,
    name: str = "",
    **options: Any,
) -> Report:
    """The report of the model's largest graph, without compiling it to the end.

    measure: also run the graph in float64 and report the error of eager and of the rewritten program
    against it.
    """
    parsed = CompileOptions.parse({"pipeline": pipeline, "costs": True, "keep_graphs": True, **options})
    collecting = _Collecting(parsed, run=False, measure=measure, model=name)
    # This call's sizes, whatever was compiled before: Dynamo turns a size that changed into a symbol.
    compiled = torch.compile(model, backend=collecting, dynamic=False)
    with recorded_breaks() as breaks, torch.no_grad():
        compiled(*args, **dict(kwargs or {}))
    reports = _largest_first(collecting.reports)
    if not reports:
        raise CaptureError("nothing was captured", remedy="the call ran no tensor operation")
    reports[0].graph_breaks = list(breaks)
    return reports[0]


@dataclass(frozen=True)
class Evaluation:
    """Quality of a candidate beside a baseline, from one run over the same data."""

    measure: str
    """`perplexity` (exp of the mean next-token loss) or `output error` (relative RMS against the
    baseline)."""
    baseline: float
    candidate: float
    ratio: float
    """candidate / baseline for perplexity; 1 + error for output error, so that 1.0 means no loss."""
    items: int
    seconds_baseline: float
    seconds_candidate: float


def evaluate(
    baseline: Callable[..., Any], candidate: Callable[..., Any], data: Sequence[Call], *, labels: bool = False
) -> Evaluation:
    """Run both on every call of `data`, interleaved, and compare.

    labels: the calls are token batches {"input_ids": int64 [B, S]} of a causal language model; the measure is
    perplexity. Otherwise it is the relative RMS of the first floating output.
    """
    losses, errors, seconds = [[0.0, 0.0], [0.0, 0.0]], list[float](), [0.0, 0.0]
    for args, kwargs in data:
        outputs = []
        for side, model in enumerate((baseline, candidate)):
            started = time.perf_counter()
            with torch.no_grad():
                outputs.append(_first_floating(model(*args, **kwargs)))
            seconds[side] += time.perf_counter() - started
        if labels:
            for side, logits in enumerate(outputs):
                total, count = next_token_loss(logits, kwargs["input_ids"])
                losses[side][0] += total
                losses[side][1] += count
        else:
            errors.append(relative_rms(outputs[1], outputs[0]))
    if labels:
        a, b = (math.exp(total / max(count, 1)) for total, count in losses)
        return Evaluation("perplexity", a, b, b / a, len(data), *seconds)
    worst = max(errors, default=0.0)
    return Evaluation("output error", 0.0, worst, 1.0 + worst, len(data), *seconds)


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[float, int]:
    """(summed cross entropy, count) of predicting token t+1 from position t: logits [B, S, V], tokens [B,
    S]."""
    shifted = logits[:, :-1].double().flatten(0, 1)
    total = torch.nn.functional.cross_entropy(shifted, tokens[:, 1:].flatten(), reduction="sum")
    return float(total), tokens[:, 1:].numel()


def _first_floating(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    candidates = [logits] if isinstance(logits, torch.Tensor) else tensors_in(_plain(output))
    for tensor in candidates:
        if tensor.is_floating_point():
            return tensor
    raise CaptureError("the model returned no floating tensor to compare")


def _plain(output: Any) -> Any:
    return tuple(output.values()) if isinstance(output, Mapping) else output
