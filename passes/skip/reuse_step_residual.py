"""Reuse of what a diffusion model's blocks added to the stream at an earlier step.

paper: arXiv:2411.02397 (AdaCache), arXiv:2411.19108 (TeaCache), first-block cache. The blocks of a step
change the stream by a residual that differs little from step to step. A gate in front of a stretch of blocks
asks the policy of the running request (`runtime.step_reuse`); where it says so, the kept residual is added
and compiled pieces of the stretch do not run. Outside of a request, and at threshold 0, all is computed.

Coupled streams (image and text) go together: one gate keeps the residual of each. Where a model goes on with
other streams (joint blocks behind coupled ones), every run of like blocks has a gate; what `modulated` and
`first-block` look at is the same for all of them, so that one decision leaves out all or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.compiler.blocks import Block, BlockStructure, find_blocks
from tilewright.compiler.graph import insert_like
from tilewright.passes.skip._drop_examples import reuse_examples
from tilewright.passes.skip._stretch import (
    behind,
    close_stretch,
    modulated_input,
    put_ends,
    refusal_of,
    runs_of,
    stretch_of,
)


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
        runs = self._runs(structure, log)
        if runs:
            self._gates(program.graph, structure, runs, log)
        log.finish(("residual block",))

    def _runs(self, structure: BlockStructure, log: PassLog) -> list[tuple[tuple[Block, ...], ...]]:
        if structure.refusal:
            log.note(f"no layers: {structure.refusal}")
            return []
        layers = structure.layers
        if self.head + self.tail >= len(layers):
            reason = f"head and tail leave no block of {len(layers)} to reuse"
            log.refused(layers[-1].blocks[0].exit, reason)
            return []
        middle = layers[self.head : len(layers) - self.tail]
        reason = refusal_of(middle)
        if reason:
            log.refused(middle[0].blocks[0].exit, reason)
            return []
        return runs_of(middle)

    def _gates(
        self,
        graph: fx.Graph,
        structure: BlockStructure,
        runs: list[tuple[tuple[Block, ...], ...]],
        log: PassLog,
    ) -> None:
        probe, moved, reusable = self._probe(graph, structure, runs[0][0][0]), dict[fx.Node, fx.Node](), 0
        for number, run in enumerate(runs):
            found = stretch_of(run, moved)
            if not log.take(found.exits[0]):
                continue
            entry, sub = found.entries[0], torch.ops.aten.sub.Tensor
            seen = probe or entry
            measured = entry
            if self.metric == "residual":
                voting = run[len(run) // 2][0]
                at = next((i for i, s in enumerate(voting.segments) if "self-attention" in s.kinds), 0)
                start, end = structure.streams[voting.stream].points[voting.span[0] + at :][:2]
                measured = insert_like(graph, end.next, sub, (end, moved.get(start, start)), end)
            args = (entry, seen, number)
            begin = insert_like(graph, behind(max(entry, seen)), ops.step_reuse_begin, args, entry)
            ends = put_ends(graph, found, begin, begin if measured is entry else measured, number)
            close_stretch(graph, found, seen, measured, begin, ends)
            moved.update(zip(found.exits, (ends[-1], *ends[:-1]), strict=True))
            log.applied(found.exits[0], rule=self.metric, inserted=[begin, *ends])
            reusable += len(run)
        log.note(f"{reusable} of {len(structure.layers)} blocks may reuse their residual")

    def _probe(self, graph: fx.Graph, structure: BlockStructure, first: Block) -> fx.Node | None:
        """What all gates decide by; None for the entry of each."""
        if self.metric == "modulated":
            return modulated_input(graph, first)
        if self.metric == "residual":
            return None
        start = next(b.entry for b in structure.layers[0].blocks if b.stream == first.stream)
        args = (first.entry, start)
        return insert_like(graph, behind(first.entry), torch.ops.aten.sub.Tensor, args, first.entry)

    def reference(self, program: Program) -> None:
        """Outside of a request every step is computed: the program as it is."""

    def exact_limit(self) -> ReuseStepResidual:
        return self

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        yield from reuse_examples()
