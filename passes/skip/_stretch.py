"""A stretch of blocks between one value of the residual stream and a later one, made leavable."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tilewright.compiler.blocks import Block, Layer
from tilewright.compiler.dataflow import Flow
from tilewright.compiler.step_input import step_masks


@dataclass(frozen=True)
class Stretch:
    """Adjacent layers from `entry` to `exit`."""

    entry: fx.Node
    exit: fx.Node
    layers: tuple[Layer, ...]


def refusal_of(layers: Sequence[Layer]) -> str:
    """Why these layers may not be left out together, empty when they may."""
    for layer in layers:
        if len(layer.blocks) > 1:
            names = " and ".join(b.name for b in layer.blocks)
            return f"{names} are coupled streams: one gate holds the residual of one stream"
        for block, verdict in layer.failures():
            return f"{block.name} may not be left out: {verdict.rule}: {verdict.reason}"
        if any(out.kind == "state write" for out in layer.blocks[0].live_outs):
            return f"{layer.blocks[0].name} writes state, which must not depend on a decision"
    for before, after in zip(layers, layers[1:], strict=False):
        if before.blocks[0].exit is not after.blocks[0].entry:
            return f"{after.blocks[0].name} does not follow {before.blocks[0].name} on the stream"
    return ""


def modulated_input(graph: fx.Graph, block: Block) -> fx.Node:
    """What the block's first layer of weights reads: its normalised input, moved by the step. The block's
    entry where the step changes nothing on the way."""
    flow = Flow(graph)
    after, _ = step_masks(flow)
    inside = set(block.nodes)
    for node in flow.nodes:
        if node in inside and flow.bit(node) & flow.heavy & flow.below(block.entry):
            read = [n for n in node.all_input_nodes if flow.bit(n) & flow.below(block.entry)]
            return read[0] if read and flow.bit(read[0]) & after else block.entry
    return block.entry


def close_stretch(
    graph: fx.Graph, found: Stretch, probe: fx.Node, measured: fx.Node, begin: fx.Node, end: fx.Node
) -> None:
    """Route the stretch through `begin` and `end`, and place between them all that serves it alone."""
    found.exit.replace_all_uses_with(end, delete_user_cb=lambda user: user not in (end, measured))
    flow = Flow(graph)
    seen = flow.upto(probe) | flow.bit(probe)
    inside = (flow.below(found.entry) & (flow.upto(end) | flow.bit(end))) & ~seen
    for node in flow.members(inside):
        if node not in (begin, end):
            node.replace_input_with(found.entry, begin)
    flow = Flow(graph)
    core = flow.below(begin) & flow.upto(end)
    outside = flow.upto(begin) | flow.bit(begin) | flow.bit(end)
    for node in reversed(flow.nodes):
        users = flow.users(node)
        alone = users and all(flow.bit(u) & core or (u is end and flow.bit(node) & core) for u in users)
        if node.op == "call_function" and alone and not flow.bit(node) & outside:
            core |= flow.bit(node)
    for node in flow.members(core):  # a list is taken apart where it is made
        if node.target is operator.getitem and not flow.bit(node.all_input_nodes[0]) & core:
            core &= ~flow.bit(node)
    anchor = begin
    behind = flow.below(end)
    late = [n for n in flow.nodes if flow.bit(n) & behind and n.op != "output"]
    held = ("call_function", "get_attr")
    first = [n for n in flow.nodes if n.op in held and not flow.bit(n) & (core | behind)]
    for node in [n for n in first if n not in (begin, end)]:
        anchor.prepend(node)
    for node in [*flow.members(core), end, *late]:
        anchor.append(node)
        anchor = node
