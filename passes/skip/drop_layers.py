"""Leave out whole layers of a model, or the attention or MLP halves of them.

paper: arXiv:2403.03853 (ShortGPT). A residual block whose output is close to its input can go: what read its
exit reads its entry. Which layers may go is measured (`tilewright.frontends.influence`), never guessed by
position: a layer next to a harmless one can be a cliff. The dropped layers' caches are not written any more.
`keep_variance` scales what goes around a layer to the RMS that its output had (Presto!, arXiv:2410.05167);
`rule=shifted` puts the mean of the stream back to what it was; `rule=linear` lets the linear layer in front
of a dropped stretch give what it gave as far as a linear map can (arXiv:2505.02819, ReplaceMe).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass
from tilewright.compiler.blocks import BlockStructure, find_blocks
from tilewright.compiler.diagnostics import PipelineError
from tilewright.compiler.graph import dead_code, output_node
from tilewright.passes.skip._cuts import Cut, Detours, around, chosen, copy_around, cuts_of, measured
from tilewright.passes.skip._drop_examples import drop_examples

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
    """Numbers of the layers to drop, from 0, joined by +: `14+25`."""
    count: int = 0
    """Drop this many layers, by the measurements in `importance`."""
    importance: str = ""
    """A file of measurements (`tilewright.frontends.influence`), of this very model."""
    rule: Literal["influence", "perplexity", "shifted", "linear"] = "perplexity"
    """Which measured order `count` follows: least block influence, or least perplexity one by one, or that
    with the mean of the stream restored behind each dropped layer; `linear`: a file of `count` layers with
    the maps that stand in for them (`tilewright.frontends.stand_ins`)."""
    max_ppl_ratio: float = 1.15
    """Refuse `count` where the file says that perplexity grows by more than this factor."""
    keep_variance: bool = False
    """Scale what goes around a dropped layer by its measured gain; needs `importance`."""
    part: Literal["all", "attention", "mlp"] = "all"
    """Drop whole layers, or one half of each."""
    max_share: float = 0.25
    """Refuse to drop more than this share of the layers (a guard against typing mistakes)."""

    def validate(self) -> None:
        if self.layers and not re.fullmatch(r"\d+(\+\d+)*", self.layers):
            raise self.option_error("layers", "expected numbers joined by +, such as 3+7")
        if len(set(self.numbers())) != len(self.numbers()):
            raise self.option_error("layers", "a layer is named twice")
        if self.count < 0 or (self.layers and self.count):
            raise self.option_error("count", "expected 0 or more, and 0 where layers are named")
        if bool(self.importance) != (self.count > 0 or self.keep_variance):
            raise self.option_error("importance", "a file belongs to count or keep_variance, and only there")
        if self.keep_variance and self.part != "all":
            raise self.option_error("keep_variance", "gains are measured for whole layers: part=all")
        moved = self.rule in ("shifted", "linear")
        if moved and (not self.count or self.keep_variance or self.part != "all"):
            raise self.option_error("rule", "it goes with count, part=all and without keep_variance")
        if not 0.0 <= self.max_share <= 1.0:
            raise self.option_error("max_share", "expected 0 to 1")
        if not self.max_ppl_ratio >= 1.0:
            raise self.option_error("max_ppl_ratio", "expected 1 or more")

    def numbers(self) -> list[int]:
        """The layers named, in ascending order."""
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
            cut.exit.replace_all_uses_with(around(program, cut, log))
        if cuts:
            output_node(program.graph).meta[_DONE] = self.text()
            removed = dead_code(program.graph)
            log.note(f"{len(removed)} nodes have no reader left")
        log.finish(("residual block",))

    def _cuts(self, program: Program, log: PassLog) -> list[Cut]:
        if not self.layers and not self.count:
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
        numbers, detours = self._choice(program, structure, log)
        layers = chosen(structure, numbers, self.max_share, log)
        return [cut for layer in layers for cut in cuts_of(structure, layer, self.part, detours, log)]

    def _choice(
        self, program: Program, structure: BlockStructure, log: PassLog | None = None
    ) -> tuple[list[int], Detours]:
        """(layers to drop, what goes around them)."""
        if not self.importance or structure.refusal:
            return self.numbers(), Detours()
        given = (self.rule, self.count, self.keep_variance, self.max_ppl_ratio)
        numbers, ratio, detours = measured(program, structure, Path(self.importance), *given)
        if log is not None and self.count:
            log.note(f"layers {numbers} by {self.rule}: perplexity x {ratio:.3f} when measured")
        return numbers if self.count else self.numbers(), detours

    def reference(self, program: Program) -> None:
        """Every chosen exit is a copy of its entry, times the gain or plus the shift; nothing is removed."""
        structure = find_blocks(program.graph, program.inputs)
        if not structure.refusal:
            copy_around(program, structure, *self._choice(program, structure))

    def exact_limit(self) -> DropLayers:
        return replace(self, layers="", count=0, importance="", keep_variance=False, rule="perplexity")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        yield from drop_examples()
