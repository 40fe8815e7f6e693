"""Moving graph around safely: inlining traced code, keeping order, mutation regions, cycles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from tilewright.compiler.program import Program

_ORIGIN = ("stack_trace", "nn_module_stack", "tw_slots")


def is_mutating(node: fx.Node) -> bool:
    """True for a call whose schema writes to one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def mutation_regions(graph: fx.Graph) -> dict[fx.Node, int] | None:
    """Region number of each node, counted up at each in-place write; None when nothing is written early.

    The write-back of declared state stands at the very end of the graph and starts no region.
    """
    nodes = list(graph.nodes)
    tail = len(nodes)
    while tail and (nodes[tail - 1].op == "output" or is_mutating(nodes[tail - 1])):
        tail -= 1
    if not any(is_mutating(n) for n in nodes[:tail]):
        return None
    regions, current = {}, 0
    for node in nodes:
        if is_mutating(node):
            current += 1
        regions[node] = current
    return regions


def fuses_a_cycle(
    nodes: Iterable[fx.Node], outputs: tuple[fx.Node, ...], bound: Iterable[Any]
) -> fx.Node | None:
    """A bound input that depends on an output of the match, if there is one.

    Harmless while each output is computed apart; once they come from one node it would be a cycle.
    """
    if len(outputs) < 2:
        return None
    inside, made = set(nodes), set(outputs)
    for value in bound:
        if not isinstance(value, fx.Node):
            continue
        seen, stack = {value}, [value]
        while stack:
            node = stack.pop()
            for source in node.all_input_nodes:
                if source in made:
                    return value
                if source not in seen and source not in inside:
                    seen.add(source)
                    stack.append(source)
    return None


def inline(
    program: Program,
    module: fx.GraphModule,
    inputs: list[fx.Node],
    *,
    before: fx.Node,
    like: fx.Node,
    origin: str,
) -> dict[fx.Node, fx.Node]:
    """Copy a traced graph before a node, its placeholders replaced by `inputs`; returns traced -> new
    nodes."""
    done: dict[fx.Node, fx.Node] = {}
    feed = iter(inputs)
    with program.graph.inserting_before(before):
        for node in module.graph.nodes:
            if node.op == "placeholder":
                done[node] = next(feed)
            elif node.op == "get_attr":
                done[node] = _constant(program, getattr(module, str(node.target)), node)
            elif node.op != "output":
                done[node] = program.graph.node_copy(node, lambda n: done[n])
                _stamp(done[node], node, like, origin)
    return {old: new for old, new in done.items()}


def _constant(program: Program, value: torch.Tensor, node: fx.Node) -> fx.Node:
    new = program.graph.get_attr(program.hold("tw_constant_", value))
    new.meta = dict(node.meta)
    return new


def _stamp(new: fx.Node, traced: fx.Node, like: fx.Node, origin: str) -> None:
    new.meta = {"val": traced.meta["val"]} if "val" in traced.meta else {}
    for key in _ORIGIN:
        if key in like.meta:
            new.meta[key] = like.meta[key]
    new.meta["rewritten_by"] = (*like.meta.get("rewritten_by", ()), origin)


def sort_after(graph: fx.Graph, moved: list[fx.Node]) -> None:
    """Restore topological order after uses were redirected to nodes that stand later: move users down."""
    if all(node < user for node in moved for user in node.users):
        return
    position = {n: i for i, n in enumerate(graph.nodes)}
    late = [u for node in moved for u in node.users if position[u] < position[node]]
    if not late:
        return
    anchor = max(moved, key=lambda n: position[n])
    limit, pending = position[anchor], set(late)
    order = sorted(position, key=lambda n: position[n])
    moving = []
    for node in order[min(position[n] for n in late) : limit]:
        if node in pending or any(i in pending for i in node.all_input_nodes):
            pending.add(node)
            moving.append(node)
    for node in moving:
        anchor.append(node)
        anchor = node
