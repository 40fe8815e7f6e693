"""Decode steps: stretches of semantic ops with one row of activations become one generated function each."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from tilewright.compiler.graph import copy_source
from tilewright.compiler.ops import semantic_op
from tilewright.compiler.program import Program
from tilewright.compiler.repeats import Piece, cut, sink_writes
from tilewright.compiler.report import Report
from tilewright.frontends.exits import is_gate
from tilewright.kernels.chain.build import build, missing_sources, refusal
from tilewright.kernels.chain.plan import Plan, plan
from tilewright.kernels.common.cpp import NAMESPACE
from tilewright.runtime.contracts import Refusal, Target

_PREFIX = f"{NAMESPACE}::chain_"


def is_chain(node: fx.Node) -> bool:
    """True for a call of a generated chain, which needs nothing around it to run."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.name().startswith(_PREFIX)


@dataclass(frozen=True)
class Chains:
    """Stretches of a program that chains can run."""

    pieces: list[Piece]
    plans: dict[int, Plan]
    """By the number of the piece that others are instances of."""
    target: Target

    def nodes(self) -> set[fx.Node]:
        """What chains will run."""
        return {n for piece in self.pieces if piece.instance_of in self.plans for n in piece.nodes}

    def sources(self) -> list[str]:
        """The C++ that this process has not built."""
        return missing_sources(self.plans.values(), self.target)


def find_chains(program: Program, target: Target, report: Report) -> Chains:
    """The stretches that a chain can run: repeated ones and what lies between them.

    Only those with a linear layer are worth a compilation. `report.chains` says why the others have none.
    """
    if program.training:
        return Chains([], {}, target)
    refused = refusal(target)
    if refused is not None:
        report.chains.append(refused.reason)
        return Chains([], {}, target)
    sink_writes(program.graph)
    pieces = cut(program.graph, is_gate)
    plans: dict[int, Plan] = {}
    for number, count in sorted(Counter(p.instance_of for p in pieces).items()):
        first = pieces[number]
        if first.alone:
            continue
        made = plan(first.nodes, first.inputs, first.outputs)
        if isinstance(made, Refusal):
            stretch = f"{count} x {len(first.nodes)} nodes from {first.nodes[0].name}"
            report.chains.append(f"{stretch}: {made.reason}")
        elif any(stage.kind.endswith("linear") for stage in made.stages):
            plans[number] = made
    return Chains(pieces, plans, target)


def raise_chains(program: Program, found: Chains, report: Report) -> None:
    """Replace each stretch that a chain runs, in place, and record what it runs in `report.kernels`."""
    built = {number: build(made, found.target) for number, made in found.plans.items()}
    moved: dict[fx.Node, fx.Node] = {}
    for piece in found.pieces:
        if piece.instance_of in built:
            op, path = built[piece.instance_of]
            report.kernels += _rows(piece, op, str(path))
            _replace(program, piece, op, moved)
    program.graph.lint()
    program.module.recompile()


def _rows(piece: Piece, op: torch._ops.OpOverload, path: str) -> list[dict[str, str]]:
    name = op.name().removeprefix(f"{NAMESPACE}::")
    found = [(n.name, semantic_op(n.target)) for n in piece.nodes]
    return [
        {"node": node, "op": semantic.name, "kernel": name, "why": "", "source": path}
        for node, semantic in found
        if semantic is not None
    ]


def _replace(
    program: Program, piece: Piece, op: torch._ops.OpOverload, moved: dict[fx.Node, fx.Node]
) -> None:
    """One call instead of a piece; `moved` says what became of the results of pieces replaced before."""
    graph = program.graph
    with graph.inserting_before(piece.nodes[0]):
        call = graph.call_function(op, tuple(moved.get(n, n) for n in piece.inputs))
        results = [call][: len(piece.outputs)]
        if len(piece.outputs) > 1:
            results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(piece.outputs))]
    copy_source(piece.nodes[0], call)
    call.meta["val"] = tuple(_flat(n.meta["val"]) for n in piece.outputs)
    for old, new in zip(piece.outputs, results, strict=True):
        copy_source(old, new)
        new.meta["val"] = _flat(old.meta["val"])
        old.replace_all_uses_with(new)
        moved[old] = new
    for node in reversed(piece.nodes):
        graph.erase_node(node)


def _flat(value: torch.Tensor) -> torch.Tensor:
    """A chain returns contiguous tensors."""
    return value if value.is_contiguous() else value.contiguous()
