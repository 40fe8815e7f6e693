"""From a program to something callable: pipeline, lowering, hand-over to Inductor; the report on the way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.cost import node_costs, size_values, totals
from tilewright.compiler.devices import measure_host
from tilewright.compiler.diagnostics import FactError, OptionError, VerifyError, nearest
from tilewright.compiler.facts import apply_user_facts, derive_facts
from tilewright.compiler.ops import semantic_op
from tilewright.compiler.pipeline import Pipeline, RunOptions
from tilewright.compiler.program import DerivedCheck, Program
from tilewright.compiler.report import Report
from tilewright.frontends import vector_probe
from tilewright.frontends.capture import normalize
from tilewright.frontends.chains import find_chains, raise_chains
from tilewright.frontends.exits import FILL, split_exits
from tilewright.frontends.instances import compile_pieces
from tilewright.frontends.late_wait import waiting_at_the_end
from tilewright.frontends.lowering import lower, wanted_kernels, where_of
from tilewright.kernels.load import begin_compiling, missing_sources
from tilewright.kernels.table import host_target

DEFAULT_PIPELINE = "exact"
INDUCTOR_PATCHES = {"disabled_passes": "pass_pattern_0", "size_asserts": False}
"""Inductor's joint-graph pattern group 0 holds its attention patterns, which ignore the softmax axis, the
layout of K and the scale (pytorch#196468, #195320, #174049). Attention is recognised before it gets there.
Layouts are asserted once, at compile time, on fake tensors: asserting each of 25 per block on every call
costs 2 ms of a 35 ms decode step."""

REPORTS: deque[Report] = deque(maxlen=64)
"""The reports of this process's latest compilations, newest last."""


@dataclass(frozen=True)
class CompileOptions:
    """Options of the torch.compile backend and of `tilewright.optimize`."""

    pipeline: Any = DEFAULT_PIPELINE
    """Pipeline text, a list of pass values and texts, or a Pipeline."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    verify: str = "off"
    replay: bool = True
    fuel: int | None = None
    on_pass_error: str = "raise"
    lower: str = "inductor"
    """What runs the parts that have no kernel of ours: `inductor` or `eager`."""
    kernels: bool = True
    """Use generated kernels; off, every semantic op runs as its definition."""
    costs: bool = False
    """Put the cost of every node into the report."""
    keep_graphs: bool = False
    require: Mapping[str, int] = field(default_factory=dict)
    """Semantic ops that must be found, by name: {"attention": 30}; fewer is an error."""

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> CompileOptions:
        """From a dict; OptionError names an unknown key or an illegal value."""
        given = dict(given or {})
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise OptionError(f"unknown option {key!r}", remedy=nearest(str(key), known))
        options = cls(**given)
        if options.lower not in ("inductor", "eager"):
            raise OptionError(f"lower = {options.lower!r}: expected one of inductor, eager")
        for name in ("replay", "kernels", "costs", "keep_graphs"):
            if not isinstance(getattr(options, name), bool):
                raise OptionError(f"{name} = {getattr(options, name)!r}: expected true or false")
        for name in ("facts", "require"):
            if not isinstance(getattr(options, name), Mapping):
                raise OptionError(
                    f"{name} = {getattr(options, name)!r}: expected a mapping of names to values"
                )
        options.run_options()
        Pipeline.parse(options.pipeline)
        return options

    def run_options(self) -> RunOptions:
        """The part that concerns running passes."""
        return RunOptions(
            verify=self.verify,  # type: ignore[arg-type]
            replay=self.replay,
            fuel=self.fuel,
            on_pass_error=self.on_pass_error,  # type: ignore[arg-type]
            keep_graphs=self.keep_graphs,
        )


def optimize_program(program: Program, options: CompileOptions, model: str = "") -> Report:
    """Normal form, facts and pipeline, in place; returns the report so far."""
    pipeline = Pipeline.parse(options.pipeline)
    report = Report(model=model, pipeline=pipeline.text(), origin=program.origin, training=program.training)
    report.versions = {"torch": torch.__version__}
    report.graph_breaks = list(program.graph_breaks)
    run = options.run_options()
    started = time.perf_counter()
    report.passes = normalize(program, run)
    report.seconds["normalize"] = time.perf_counter() - started
    _check_required(program, options.require)
    apply_user_facts(program, dict(options.facts))
    started = time.perf_counter()
    derive_facts(program)
    report.seconds["facts"] = time.perf_counter() - started
    report.facts = [{"name": f.name, "value": repr(f.value), "origin": f.origin} for f in program.facts]
    if options.costs:
        report.device, report.sizes = measure_host().name, size_values(program.module)
        report.costs_before = node_costs(program, measure_host())
        report.totals_before = totals(report.costs_before)
    started = time.perf_counter()
    report.passes += pipeline.run(program, run)
    report.seconds["passes"] = time.perf_counter() - started
    return report


def _check_required(program: Program, require: Mapping[str, int]) -> None:
    counts = count_semantic_ops(program)
    for name, wanted in require.items():
        if counts.get(name, 0) < wanted:
            raise FactError(
                f"{counts.get(name, 0)} {name} found, {wanted} required",
                remedy=f"`tilewright why match-{name.replace('_', '-')} NODE` says what was in the way",
            )


def count_semantic_ops(program: Program) -> dict[str, int]:
    """How many nodes of each semantic op the program holds."""
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        op = semantic_op(node.target) if node.op == "call_function" else None
        if op is not None:
            counts[op.name] = counts.get(op.name, 0) + 1
    return counts


def lower_program(program: Program, options: CompileOptions, report: Report, *, run: bool = True) -> None:
    """Lower the program in place and record what runs where, and at what cost. run: it is compiled next."""
    before = {n.name: n for n in program.graph.nodes} if options.costs else {}
    costs = node_costs(program, measure_host()) if options.costs else []
    started = time.perf_counter()
    inductor = options.lower == "inductor"
    for fill in split_exits(program) if inductor else []:
        _lower(fill, options, Report())
    _lower(program, options, report, _load_inductor if run and inductor else None)
    report.seconds["lower"] = time.perf_counter() - started
    if options.costs:
        where = where_of(report)
        for cost in costs:
            cost.where = where(before[cost.node])
        report.costs_after, report.totals_after = costs, totals(costs)
    REPORTS.append(report)


def _lower(
    program: Program, options: CompileOptions, report: Report, meanwhile: Callable[[], None] | None = None
) -> None:
    """Lower with kernels and chains; `meanwhile` runs here while the compiler works on them."""
    if options.kernels:
        target = host_target()
        chains = find_chains(program, target, report)
        wanted = wanted_kernels(program, target, options.lower, but=chains.nodes())
        begin_compiling([*chains.sources(), *missing_sources(wanted)], target)
        if meanwhile is not None:
            meanwhile()
        raise_chains(program, chains, report)
    lower(program, report, rest=options.lower, use_kernels=options.kernels)


def _load_inductor() -> None:
    """What Inductor does once per process."""
    from torch._inductor import codecache, compile_fx, config

    assert compile_fx
    if not config.force_disable_caches:
        codecache.CacheBase.get_system()  # its caches' keys hold a digest of all files of Triton


def compile_lowered(program: Program, options: CompileOptions, report: Report) -> Callable[..., Any]:
    """Compile a lowered program; the result takes the program's inputs in order."""
    check = DerivedCheck(program)
    started = time.perf_counter()
    compiled = _compile_rest(program, options, report)
    report.seconds[options.lower] = time.perf_counter() - started
    _say_that_nothing_is_left_out(program, report)
    if check.empty:
        return compiled

    def checked(*args: Any) -> Any:
        check(args)
        return compiled(*args)

    return checked


def _say_that_nothing_is_left_out(program: Program, report: Report) -> None:
    """Blocks are left out between pieces: without pieces a gate only computes, and its pass must say so."""
    begins = (ops.step_reuse_begin, ops.early_exit_begin)
    found = [n for n in program.graph.nodes if n.target in begins]
    exits = [n for n in found if n.target is ops.early_exit_begin and FILL not in n.meta]
    gates = {n.name for n in (exits if report.pieces else found)}
    for done in report.passes:
        if any(gates.intersection(a.inserted) for a in done.applied):
            done.notes.append("compiled as a whole: results are right, but no block is ever left out")


def _compile_rest(program: Program, options: CompileOptions, report: Report) -> Callable[..., Any]:
    if options.lower == "inductor":
        with waiting_at_the_end():
            chain = compile_pieces(program, lambda gm, fakes: compile_graph(gm, fakes, options))
        if chain is not None:
            report.pieces = chain[1]
            return chain[0]
        stuck = next((n for n in program.graph.nodes if FILL in n.meta), None)
        if stuck is not None:
            raise VerifyError(f"{stuck.name}: the program can no longer be cut at its early exits")
        _name_buffers(program)
    return compile_graph(program.module, program.example_inputs, options)


def compile_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions
) -> Callable[..., Any]:
    """Hand a flat graph to what runs the rest."""
    if options.lower == "eager":
        return module
    from torch._inductor.compile_fx import compile_fx

    vector_probe.finish()
    with vector_probe.asked_in_order():
        compiled: Any = compile_fx(module, example_inputs, config_patches=dict(INDUCTOR_PATCHES))
    return cast(Callable[..., Any], compiled)


def _name_buffers(program: Program) -> None:
    """AOTAutograd wants a source for every buffer of a Dynamo graph; ours are constants of the program."""
    from torch._dynamo.source import ConstantSource

    module = program.module
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    for name in [name for name in module._buffers if name not in used]:
        del module._buffers[name]
    sources = dict(getattr(module, "_param_name_to_source", None) or {})
    sources.update({name: ConstantSource(name) for name in module._buffers if name not in sources})
    module._param_name_to_source = sources  # type: ignore[assignment]
