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

from tilewright.compiler.graph import fake_mode_of, output_node
from tilewright.compiler.program import Program
from tilewright.compiler.repeats import Piece, cut, layout_of, sink_writes
from tilewright.frontends.chains import is_chain

Compiled = Callable[..., Any]
CompileOne = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


@dataclass(frozen=True)
class _Step:
    """One call: values[results] = run(*values[arguments]), then the values in `dead` are dropped."""

    run: Compiled
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    dead: tuple[int, ...]


def compile_pieces(program: Program, compile_one: CompileOne) -> tuple[Compiled, list[int]] | None:
    """The program as a chain of compiled pieces, and how often each piece of code is called.

    None when nothing repeats, or the program is captured for training: it is then compiled whole.
    """
    if program.training or fake_mode_of(*program.graph.nodes) is None:
        return None
    sink_writes(program.graph)
    pieces = cut(program.graph, is_chain)
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


def _direct(piece: Piece) -> Compiled:
    """A call that stands alone, without anything around it; results that nobody reads are left out."""
    call = piece.nodes[0]
    op: Any = call.target
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
        for step in steps:
            results = step.run(*[values[i] for i in step.arguments])
            for i, result in zip(step.results, results, strict=True):
                values[i] = result
            for i in step.dead:
                values[i] = None
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
        )
        for k, (piece, run) in enumerate(zip(pieces, runs, strict=True))
    ]
