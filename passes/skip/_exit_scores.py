"""Putting the score of an early exit, and what it decides, into a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tilewright.compiler import Program, ops
from tilewright.compiler.blocks import Layer
from tilewright.compiler.dataflow import Flow
from tilewright.compiler.exit_policy import ExitPolicy
from tilewright.compiler.exit_scores import certainty, confidence, learnt, saturation
from tilewright.compiler.graph import insert_like, output_node, static_shape
from tilewright.compiler.regions import inline
from tilewright.compiler.rewrite import trace, traced_outputs
from tilewright.passes.skip._exit_region import behind

BY_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {"confidence": confidence, "entropy": certainty}
"""Scores of the model's head on the state."""


@dataclass(frozen=True)
class Scores:
    """One measure on one program."""

    program: Program
    measure: str
    last: fx.Node
    """The stream behind all layers."""
    policy: ExitPolicy | None

    def of(self, stream: fx.Node, before: fx.Node, exit_: int) -> fx.Node:
        """The score [B, S] of the stream, given its value there and a layer before."""
        at = behind(stream)
        if self.measure == "saturation":
            return insert(self.program, saturation, (stream, before), at, stream)
        if self.policy is not None:
            weight, bias = self.policy.weight[exit_], self.policy.bias[exit_ : exit_ + 1]
            held = [self.program.constant(t, stream) for t in (weight, bias)]
            return insert(self.program, learnt, (stream, before, *held), at, stream)
        logits = logits_of(self.program.graph, self.last)
        assert logits is not None, "looked for before"
        copied = head_on(self.program.graph, self.last, logits, stream, at)
        return insert(self.program, BY_LOGITS[self.measure], (copied,), copied.next, stream)


def put_selects(
    program: Program, layers: Sequence[Layer], exits: Sequence[int], scores: Scores, threshold: float
) -> tuple[list[fx.Node], dict[int, fx.Node]]:
    """Put a select behind every layer that tokens may have left before.

    Returns (the active tokens behind each exit; number of layers -> the stream behind them)."""
    graph = program.graph
    streams = {n: layer.blocks[0].entry for n, layer in enumerate(layers)} | {len(layers): scores.last}
    actives: list[fx.Node] = []
    for number in range(exits[0], len(layers) + 1):
        if actives:
            args = (streams[number], streams[number - 1], actives[-1])
            after = streams[number]
            chosen = insert_like(graph, after.next, ops.early_exit_select, args, after)
            after.replace_all_uses_with(chosen, delete_user_cb=chosen.__ne__)
            streams[number] = chosen
        if number in exits:
            score = scores.of(streams[number], streams[number - 1], len(actives))
            actives.append(_active(program, score, actives, threshold))
    return actives, streams


def _active(program: Program, score: fx.Node, earlier: list[fx.Node], threshold: float) -> fx.Node:
    """The tokens that stay: below the threshold, or without a score, and not gone before."""

    def stays(score: Tensor, *before: Tensor) -> Tensor:
        found = torch.logical_not(score > threshold)
        return found & before[0] if before else found

    return insert(program, stays, [score, *earlier[-1:]], score.next, score)


def insert(
    program: Program, fn: Callable[..., Tensor], inputs: Sequence[fx.Node], before: fx.Node, like: fx.Node
) -> fx.Node:
    """Put the ops of a function of these values in front of a node; returns its result."""
    module = trace(lambda *given: (fn(*given),), [n.meta["val"] for n in inputs])
    made = inline(program, module, list(inputs), before=before, like=like, origin="early-exit")
    result: fx.Node = made[traced_outputs(module)[0]]
    return result


def logits_of(graph: fx.Graph, last: fx.Node) -> fx.Node | None:
    """The returned value of one row per token that depends on the stream's last value; None without one."""
    flow = Flow(graph)
    rows = static_shape(last)
    found = [
        n
        for n in output_node(graph).all_input_nodes
        if flow.reaches(last, n) and n is not last and n.meta["val"].is_floating_point()
    ]
    return next((n for n in found if (static_shape(n) or (0,))[:-1] == (rows or (1,))[:-1]), None)


def head_on(graph: fx.Graph, last: fx.Node, logits: fx.Node, stream: fx.Node, before: fx.Node) -> fx.Node:
    """A copy of what turns the stream's last value into logits, reading another value of the stream."""
    flow = Flow(graph)
    new = {last: stream}
    with graph.inserting_before(before):
        for node in flow.members(flow.below(last) & flow.upto(logits)):
            new[node] = graph.node_copy(node, lambda n: new.get(n, n))
    return new[logits]
