"""Compile a lowered program piece by piece: every repeated stretch once, called with each block's weights.

The counterpart for any captured graph of what diffusers' regional compilation does by module class.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch.utils._pytree import tree_flatten, tree_unflatten

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import VerifyError
from tilewright.compiler.first_instance import gather_first_instances
from tilewright.compiler.graph import fake_mode_of, output_node
from tilewright.compiler.ops import early_exit, step_reuse
from tilewright.compiler.program import Program
from tilewright.compiler.repeats import Piece, cut, layout_of, sink_writes
from tilewright.frontends.chains import is_chain
from tilewright.frontends.exits import FILL, Fill, is_gate
from tilewright.frontends.lowering import MEASURE
from tilewright.runtime.contracts import REUSE

Compiled = Callable[..., Any]
CompileOne = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


@dataclass(frozen=True)
class _Gate:
    """What stands at the begin of a stretch that may be left out."""

    resume: int
    """The step of its end."""
    number: int
    """Of a gate whose residual may be reused."""
    active: int = -1
    """The value, of an early exit, that says which tokens go on; -1 for reuse."""
    fill: Compiled | None = None
    """What runs instead of the stretch: its writes of state."""
    given: tuple[int, ...] = ()
    """Values that `fill` takes."""
    later: tuple[int, ...] = ()
    """Values from the stretch that are read behind it: without tokens that go on, they are its entry."""

    def closed(self, values: Sequence[Any]) -> bool:
        """Whether the stretch is left out in this call."""
        if self.active >= 0:
            return not values[self.active].any()
        access = REUSE.get()
        return access is not None and access.reuses(self.number)


@dataclass(frozen=True, slots=True)
class _Step:
    """One call: values[results] = run(*arguments(values)), then the values in `dead` are dropped."""

    run: Compiled
    arguments: Callable[[Sequence[Any]], Sequence[Any]]
    results: tuple[int, ...]
    dead: tuple[int, ...]
    bare: bool
    """Its one result comes without a list around it."""
    gate: _Gate | None = None
    """Behind this call the steps up to `gate.resume` may be left out."""


def compile_pieces(program: Program, compile_one: CompileOne) -> tuple[Compiled, list[int]] | None:
    """The program as a chain of compiled pieces, and how often each piece of code is called.

    None when nothing repeats, or the program is captured for training: it is then compiled whole.
    """
    if program.training or fake_mode_of(*program.graph.nodes) is None:
        return None
    sink_writes(program.graph)
    gather_first_instances(program.graph, _stands_alone)
    pieces = cut(program.graph, _stands_alone)
    if not pieces:
        return None
    mode = fake_mode_of(*program.graph.nodes)
    code: dict[Any, Compiled] = {}
    fills = {n: _compile_fill(n.meta[FILL], compile_one) for n in program.graph.nodes if FILL in n.meta}
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
    return _chain(program, pieces, runs, fills), list(calls.values())


def _compile_fill(fill: Fill, compile_one: CompileOne) -> Compiled:
    chain = compile_pieces(fill.program, compile_one)
    if chain is not None:
        return chain[0]
    module = fill.program.module
    with tracing(TracingContext(fake_mode_of(*module.graph.nodes))):
        return compile_one(module, fill.program.example_inputs)


def _stands_alone(node: fx.Node) -> bool:
    return is_chain(node) or is_gate(node)


def _is_bare(piece: Piece) -> bool:
    return piece.alone and piece.outputs == (piece.nodes[0],)


def _direct(piece: Piece) -> Compiled:
    """A call that stands alone, without anything around it; results that nobody reads are left out."""
    call = piece.nodes[0]
    op: Any = call.target
    if call.target is ops.early_exit_begin:
        gate, layers = (cast(int, a) for a in call.args[3:])
        if _may_alias(call):
            return lambda entry, active, *_: early_exit.enter(entry, active, gate, layers)
        return lambda entry, active, *held: op(entry, active, list(held), gate, layers)
    constants = tuple(a for a in call.args if not isinstance(a, fx.Node))
    if call.target in _ITSELF:
        op = _ITSELF[call.target] if _may_alias(call) else _copied(_ITSELF[call.target])
        if MEASURE in call.meta:
            constants += (call.meta[MEASURE],)
    if constants:  # gates: their numbers come last
        return lambda *given: op(*given, *constants)
    if _is_bare(piece):
        return cast(Compiled, op)
    read = [cast(int, n.args[1]) for n in piece.outputs]

    def run(*given: Any) -> list[Any]:
        results = op(*given)
        return [results[i] for i in read]

    return run


_ITSELF: dict[Any, Compiled] = {
    ops.step_reuse_begin: step_reuse.enter,
    ops.step_reuse_end: step_reuse.leave,
    ops.step_reuse_end_beside: step_reuse.leave_beside,
}
"""Ops of gates without the dispatcher and the copy that an op's result has to be."""


def _copied(gate: Compiled) -> Compiled:
    def run(passed: Any, *rest: Any) -> Any:
        found = gate(passed, *rest)
        return found.clone() if found is passed else found

    return run


def _may_alias(gate: fx.Node) -> bool:
    """Whether what passes a gate may be its input itself: nobody outside of the program holds either."""
    passed = cast(fx.Node, gate.args[0])
    return passed.op == "call_function" and not any(n.op == "output" for x in (gate, passed) for n in x.users)


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


def _chain(
    program: Program, pieces: Sequence[Piece], runs: Sequence[Compiled], fills: dict[fx.Node, Compiled]
) -> Compiled:
    graph, module = program.graph, program.module
    slots: dict[fx.Node, int] = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    given = len(slots)
    held = {n: str(n.target) for n in graph.nodes if n.op == "get_attr"}
    slots.update((n, given + i) for i, n in enumerate(held))
    for piece in pieces:
        for node in piece.outputs:
            slots[node] = len(slots)
    leaves, structure = tree_flatten(output_node(graph).args[0])
    steps = _steps(graph, pieces, runs, fills, slots)
    buffers, weights = module._buffers, _several(list(held.values()))
    rest, count = [None] * (len(slots) - given - len(held)), len(steps)

    def run(*args: Any) -> Any:
        values: list[Any] = [*args, *weights(buffers), *rest]
        at = 0
        while at < count:
            step = steps[at]
            results = step.run(*step.arguments(values))
            if step.bare:
                values[step.results[0]] = results
            else:
                for i, result in zip(step.results, results, strict=True):
                    values[i] = result
            at += 1
            gate = step.gate
            if gate is not None and gate.closed(values):
                at = gate.resume
                if gate.fill is not None:
                    gate.fill(*[values[i] for i in gate.given])
                for i in gate.later:  # the end does not read what the stretch gives it: any tensor will do
                    values[i] = values[step.results[0]]
            for i in step.dead:
                values[i] = None
        returned = [values[slots[v]] if isinstance(v, fx.Node) else v for v in leaves]
        return tree_unflatten(returned, structure)

    return run


def _several(keys: Sequence[Any]) -> Callable[[Any], Sequence[Any]]:
    """The items of a container at these keys, without a loop in Python."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    return lambda items: [items[k] for k in keys]


def _steps(
    graph: fx.Graph,
    pieces: Sequence[Piece],
    runs: Sequence[Compiled],
    fills: dict[fx.Node, Compiled],
    slots: dict[fx.Node, int],
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
            _several([slots[n] for n in piece.inputs]),
            tuple(slots[n] for n in piece.outputs),
            tuple(dead.get(k, ())),
            _is_bare(piece),
            _gate(pieces, k, fills, slots),
        )
        for k, (piece, run) in enumerate(zip(pieces, runs, strict=True))
    ]


_ENDS = {
    ops.step_reuse_begin: {ops.step_reuse_end: -1, ops.step_reuse_end_beside: -2},
    ops.early_exit_begin: {ops.early_exit_end: -1},
}
"""The ends of a stretch, several in a row where streams are coupled, and where each holds its number."""


def _is_end(node: fx.Node, begin: Any, number: int) -> bool:
    places = _ENDS[begin]
    return node.target in places and bool(node.args[places[node.target]] == number)


def _gate(
    pieces: Sequence[Piece], at: int, fills: dict[fx.Node, Compiled], slots: dict[fx.Node, int]
) -> _Gate | None:
    """The gate of a piece that is the begin of one.

    VerifyError when something between begin and end of a reuse gate is read behind: it would be missing where
    they are left out.
    """
    node = pieces[at].nodes[0]
    if node.target not in _ENDS:
        return None
    exits = node.target is ops.early_exit_begin
    if exits and node not in fills:
        return None
    number = cast(int, node.args[3 if exits else 2])
    ends = [k for k, piece in enumerate(pieces) if _is_end(piece.nodes[0], node.target, number)]
    end = ends[0]
    inner = {n for piece in pieces[at + 1 : end] for n in piece.outputs}
    later = dict.fromkeys(n for piece in pieces[ends[-1] + 1 :] for n in piece.inputs if n in inner)
    if later and not exits:
        raise VerifyError(f"{next(iter(later))} is computed inside reuse gate {number} and read behind it")
    read = [n for k in ends for n in pieces[k].inputs]
    unread = [slots[n] for n in (*later, *read) if n in inner]
    if not exits:
        return _Gate(end, number, later=tuple(unread))
    _, *held = [n for n in pieces[at].inputs if n is not node.args[1]]
    given = tuple(slots[n] for n in (node, *held, *node.meta[FILL].given))
    active = slots[cast(fx.Node, node.args[1])]
    return _Gate(end, number, active, fills[node], given, tuple(unread))
