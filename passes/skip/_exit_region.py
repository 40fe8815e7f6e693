"""The stretch between an early exit and the next one: its nodes together, and nothing else among them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.blocks import Layer
from tilewright.compiler.dataflow import Flow
from tilewright.compiler.graph import insert_like, mutates


def refusal_of(layers: Sequence[Layer]) -> str:
    """Why tokens may not leave in front of these layers, empty when they may."""
    for layer in layers:
        if len(layer.blocks) > 1:
            names = " and ".join(b.name for b in layer.blocks)
            return f"{names} are coupled streams: tokens leave one stream, behind the last coupled layer"
        for block, verdict in layer.failures():
            return f"{block.name} may not be left out: {verdict.rule}: {verdict.reason}"
    for before, after in zip(layers, layers[1:], strict=False):
        if before.blocks[0].exit is not after.blocks[0].entry:
            return f"{after.blocks[0].name} does not follow {before.blocks[0].name} on the stream"
    return ""


def behind(node: fx.Node) -> fx.Node:
    """The first place behind a node where calls may stand."""
    at = node.next
    while at.op in ("placeholder", "get_attr"):
        at = at.next
    return at


def put_gate(
    graph: fx.Graph, streams: dict[int, fx.Node], layers: tuple[int, int], active: fx.Node, number: int
) -> tuple[fx.Node, fx.Node]:
    """A gate around the layers of a range; `streams` (number of layers -> the stream behind) is kept true."""
    entry, exit_ = streams[layers[0]], streams[layers[1]]
    held: list[fx.Node] = []
    args = (entry, active, held, number, layers[1] - layers[0])
    begin = insert_like(graph, active.next, ops.early_exit_begin, args, entry)
    end = insert_like(graph, behind(exit_), ops.early_exit_end, (exit_, begin, active, number), exit_)
    exit_.replace_all_uses_with(end, delete_user_cb=lambda user: user is not end)
    _close_region(graph, entry, active, begin, end)
    streams[layers[1]] = end
    return begin, end


def _close_region(graph: fx.Graph, entry: fx.Node, active: fx.Node, begin: fx.Node, end: fx.Node) -> None:
    """Route what lies between entry and end through `begin`, and order the graph: what does not need the
    stretch, begin, the stretch with its writes and all that serves it alone, end, the rest."""
    flow = Flow(graph)
    seen = flow.upto(active) | flow.upto(entry)
    for node in flow.members((flow.below(entry) & flow.upto(end)) & ~seen):
        if node not in (begin, end):
            node.replace_input_with(entry, begin)
    flow = Flow(graph)
    core = _core(flow, begin, active, end)
    late = flow.below(begin) & ~core & ~flow.bit(end)
    late |= _writes(flow, late) & ~core
    for node in flow.members(_overwrites(flow, core)):  # what the core reads of old must still be there
        late |= (flow.bit(node) | flow.below(node)) & ~core
    held = [n for n in flow.nodes if n.op in ("call_function", "get_attr") and n not in (begin, end)]
    for node in held:
        if not flow.bit(node) & (core | late):
            begin.prepend(node)
    anchor = begin
    for node in [*flow.members(core), end, *(n for n in flow.members(late) if n.op != "output")]:
        anchor.append(node)
        anchor = node


def _core(flow: Flow, begin: fx.Node, active: fx.Node, end: fx.Node) -> int:
    """Between begin and end, with what is written there and what serves it alone."""
    core = flow.below(begin) & flow.upto(end) & ~flow.bit(end)
    outside = flow.upto(begin) | flow.upto(active) | flow.bit(end)
    before = 0
    while core != before:
        before = core
        core |= _writes(flow, core)
        for node in reversed(flow.nodes):
            users, bit = flow.users(node), flow.bit(node)
            free = node.op == "call_function" and users and not bit & outside
            if free and all(flow.bit(u) & core for u in users):
                core |= bit
    for node in flow.members(core):  # a list is taken apart where it is made
        if node.target is operator.getitem and not flow.bit(node.all_input_nodes[0]) & core:
            core &= ~flow.bit(node)
    return core


def _writes(flow: Flow, made: int) -> int:
    """The writes of values of a mask, and of inputs of which the mask reads the old value."""
    found = 0
    read = {s for n in flow.members(made) for s in n.all_input_nodes if s.op == "placeholder"}
    for node in flow.nodes:
        if mutates(node) and not node.users:
            target, *values = node.all_input_nodes
            if target in read or any(flow.bit(v) & made for v in values):
                found |= flow.bit(node)
    return found


def _overwrites(flow: Flow, made: int) -> int:
    """Writes whose result is used behind a mask, over inputs of which the mask reads the old value."""
    read = {s for n in flow.members(made) for s in n.all_input_nodes if s.op == "placeholder"}
    held = [n for n in flow.nodes if n.users and mutates(n) and n.all_input_nodes[0] in read]
    return sum(flow.bit(n) for n in held if not flow.bit(n) & made)
