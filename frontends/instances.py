"""Compile a lowered program piece by piece: every repeated stretch once, called with each block's weights.

The counterpart for any captured graph of what diffusers' regional compilation does by module class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch.utils._pytree import tree_flatten, tree_unflatten

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import VerifyError
from tilewright.compiler.graph import fake_mode_of, output_node
from tilewright.compiler.program import Program
from tilewright.compiler.repeats import Piece, cut, layout_of, sink_writes
from tilewright.frontends.chains import is_chain
from tilewright.runtime.contracts import REUSE

Compiled = Callable[..., Any]
CompileOne = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


@dataclass(frozen=True)
class _Step:
    """One call: values[results] = run(*values[arguments]), then the values in `dead` are dropped."""

    run: Compiled
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    dead: tuple[int, ...]
    gate: int | None = None
    """Behind this call the steps up to `resume` are left out where the gate's residual is reused."""
    resume: int = 0


def compile_pieces(program: Program, compile_one: CompileOne) -> tuple[Compiled, list[int]] | None:
    """The program as a chain of compiled pieces, and how often each piece of code is called.

    None when nothing repeats, or the program is captured for training: it is then compiled whole.
    """
    if program.training or fake_mode_of(*program.graph.nodes) is None:
        return None
    sink_writes(program.graph)
    pieces = cut(program.graph, _stands_alone)
    if not pieces:
        return None
    mode = fake_mode_of(*program.graph.nodes)
    code: dict[Any, Compiled] = {}
    values: dict[fx.Node, Any] = {n: n.meta["val"] for n in program.graph.nodes if n.op in _GIVEN}
    runs, calls = [], dict[Any, int]()
    with tracing(TracingContext(mode)):
        for piece in pieces:
            if piece.alone:
                values.update((n, n.meta["val"]) for n in piece.outputs)
                runs.append(_direct(piece))
                calls[piece.nodes[0].target] = calls.get(piece.nodes[0].target, 0) + 1
                continue
            fakes = [values[n] for n in piece.inputs]
            module = _module_of(program, pieces[piece.instance_of])
            with mode, torch.no_grad():
                values.update(zip(piece.outputs, fx.Interpreter(module).run(*fakes), strict=True))
            key = piece.instance_of, tuple(map(layout_of, fakes))
            if key not in code:
                code[key] = compile_one(module, fakes)
            calls[key] = calls.get(key, 0) + 1
            runs.append(code[key])
    return _chain(program, pieces, runs), list(calls.values())


def _stands_alone(node: fx.Node) -> bool:
    return is_chain(node) or node.target in (ops.step_reuse_begin, ops.step_reuse_end)


def _is_reused(gate: int) -> bool:
    access = REUSE.get()
    return access is not None and access.reuses(gate)


def _direct(piece: Piece) -> Compiled:
    """A call that stands alone, without anything around it; results that nobody reads are left out."""
    call = piece.nodes[0]
    op: Any = call.target
    constants = tuple(a for a in call.args if not isinstance(a, fx.Node))
    if constants:  # gates: their number comes last
        return lambda *given: (op(*given, *constants),)
    if piece.outputs == (call,):
        return lambda *given: (op(*given),)
    read = [cast(int, n.args[1]) for n in piece.outputs]

    def run(*given: Any) -> list[Any]:
        results = op(*given)
        return [results[i] for i in read]

    return run


_GIVEN = ("placeholder", "get_attr")


def _module_of(program: Program, piece: Piece) -> fx.GraphModule:
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(piece.inputs):
        new[node] = graph.placeholder(f"given_{i}")
        new[node].meta["val"] = node.meta["val"]
    for node in piece.nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[n] for n in piece.outputs))
    return fx.GraphModule({}, graph)


def _chain(program: Program, pieces: Sequence[Piece], runs: Sequence[Compiled]) -> Compiled:
    graph, module = program.graph, program.module
    slots: dict[fx.Node, int] = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    held = [(slots.setdefault(n, len(slots)), str(n.target)) for n in graph.nodes if n.op == "get_attr"]
    for piece in pieces:
        for node in piece.outputs:
            slots[node] = len(slots)
    leaves, structure = tree_flatten(output_node(graph).args[0])
    steps = _steps(graph, pieces, runs, slots)
    buffers, size = module._buffers, len(slots)

    def run(*args: Any) -> Any:
        values: list[Any] = [*args, *[None] * (size - len(args))]
        for slot, name in held:
            values[slot] = buffers[name]
        at = 0
        while at < len(steps):
            step = steps[at]
            results = step.run(*[values[i] for i in step.arguments])
            for i, result in zip(step.results, results, strict=True):
                values[i] = result
            for i in step.dead:
                values[i] = None
            at += 1
            if step.gate is not None and _is_reused(step.gate):
                at = step.resume
                for i in steps[at].arguments:  # exit and measured are not read: any tensor will do
                    values[i] = values[step.results[0]]
        returned = [values[slots[v]] if isinstance(v, fx.Node) else v for v in leaves]
        return tree_unflatten(returned, structure)

    return run


def _steps(
    graph: fx.Graph, pieces: Sequence[Piece], runs: Sequence[Compiled], slots: dict[fx.Node, int]
) -> list[_Step]:
    last: dict[fx.Node, int] = {}
    for k, piece in enumerate(pieces):
        for node in (*piece.inputs, *piece.outputs):
            last[node] = k
    kept = set(output_node(graph).all_input_nodes)
    dead: dict[int, list[int]] = {}
    for node, k in last.items():
        if node not in kept and node.op == "call_function":
            dead.setdefault(k, []).append(slots[node])
    return [
        _Step(
            run,
            tuple(slots[n] for n in piece.inputs),
            tuple(slots[n] for n in piece.outputs),
            tuple(dead.get(k, ())),
            *_gate(pieces, k),
        )
        for k, (piece, run) in enumerate(zip(pieces, runs, strict=True))
    ]


def _gate(pieces: Sequence[Piece], at: int) -> tuple[int | None, int]:
    """(gate, the piece of its end) where a piece is the begin of one.

    VerifyError when something between them is read behind: it would be missing where they are left out.
    """
    node = pieces[at].nodes[0]
    if node.target is not ops.step_reuse_begin:
        return None, 0
    gate = cast(int, node.args[2])
    ends = (ops.step_reuse_end, gate)
    end = next(k for k, p in enumerate(pieces) if (p.nodes[0].target, p.nodes[0].args[-1]) == ends)
    inner = {n for piece in pieces[at + 1 : end] for n in piece.outputs}
    for piece in pieces[end + 1 :]:
        for n in piece.inputs:
            if n in inner:
                raise VerifyError(f"{n.name} is computed inside reuse gate {gate} and read behind it")
    return gate, end
