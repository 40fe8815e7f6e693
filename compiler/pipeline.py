"""Pipelines: ordered passes, checked when built, run with rollback, fuel, verification and a report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from tilewright.compiler import options as option_text
from tilewright.compiler import registry
from tilewright.compiler.diagnostics import OptionError, PipelineError, TilewrightError, VerifyError
from tilewright.compiler.float64 import Float64
from tilewright.compiler.log import Fuel, PassLog
from tilewright.compiler.passes_base import Pass
from tilewright.compiler.program import GraphRecord, Program
from tilewright.compiler.replay import Replayer, relative_rms, tensors_in
from tilewright.compiler.report import PassReport
from tilewright.compiler.stage import Exactness
from tilewright.compiler.verify import verify, verify_shapes

Verify = Literal["off", "shapes", "outputs"]
FLOAT64_TOLERANCE = 1e-9
"""Relative RMS allowed between the float64 runs of a program before and after an exact pass."""


@dataclass(frozen=True)
class RunOptions:
    """How a pipeline runs."""

    verify: Verify = "off"
    """`shapes`: recompute every recorded shape after each pass. `outputs`: also run the program before and
    after each exact pass in float64 and compare."""
    replay: bool = True
    """Validate each applied rewrite on random inputs."""
    fuel: int | None = None
    """At most this many rewrites in all; None means no limit."""
    on_pass_error: Literal["raise", "skip"] = "raise"
    keep_graphs: bool = False
    """Keep the printed graph before and after each pass in the report."""

    def __post_init__(self) -> None:
        if self.verify not in ("off", "shapes", "outputs"):
            raise OptionError(f"verify = {self.verify!r}: expected one of off, shapes, outputs")
        if self.on_pass_error not in ("raise", "skip"):
            raise OptionError(f"on_pass_error = {self.on_pass_error!r}: expected one of raise, skip")
        if self.fuel is not None and (type(self.fuel) is not int or self.fuel < 0):
            raise OptionError(f"fuel = {self.fuel!r}: expected a whole number, 0 or more, or none")


class Pipeline:
    """An ordered tuple of passes. `Pipeline.parse` reads text, pass values, or a mix of both in a list."""

    def __init__(self, passes: Iterable[Pass]) -> None:
        self.passes = tuple(passes)
        self._check_order()

    @classmethod
    def parse(cls, source: str | Sequence[Any] | Pipeline) -> Pipeline:
        """From `name{opt=v},name`, a list of pass values and texts, or a pipeline; PipelineError,
        OptionError."""
        if isinstance(source, Pipeline):
            return source
        if not isinstance(source, (str, Pass, list, tuple)):
            raise PipelineError(
                f"pipeline = {source!r}: expected text, a list of passes, or a Pipeline",
                remedy="write 'name{option=value},name'",
            )
        items = [source] if isinstance(source, (str, Pass)) else list(source)
        passes: list[Pass] = []
        by_preset: list[Pass] = []
        for item in items:
            if isinstance(item, Pass):
                passes.append(item)
            elif isinstance(item, str):
                for name, texts in option_text.split_pipeline(item):
                    resolved = _resolve(name, texts)
                    passes.extend(resolved)
                    by_preset.extend(resolved if name in registry.presets() else ())
            else:
                raise PipelineError(
                    f"a pipeline holds pass names and pass values, not {type(item).__name__}",
                    remedy="write 'name{option=value}' or passes.Name(option=value)",
                )
        return cls(_at_their_stages(passes, by_preset))

    def text(self) -> str:
        """The pipeline as text that parses back to an equal pipeline."""
        return ",".join(p.text() for p in self.passes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)

    def _check_order(self) -> None:
        position = {p.name: i for i, p in enumerate(self.passes)}
        for i, p in enumerate(self.passes):
            if i and p.stage < self.passes[i - 1].stage:
                before = self.passes[i - 1]
                raise PipelineError(
                    f"{p.name} (stage {p.stage.name}) stands after {before.name} (stage {before.stage.name})",
                    remedy=f"put {p.name} before {before.name}",
                )
            for earlier in p.after:
                if position.get(earlier, -1) > i:
                    raise PipelineError(
                        f"{p.name} must come after {earlier}", remedy=f"swap {p.name} and {earlier}"
                    )

    def run(
        self, program: Program, options: RunOptions | None = None, fuel: Fuel | None = None
    ) -> list[PassReport]:
        """Run every pass over the program in place. A pass that raises leaves the program as it found it."""
        options = options or RunOptions()
        fuel = fuel or Fuel(options.fuel)
        try:
            return [_run_pass(p, program, options, fuel) for p in self.passes]
        finally:
            program.settle()


def _at_their_stages(passes: list[Pass], by_preset: list[Pass]) -> list[Pass]:
    """Passes that a preset brought stand at their stage among the others, which keep the order they were
    written in: `exact,quantize-linear` quantizes before the fusions of `exact`."""
    ours = {id(p) for p in by_preset}
    stages = [p.stage for p in passes if id(p) not in ours]
    return sorted(passes, key=lambda p: p.stage) if ours and stages == sorted(stages) else passes


def _resolve(name: str, texts: dict[str, str]) -> list[Pass]:
    preset = registry.presets().get(name)
    if preset is not None:
        if texts:
            raise OptionError(
                f"preset {name!r} takes no options", remedy="give options to its passes instead"
            )
        return [option_text.build(registry.find(n), n, t) for n, t in option_text.split_pipeline(preset)]
    return [option_text.build(registry.find(name), name, texts)]


def run_pass(p: Pass, program: Program, options: RunOptions, fuel: Fuel) -> PassReport:
    """Run one pass with snapshot, verification and timing; returns its report."""
    try:
        return _run_pass(p, program, options, fuel)
    finally:
        program.settle()


def _run_pass(p: Pass, program: Program, options: RunOptions, fuel: Fuel) -> PassReport:
    report = PassReport(p.name, p.text(), p.stage.name, p.exactness.value, p.paper)
    report.nodes_before = len(program.graph.nodes)
    if program.training and not p.trains:
        report.skipped = "gradients are wanted and this pass is for inference"
        report.nodes_after = report.nodes_before
        return report
    started = time.perf_counter()
    snapshot = Snapshot(program)
    if options.keep_graphs:
        report.graph_before = _printed(program)
    replayer = Replayer(p.name, p.exactness) if options.replay else None
    log = PassLog(report, fuel, p.slots, replayer, before_first_edit=snapshot.take)
    try:
        p.apply(program, log)  # type: ignore[attr-defined]
        _check(p, program, options, snapshot)
    except TilewrightError as error:
        snapshot.restore()
        if options.on_pass_error == "raise":
            error.add_note(f"while running pass {p.text()}")
            raise
        report.applied, report.skipped = [], f"failed and was rolled back: {error.line()}"
    except BaseException as error:
        snapshot.restore()
        error.add_note(f"while running pass {p.text()}; the program was rolled back")
        raise
    report.seconds = time.perf_counter() - started
    report.nodes_after = len(program.graph.nodes)
    if options.keep_graphs:
        report.graph_after = _printed(program)
    return report


def _printed(program: Program) -> str:
    from tilewright.compiler.graph import print_graph

    return print_graph(program.graph)


def _check(p: Pass, program: Program, options: RunOptions, snapshot: Snapshot) -> None:
    if not snapshot.taken:
        return
    verify(program, blame=p.name)
    if options.verify != "off":
        verify_shapes(program, blame=p.name)
    if options.verify == "outputs" and p.exactness is not Exactness.APPROXIMATE:
        compare_float64(snapshot.program(), program, blame=p.name)


class Snapshot:
    """The program as it was before a pass's first edit, to go back to. A pass that edits nothing costs
    nothing."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._graph: GraphRecord | None = None

    @property
    def taken(self) -> bool:
        return self._graph is not None

    def take(self) -> None:
        """Record the graph now, unless that was done already."""
        if self._graph is None:
            self._graph = GraphRecord(self._program.graph)
            self._derived = list(self._program.derived)
            self._buffers = dict(self._program.module._buffers)

    def restore(self) -> None:
        """Put the program back as it was."""
        if self._graph is not None:
            self._program.module.graph = self._graph.graph()
            self._program.derived[:] = self._derived
            self._program.module._buffers.clear()
            self._program.module._buffers.update(self._buffers)

    def program(self) -> Program:
        """The old program, beside the new one; only after `take`."""
        p = self._program
        assert self._graph is not None, "nothing was edited, so there is no old program"
        module = fx.GraphModule(p.module, self._graph.graph())
        for name, value in self._buffers.items():
            module.register_buffer(name, value, persistent=False)
        return Program(module, p.inputs, p.example_inputs, p.origin, p.training, p.facts, list(self._derived))


def compare_float64(before: Program, after: Program, *, blame: str) -> float:
    """Run both programs in float64 on the example inputs; VerifyError when they differ, else the error."""
    want = tensors_in(Float64(before).run_on(before.example_inputs))
    got = tensors_in(Float64(after).run_on(after.example_inputs))
    worst = 0.0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        error = relative_rms(g, w)
        if error > FLOAT64_TOLERANCE:
            raise VerifyError(f"{blame} changed output {i} by {error:.3g} relative RMS in float64")
        worst = max(worst, error)
    return worst


def clone_inputs(inputs: list[Any]) -> list[Any]:
    """Copies of the tensors, so that running a program does not write to its state."""
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
