"""Leave out whole layers of a model, or the attention or MLP halves of them.

paper: arXiv:2403.03853 (ShortGPT). A residual block whose output is close to its input can go: what read its
exit reads its entry. Which layers may go is measured (`tilewright.frontends.influence`), never guessed by
position: a layer next to a harmless one can be a cliff. The dropped layers' caches are not written any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import fx

from tilewright.compiler import (
    Exactness,
    Example,
    GraphPass,
    PassLog,
    Program,
    Stage,
    Tensor,
    graph_pass,
    ops,
)
from tilewright.compiler.blocks import find_blocks
from tilewright.compiler.diagnostics import PipelineError
from tilewright.compiler.graph import dead_code, output_node
from tilewright.passes.skip._cuts import Cut, chosen, cuts_of

_DONE = "tw_dropped_layers"
"""Mark on the graph's output: what was dropped, so that a second run does not drop the layers behind."""


@graph_pass(
    "drop-layers",
    stage=Stage.STRUCTURE,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2403.03853",
    owns=("block.skip_policy",),
)
class DropLayers(GraphPass):
    """Replace the exit of chosen blocks by their entry and remove what nothing reads any more.

    rewrite:
        x + f(x)
     -> x
    """

    layers: str = ""
    """Numbers of the layers to drop, from 0, joined by +: `14+25`; empty drops none."""
    part: Literal["all", "attention", "mlp"] = "all"
    """Drop whole layers, or one half of each."""
    max_share: float = 0.25
    """Refuse to drop more than this share of the layers (a guard against typing mistakes)."""

    def validate(self) -> None:
        if self.layers and not re.fullmatch(r"\d+(\+\d+)*", self.layers):
            raise self.option_error("layers", "expected numbers joined by +, such as 3+7")
        if len(set(self.numbers())) != len(self.numbers()):
            raise self.option_error("layers", "a layer is named twice")
        if not 0.0 <= self.max_share <= 1.0:
            raise self.option_error("max_share", "expected 0 to 1")

    def numbers(self) -> list[int]:
        """The chosen layers in ascending order."""
        return sorted(int(n) for n in self.layers.split("+") if n)

    def apply(self, program: Program, log: PassLog) -> None:
        cuts = self._cuts(program, log)
        # From the last to the first: otherwise the exit of a dropped layer would come back as an entry.
        for cut in reversed(cuts):
            if not log.take(cut.exit):
                continue
            for write in cut.writes:
                program.graph.erase_node(write)
            log.applied(cut.exit, rule=self.part, removed=[cut.exit])
            cut.exit.replace_all_uses_with(cut.entry)
        if cuts:
            output_node(program.graph).meta[_DONE] = self.text()
            removed = dead_code(program.graph)
            log.note(f"{len(removed)} nodes have no reader left")
        log.finish(("residual block",))

    def _cuts(self, program: Program, log: PassLog) -> list[Cut]:
        if not self.layers:
            log.note("no layer is named: every layer stays")
            return []
        done = output_node(program.graph).meta.get(_DONE)
        if done == self.text():
            log.note("these layers were dropped before")
            return []
        if done is not None:
            raise PipelineError(
                f"{self.text()} after {done}: the layers have other numbers now",
                remedy="name all layers in one pass",
            )
        structure = find_blocks(program.graph, program.inputs)
        layers = chosen(structure, self.numbers(), self.max_share, log)
        return [cut for layer in layers for cut in cuts_of(structure, layer, self.part, log)]

    def reference(self, program: Program) -> None:
        """Every chosen exit is a copy of its entry; nothing is removed."""
        structure = find_blocks(program.graph, program.inputs)
        moved: dict[fx.Node, fx.Node] = {}
        for number in self.numbers() if not structure.refusal else []:
            for block in structure.layers[number].blocks:
                entry = moved.get(block.entry, block.entry)
                with program.graph.inserting_after(block.exit):
                    copy = program.graph.call_function(torch.ops.aten.clone.default, (entry,))
                copy.meta["val"] = block.exit.meta["val"]
                block.exit.replace_all_uses_with(copy)
                copy.args = (entry,)
                moved[block.exit] = copy

    def exact_limit(self) -> DropLayers:
        return replace(self, layers="")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        def stack(x, *weights):
            for up, down in zip(weights[::2], weights[1::2], strict=True):
                x = x + ops.linear(torch.tanh(ops.linear(x, up)), down)
            return ops.linear(torch.sin(x), weights[0])

        weights = [Tensor(7, 5, weight=True), Tensor(5, 7, weight=True)] * 5
        yield {"layers": "1+2", "max_share": 1.0}, Example(stack, (Tensor(3, 5), *weights), count=2)
        yield {"layers": "3", "max_share": 1.0}, Example(stack, (Tensor(3, 5), *weights))

        def leaky(x, *weights):
            inner = []
            for up, down in zip(weights[::2], weights[1::2], strict=True):
                inner.append(torch.tanh(ops.linear(x, up)))
                x = x + ops.linear(inner[-1], down)
            return ops.linear(torch.sin(x), weights[0]), *inner

        shut = Example(leaky, (Tensor(3, 5), *weights), refusal="may not be bypassed")
        yield {"layers": "1", "max_share": 1.0}, shut
        yield (
            {"layers": "1", "part": "attention"},
            Example(stack, (Tensor(3, 5), *weights), refusal="no step that is attention alone"),
        )
