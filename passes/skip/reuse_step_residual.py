"""Reuse of what a diffusion model's blocks added to the stream at an earlier step.

paper: arXiv:2411.02397 (AdaCache), arXiv:2411.19108 (TeaCache), first-block cache. The blocks of a step
change the stream by a residual that differs little from step to step. A gate in front of a stretch of blocks
asks the policy of the running request (`runtime.step_reuse`); where it says so, the kept residual is added
and compiled pieces of the stretch do not run. Outside of a request, and at threshold 0, all is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.compiler.blocks import BlockStructure, find_blocks
from tilewright.compiler.graph import insert_like
from tilewright.passes.skip._drop_examples import reuse_examples
from tilewright.passes.skip._stretch import Stretch, close_stretch, modulated_input, refusal_of


@graph_pass(
    "reuse-step-residual",
    stage=Stage.STRUCTURE,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2411.02397",
    owns=("block.skip_policy",),
)
class ReuseStepResidual(GraphPass):
    """Put a gate around a stretch of blocks: their residual is computed, or that of an earlier step is added.

    rewrite:
        x + f(x)
     -> step_reuse_end(b + f(b), b, measured), b = step_reuse_begin(x, probe)
    """

    metric: Literal["residual", "modulated", "first-block"] = "residual"
    """What the policy sees: an attention's residual behind a computed step (AdaCache's codebook), the first
    block's modulated input (TeaCache), or the residual of the blocks in front of the gate."""
    head: int = 0
    """Blocks in front of the gate, always computed; `first-block` needs one."""
    tail: int = 0
    """Blocks behind the gate, always computed."""

    def validate(self) -> None:
        if self.head < 0 or self.tail < 0:
            raise self.option_error("head" if self.head < 0 else "tail", "expected 0 or more")
        if self.metric == "first-block" and self.head == 0:
            raise self.option_error("head", "metric=first-block looks at the blocks in front: at least 1")

    def apply(self, program: Program, log: PassLog) -> None:
        if any(n.target is ops.step_reuse_begin for n in program.graph.nodes):
            log.note("there is a gate already")
            return
        structure = find_blocks(program.graph, program.inputs)
        found = self._stretch(structure, log)
        if found is not None and log.take(found.exit):
            self._gate(program.graph, structure, found, log)
        log.finish(("residual block",))

    def _stretch(self, structure: BlockStructure, log: PassLog) -> Stretch | None:
        if structure.refusal:
            log.note(f"no layers: {structure.refusal}")
            return None
        layers = structure.layers
        last = layers[-1].blocks[0].exit
        if self.head + self.tail >= len(layers):
            log.refused(last, f"head and tail leave no block of {len(layers)} to reuse")
            return None
        middle = layers[self.head : len(layers) - self.tail]
        reason = refusal_of(middle)
        if reason:
            log.refused(middle[0].blocks[0].exit, reason)
            return None
        return Stretch(middle[0].blocks[0].entry, middle[-1].blocks[0].exit, tuple(middle))

    def _gate(self, graph: fx.Graph, structure: BlockStructure, found: Stretch, log: PassLog) -> None:
        first, voting = found.layers[0].blocks[0], found.layers[len(found.layers) // 2].blocks[0]
        entry, exit_, probe, measured = found.entry, found.exit, found.entry, found.entry
        sub, before = torch.ops.aten.sub.Tensor, entry.next
        while before.op != "call_function":
            before = before.next
        if self.metric == "first-block":
            probe = insert_like(graph, before, sub, (entry, structure.layers[0].blocks[0].entry), entry)
        elif self.metric == "modulated":
            probe = modulated_input(graph, first)
            before = probe.next if probe is not entry else before
        else:
            at = next((i for i, s in enumerate(voting.segments) if "self-attention" in s.kinds), 0)
            points = structure.streams[voting.stream].points[voting.span[0] + at :]
            measured = insert_like(graph, points[1].next, sub, (points[1], points[0]), points[1])
        begin = insert_like(graph, before, ops.step_reuse_begin, (entry, probe, 0), entry)
        args = (exit_, begin, begin if measured is entry else measured, 0)
        end = insert_like(graph, max(exit_, measured).next, ops.step_reuse_end, args, exit_)
        close_stretch(graph, found, probe, measured, begin, end)
        log.applied(exit_, rule=self.metric, inserted=[begin, end])
        log.note(f"{len(found.layers)} of {len(structure.layers)} blocks may reuse their residual")

    def reference(self, program: Program) -> None:
        """Outside of a request every step is computed: the program as it is."""

    def exact_limit(self) -> ReuseStepResidual:
        return self

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        yield from reuse_examples()
