"""Lowering: each semantic op goes to a kernel that fits, or back to the aten ops of its definition."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.graph import dead_code
from tilewright.compiler.ops import SemanticOp, semantic_op
from tilewright.compiler.program import Program
from tilewright.compiler.regions import inline
from tilewright.compiler.report import Report
from tilewright.compiler.rewrite import signature_of, trace, traced_outputs
from tilewright.compiler.schema import arguments
from tilewright.kernels.common.family import KernelFamily
from tilewright.kernels.load import compile_side_by_side
from tilewright.kernels.table import KernelChoice, host_target, select_for_node, too_small
from tilewright.runtime.contracts import KernelKey, Refusal, Target


def lower(
    program: Program,
    report: Report,
    *,
    target: Target | None = None,
    rest: str = "inductor",
    use_kernels: bool = True,
) -> None:
    """Replace every semantic op of the program in place and record each decision in `report.kernels`.

    `rest` names what will run everything that has no kernel of ours.
    """
    target = target or host_target()
    report.target = str(target)
    traces: dict[Any, fx.GraphModule] = {}
    chosen = _chosen(program, target, rest) if use_kernels else _unchosen(program)
    gates = _measures(program, target, rest) if use_kernels else {}
    wanted = [*(c for *_, c in chosen), *gates.values()]
    compile_side_by_side((c.family, c.key) for c in wanted if not isinstance(c, Refusal))
    for node, measure in gates.items():
        node.meta[MEASURE] = measure.op
        shown = {"kernel": measure.name, "why": "", "source": str(measure.source_path)}
        report.kernels.append({"node": node.name, "op": "measured_copy", **shown})
    for node, op, choice in chosen:
        row = {"node": node.name, "op": op.name, "kernel": "", "why": "", "source": ""}
        if isinstance(choice, Refusal) and op.opaque:
            row.update(kernel="definition", why=choice.reason)
        elif isinstance(choice, Refusal):
            inline_definition(program, op, node, traces)
            row.update(kernel=rest, why=choice.reason)
        else:
            _call_kernel(program, node, choice)
            row.update(kernel=choice.name, source=str(choice.source_path))
        report.kernels.append(row)
    dead_code(program.graph)
    program.graph.lint()
    program.module.recompile()


MEASURE = "tw_measure"
"""In a gate's meta: the kernel of `measured_copy` its policy measures with, in place of the definition."""
_MEASURED = {ops.step_reuse_begin: 1, ops.step_reuse_end: 2}
"""The gates that hand something to a policy, and the place of it."""


def _measures(program: Program, target: Target, rest: str) -> dict[fx.Node, KernelChoice]:
    found: dict[fx.Node, KernelChoice] = {}
    if rest != "inductor" or program.training:  # gates stand between pieces
        return found
    for node in program.graph.nodes:
        if node.target in _MEASURED:
            x = node.args[_MEASURED[node.target]].meta["val"]
            choice = select_for_node("measured_copy", [x, x, x], target, training=False)
            if isinstance(choice, KernelChoice):
                found[node] = choice
    return found


def wanted_kernels(
    program: Program, target: Target, rest: str, but: Set[fx.Node]
) -> list[tuple[KernelFamily, KernelKey]]:
    """The kernels that `lower` will build for all nodes but these."""
    chosen = [c for *_, c in _chosen(program, target, rest, but)]
    wanted = [*chosen, *_measures(program, target, rest).values()]
    return [(c.family, c.key) for c in wanted if not isinstance(c, Refusal)]


_Chosen = list[tuple[fx.Node, SemanticOp, KernelChoice | Refusal]]


def _semantic(program: Program) -> list[tuple[fx.Node, SemanticOp]]:
    found = [(node, semantic_op(node.target)) for node in program.graph.nodes if node.op == "call_function"]
    return [(node, op) for node, op in found if op is not None]


def _chosen(program: Program, target: Target, rest: str, but: Set[fx.Node] = frozenset()) -> _Chosen:
    return [
        (node, op, _choose(op, node, target, program.training, rest))
        for node, op in _semantic(program)
        if node not in but
    ]


def _unchosen(program: Program) -> _Chosen:
    return [(node, op, Refusal("generated kernels are off")) for node, op in _semantic(program)]


def _choose(
    op: SemanticOp, node: fx.Node, target: Target, training: bool, rest: str
) -> KernelChoice | Refusal:
    metas = list(fx.node.map_arg(tuple(arguments(node).values()), lambda n: n.meta["val"]))
    if rest == "inductor" and not training:
        small = too_small(op.name, metas, target)
        if small is not None:
            return small
    return select_for_node(op.name, metas, target, training=training)


def _call_kernel(program: Program, node: fx.Node, choice: KernelChoice) -> None:
    args, kwargs = choice.rewrite_args(tuple(arguments(node).values()))
    with program.graph.inserting_before(node):
        new = program.graph.call_function(choice.op, args, kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)


def inline_definition(
    program: Program, op: SemanticOp, node: fx.Node, traces: dict[Any, fx.GraphModule]
) -> None:
    """Put the ops of a semantic op's definition in the place of one call of it."""
    values = tuple(arguments(node).values())
    inputs: list[fx.Node] = []
    fx.node.map_arg(values, inputs.append)
    key = (op.name, signature_of(values))
    if key not in traces:
        traces[key] = _trace_definition(op.definition, values, inputs)
    module = traces[key]
    new = inline(program, module, inputs, before=node, like=node, origin=f"lower:{op.name}")
    results = [new[r] for r in traced_outputs(module)]
    if isinstance(node.meta.get("val"), (list, tuple)):
        for user in list(node.users):
            index = user.args[1]
            assert isinstance(index, int), "a multi-output op is read by getitem only"
            user.replace_all_uses_with(results[index])
            program.graph.erase_node(user)
    else:
        node.replace_all_uses_with(results[0])
    program.graph.erase_node(node)


def _trace_definition(definition: Callable[..., Any], values: Any, inputs: list[fx.Node]) -> fx.GraphModule:
    fakes = [n.meta["val"] for n in inputs]

    def run(*given: Any) -> Any:
        feed = iter(given)
        out = definition(*fx.node.map_arg(values, lambda _: next(feed)))
        return tuple(out) if isinstance(out, (list, tuple)) else (out,)

    return trace(run, fakes)


def is_lowered(module: fx.GraphModule) -> bool:
    """True when no semantic op is left but those whose definition runs as a call."""
    found = [semantic_op(n.target) for n in module.graph.nodes if n.op == "call_function"]
    return all(op is None or op.opaque for op in found)


def where_of(report: Report) -> Callable[[fx.Node], str]:
    """What runs a node of the program before lowering, from the recorded decisions."""
    chosen = {row["node"]: row["kernel"] for row in report.kernels}
    rest = next((row["kernel"] for row in report.kernels if row["why"]), "inductor")

    def where(node: fx.Node) -> str:
        return chosen.get(node.name, rest) if isinstance(node.target, torch._ops.OpOverload) else ""

    return where
