"""A stretch of blocks between one value of the residual stream and a later one, made leavable."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.blocks import Block, Layer
from tilewright.compiler.dataflow import Flow
from tilewright.compiler.graph import insert_like
from tilewright.compiler.step_input import step_masks


@dataclass(frozen=True)
class Stretch:
    """Adjacent layers of the same streams, coupled ones if several; the stream of most elements leads."""

    layers: tuple[tuple[Block, ...], ...]
    """The blocks of each layer, that of the leading stream first."""
    entries: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]


def runs_of(layers: Sequence[Layer]) -> list[tuple[tuple[Block, ...], ...]]:
    """Adjacent layers of the same streams; each as its blocks, that of the leading stream first."""
    found = []
    for _, run in groupby(layers, key=lambda layer: sorted(b.stream for b in layer.blocks)):
        rows = [sorted(layer.blocks, key=lambda b: b.stream) for layer in run]
        sizes = [b.entry.meta["val"].numel() if "val" in b.entry.meta else 0 for b in rows[0]]
        lead = sizes.index(max(sizes)) if all(isinstance(n, int) for n in sizes) else 0
        found.append(tuple((row[lead], *row[:lead], *row[lead + 1 :]) for row in rows))
    return found


def refusal_of(layers: Sequence[Layer]) -> str:
    """Why these layers may not be left out, empty when they may."""
    for layer in layers:
        for block, verdict in layer.failures():
            return f"{block.name} may not be left out: {verdict.rule}: {verdict.reason}"
        for block in layer.blocks:
            if any(out.kind == "state write" for out in block.live_outs):
                return f"{block.name} writes state, which must not depend on a decision"
    for run in runs_of(layers):
        for before, after in pairwise(run):
            for a, b in zip(before, after, strict=True):
                if a.exit is not b.entry:
                    return f"{b.name} does not follow {a.name} on the stream"
    return ""


def stretch_of(run: tuple[tuple[Block, ...], ...], moved: Mapping[fx.Node, fx.Node]) -> Stretch:
    """A run as a stretch. moved: exits of earlier stretches -> their ends.

    Streams whose exit nothing reads behind the stretch (the text of a last layer) are left out.
    """
    first, last = run[0], run[-1]
    flow = Flow(last[0].exit.graph)
    within = 0
    for block in last:
        within |= flow.upto(block.exit)
    kept = [i for i, b in enumerate(last) if i == 0 or any(not flow.bit(u) & within for u in b.exit.users)]
    entries = tuple(moved.get(first[i].entry, first[i].entry) for i in kept)
    return Stretch(run, entries, tuple(last[i].exit for i in kept))


def behind(node: fx.Node) -> fx.Node:
    """The first call behind a node."""
    found = node.next
    while found.op != "call_function":
        found = found.next
    return found


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


def put_ends(
    graph: fx.Graph, found: Stretch, begin: fx.Node, measured: fx.Node, number: int
) -> list[fx.Node]:
    """The ends of the streams, that of the leading one last."""
    ends = []
    for stream, (entry, exit_) in enumerate(zip(found.entries, found.exits, strict=True)):
        if stream:
            beside = (exit_, entry, number, stream)
            ends.append(insert_like(graph, exit_.next, ops.step_reuse_end_beside, beside, exit_))
    lead = found.exits[0]
    args = (lead, begin, measured, number)
    return [*ends, insert_like(graph, max(lead, measured).next, ops.step_reuse_end, args, lead)]


def close_stretch(
    graph: fx.Graph,
    found: Stretch,
    probe: fx.Node,
    measured: fx.Node,
    begin: fx.Node,
    ends: Sequence[fx.Node],
) -> None:
    """Route the stretch through `begin` and `ends`, and place between them all that serves it alone.

    ends: of the exits, the leading stream's last.
    """
    entry, flow, within = found.entries[0], Flow(graph), 0
    for exit_ in found.exits:
        within |= flow.upto(exit_)
    inner = {*flow.members(within), *ends, measured}
    for exit_, end in zip(found.exits, (ends[-1], *ends[:-1]), strict=True):
        exit_.replace_all_uses_with(end, delete_user_cb=lambda user: user not in inner)
    flow, upto = Flow(graph), 0
    for end in ends:
        upto |= flow.upto(end)
    seen = flow.upto(probe) | flow.bit(probe)
    for node in flow.members(flow.below(entry) & upto & ~seen):
        if node is not begin:
            node.replace_input_with(entry, begin)
    flow, upto, bits, below = Flow(graph), 0, 0, 0
    for end in ends:
        upto, bits, below = upto | flow.upto(end), bits | flow.bit(end), below | flow.below(end)
    core = flow.below(begin) & upto & ~bits
    outside = flow.upto(begin) | flow.bit(begin) | bits
    for node in reversed(flow.nodes):
        users = flow.users(node)
        alone = users and all(flow.bit(u) & core or (u in ends and flow.bit(node) & core) for u in users)
        if node.op == "call_function" and alone and not flow.bit(node) & outside:
            core |= flow.bit(node)
    for node in flow.members(core):  # a list is taken apart where it is made
        if node.target is operator.getitem and not flow.bit(node.all_input_nodes[0]) & core:
            core &= ~flow.bit(node)
    anchor = begin
    late = [n for n in flow.nodes if flow.bit(n) & below and n.op != "output" and n not in ends]
    held = ("call_function", "get_attr")
    first = [n for n in flow.nodes if n.op in held and not flow.bit(n) & (core | below)]
    for node in [n for n in first if n is not begin and n not in ends]:
        anchor.prepend(node)
    for node in [*flow.members(core), *ends, *late]:
        anchor.append(node)
        anchor = node
