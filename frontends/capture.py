"""Capture: a Dynamo graph or an exported program becomes a `Program` in normal form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext, TracingContext
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.diagnostics import CaptureError
from tilewright.compiler.functionalize import functionalize
from tilewright.compiler.log import Fuel
from tilewright.compiler.module_paths import normalise_path
from tilewright.compiler.pipeline import Pipeline, RunOptions, run_pass
from tilewright.compiler.program import InputKind, InputSpec, Program
from tilewright.compiler.report import PassReport
from tilewright.frontends.autocast_regions import drop_inert_autocast
from tilewright.frontends.vmap_regions import check_nothing_lost, expand_vmap

NORMAL_FORM = "normal-form"
_DYNAMO_KEYS = ("tensor_dict",)


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """The program of a graph that torch.compile hands to a backend.

    `example_inputs` are the real tensors (SymInts for dynamic sizes) in placeholder order. The graph is
    retraced to pre-dispatch aten on fakes of the same shape environment; the Dynamo graph itself is not
    changed.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise CaptureError(
            "there is no tracing context", remedy="call through torch.compile(backend='tilewright')"
        )
    fakes = [_fakify(context, t) for t in example_inputs]
    training = torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs
    )
    interpreter = _KnownNumbers(expand_vmap(gm, context.fake_mode, fakes))
    with context.fake_mode, torch.fx.traceback.preserve_node_meta():
        flat = make_fx(
            lambda *a: interpreter.run(*a),
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes)
    check_nothing_lost(flat)
    drop_inert_autocast(flat)
    specs = _adopt_placeholders(gm, flat, example_inputs)
    return Program(flat, specs, list(example_inputs), origin="dynamo", training=training)


_SETTLED = 3


class _KnownNumbers(fx.Interpreter):
    """Reads a number that a module holds (an eps, a scale) as that number, with a guard on it.

    Under dynamic=True Dynamo makes such numbers inputs. One that changes from call to call becomes an input
    again after a few compilations.
    """

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_method" or n.target != "item" or not isinstance(result, torch.SymFloat):
            return result
        source = getattr(n.args[0], "_dynamo_source", None)
        held = source is not None and source.guard_source.is_unspecialized_nn_module()
        compilation = CompileContext.current_compile_id()
        again = 0 if compilation is None else compilation.frame_compile_id or 0
        return float(result) if held and again < _SETTLED and result.node.has_hint() else result


def _fakify(context: TracingContext, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    known = context.tensor_to_context.get(value) if value in context.tensor_to_context else None
    source = known.tensor_source if known is not None else None
    mode = context.fake_mode
    assert mode is not None, "checked by the caller"
    return mode.from_tensor(value, symbolic_context=known, source=source, trace=False)


def _adopt_placeholders(gm: fx.GraphModule, flat: fx.GraphModule, inputs: Sequence[Any]) -> list[InputSpec]:
    """Carry over what AOTAutograd needs of a Dynamo graph, and describe each input."""
    old = [n for n in gm.graph.nodes if n.op == "placeholder"]
    new = [n for n in flat.graph.nodes if n.op == "placeholder"]
    if len(old) != len(new):
        raise CaptureError(f"retracing turned {len(old)} inputs into {len(new)}")
    specs = []
    for before, after, value in zip(old, new, inputs, strict=True):
        for key in _DYNAMO_KEYS:
            if before.meta.get(key) is not None:
                after.meta[key] = before.meta[key]
        source = getattr(before, "_dynamo_source", None)
        if source is not None:
            after._dynamo_source = source  # type: ignore[attr-defined]
        specs.append(InputSpec(after.name, _kind(before, value), _source_path(source)))
    flat.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        flat._param_name_to_source = dict(gm._param_name_to_source)  # type: ignore[assignment,arg-type]
    return specs


def _kind(placeholder: fx.Node, value: Any) -> InputKind:
    if not isinstance(value, torch.Tensor):
        return InputKind.SIZE
    static = placeholder.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    owned = static is not None or isinstance(value, torch.nn.Parameter)
    return InputKind.WEIGHT if owned else InputKind.USER


def _source_path(source: Any) -> str:
    """`L['self']._modules['l']._parameters['weight']` -> `l.weight`; the argument `L['x']` -> `x`."""
    if source is None:
        return ""
    text = re.sub(r"\._(?:parameters|buffers|modules)\[", "[", str(source.name))
    argument = re.fullmatch(r"L\[['\"](\w+)['\"]\]", text)
    return argument[1] if argument else normalise_path(text)


def from_export(exported: torch.export.ExportedProgram) -> Program:
    """The program of a `torch.export` result. Weights are the exported state's own tensors, held once."""
    from torch.export.graph_signature import InputKind as Kind

    functional = exported.run_decompositions({}) if _has_regions(exported.graph) else exported
    signature, graph = functional.graph_signature, functional.graph
    module = fx.GraphModule(functional.graph_module, graph)
    user_inputs = iter(torch.utils._pytree.tree_leaves(functional.example_inputs or ()))
    specs, values = [], []
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is Kind.USER_INPUT:
            values.append(next(user_inputs, None))
            specs.append(InputSpec(node.name, InputKind.USER, node.name))
        elif spec.kind in (Kind.PARAMETER, Kind.BUFFER, Kind.CONSTANT_TENSOR):
            values.append(_held(functional, str(spec.target)))
            specs.append(InputSpec(node.name, InputKind.WEIGHT, str(spec.target)))
        else:
            raise CaptureError(f"input {node.name} is a {spec.kind.name}, which is not supported")
    _write_back(module, signature, specs)
    return Program(module, specs, values, origin="export")


def _has_regions(graph: fx.Graph) -> bool:
    """True when a call runs a subgraph. PyTorch then brings everything into one graph, which costs as much
    as the export; writes alone are left to `normalize`, as on the Dynamo side."""
    return any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in graph.nodes)


def _held(exported: torch.export.ExportedProgram, name: str) -> Any:
    if name in exported.state_dict:
        return exported.state_dict[name]
    return exported.constants[name]


def _write_back(module: fx.GraphModule, signature: Any, specs: list[InputSpec]) -> None:
    """Turn returned mutations into one copy_ per changed input at the end, as the Dynamo side has it."""
    by_target = {spec.source: spec for spec in specs}
    by_name = {spec.name: spec for spec in specs}
    nodes = {n.name: n for n in module.graph.nodes}
    out = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    mutated = {**signature.buffers_to_mutate, **getattr(signature, "user_inputs_to_mutate", {})}
    results = list(out.args[0])
    for name, target in mutated.items():
        spec = by_target.get(target) or by_name[target]
        spec.mutated = True
        with module.graph.inserting_before(out):
            write = module.graph.call_function(torch.ops.aten.copy_.default, (nodes[spec.name], nodes[name]))
            write.meta["val"] = nodes[spec.name].meta.get("val")
    kept = [r for r in results if not (isinstance(r, fx.Node) and r.name in mutated)]
    out.args = (tuple(kept),)
    module.recompile()


def normalize(program: Program, options: RunOptions | None = None) -> list[PassReport]:
    """Bring a captured program to normal form in place; returns what each step did."""
    done = functionalize(program.module)
    for name in done.mutated:
        for spec in program.inputs:
            if spec.name == name:
                spec.mutated = True
    reports = [PassReport("functionalize", "functionalize", "NORMALIZE", "bitwise")]
    reports[0].notes = [f"{done.rewritten} writes became values, {len(done.mutated)} inputs are state"]
    reports[0].notes += [f"{node.name} stays in place: {why}" for node, why in done.refused]
    fuel = Fuel(None)
    options = options or RunOptions()
    reports += [run_pass(p, program, options, fuel) for p in Pipeline.parse(NORMAL_FORM).passes]
    program.module.recompile()
    return reports
