"""Let tokens leave a language model after some of its layers, where the answer is already certain.

paper: arXiv:2207.07061 (CALM); `measure=policy` is GREEN-CODE's (arXiv:2501.11006), a small classifier that
`tilewright calibrate --exits` trains. A token that has left keeps its state: the keys and values of the
layers behind come from that state, so later tokens find all they attend to. Members of a batch leave one by
one; arithmetic is saved once all have left. Text is not the model's own any more: what it costs is measured
as perplexity (`tilewright evaluate`, with `prompt=true`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.compiler.blocks import BlockStructure, find_blocks
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.exit_policy import ExitPolicy
from tilewright.compiler.graph import dead_code
from tilewright.passes.skip._exit_examples import exit_examples
from tilewright.passes.skip._exit_region import put_gate, refusal_of
from tilewright.passes.skip._exit_scores import BY_LOGITS, Scores, logits_of, put_selects


@graph_pass(
    "early-exit",
    stage=Stage.STRUCTURE,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2207.07061",
    owns=("block.skip_policy",),
)
class EarlyExit(GraphPass):
    """Behind some layers, tokens whose score is above a threshold keep their state.

    rewrite:
        x + f(x)
     -> early_exit_end(select(b + f(b), b, active), b, active),
        b = early_exit_begin(x, active), active = not score(x) > threshold
    """

    exits: str = ""
    """After how many layers tokens may leave, joined by +: `15+20+25`. Each costs a score and a decision."""
    measure: Literal["saturation", "confidence", "entropy", "policy"] = "saturation"
    """The score: cosine of the state with that of a layer before; gap of the two best probabilities of the
    model's head on the state; 1 - entropy of these; the answer of a trained policy."""
    threshold: float = 1.0
    """Tokens with a higher score leave; scores end at 1, so 1 is never."""
    policy: str = ""
    """A file of `tilewright calibrate --exits`, of this very model and these exits."""
    prompt: bool = False
    """Tokens of calls with several tokens may leave too: for measuring quality, as next to nothing is
    saved."""

    def validate(self) -> None:
        if self.exits and not re.fullmatch(r"\d+(\+\d+)*", self.exits):
            raise self.option_error("exits", "expected numbers joined by +, such as 15+20")
        numbers = self.numbers()
        if numbers != sorted(set(numbers)) or (numbers and numbers[0] < 1):
            raise self.option_error("exits", "expected ascending numbers from 1")
        if not 0.0 <= self.threshold <= 1.0:
            raise self.option_error("threshold", "expected 0 to 1")
        if bool(self.policy) != (self.measure == "policy"):
            expected = "only measure=policy reads a file" if self.policy else "measure=policy needs a file"
            raise self.option_error("policy", expected)

    def numbers(self) -> list[int]:
        """The exits in the order given."""
        return [int(n) for n in self.exits.split("+") if n]

    def apply(self, program: Program, log: PassLog) -> None:
        if any(n.target is ops.early_exit_begin for n in program.graph.nodes):
            log.note("there are exits already")
            return
        structure = find_blocks(program.graph, program.inputs)
        exits = self._exits(program, structure, log)
        entries = [structure.layers[n].blocks[0].entry for n in exits]
        if exits and all([log.take(entry) for entry in entries]):
            actives, streams = self._select(program, structure)
            dead_code(program.graph)
            for k, number in enumerate(exits):
                last = exits[k + 1] if k + 1 < len(exits) else len(structure.layers)
                begin, end = put_gate(program.graph, streams, (number, last), actives[k], k)
                log.applied(entries[k], rule=self.measure, inserted=[begin, end])
            log.note(f"tokens may leave after {self.exits} of {len(structure.layers)} layers")
        log.finish(("residual block",))

    def _exits(self, program: Program, structure: BlockStructure, log: PassLog) -> list[int]:
        numbers = self.numbers()
        if not numbers or structure.refusal:
            log.note(f"no layers: {structure.refusal}" if structure.refusal else "no exit is named")
            return []
        layers = structure.layers
        if numbers[-1] >= len(layers):
            raise OptionError(
                f"{self.name}: exit after {numbers[-1]} layers: the model has {len(layers)}, and the last is "
                "no exit"
            )
        last, sizes = layers[-1].blocks[0].exit, layers[-1].blocks[0].exit.meta["val"].shape
        reason = refusal_of(layers[numbers[0] - 1 :])
        if reason:
            log.refused(last, reason)
            return []
        if len(sizes) != 3:
            log.refused(last, f"the stream is {list(sizes)}: expected [batch, tokens, channels]")
            return []
        if not self.prompt and not (isinstance(sizes[1], int) and sizes[1] == 1):
            log.refused(last, f"{sizes[1]} tokens in a call: prompts run through all layers (prompt=true)")
            return []
        if self.measure in BY_LOGITS and logits_of(program.graph, last) is None:
            log.refused(last, "no row of logits for each token is returned")
            return []
        return numbers

    def _select(
        self, program: Program, structure: BlockStructure
    ) -> tuple[list[fx.Node], dict[int, fx.Node]]:
        policy = self._policy(program)
        scores = Scores(program, self.measure, structure.layers[-1].blocks[0].exit, policy)
        return put_selects(program, structure.layers, self.numbers(), scores, self.threshold)

    def _policy(self, program: Program) -> ExitPolicy | None:
        if not self.policy:
            return None
        found = ExitPolicy.load(Path(self.policy))
        found.check(program, self.numbers())
        return found

    def reference(self, program: Program) -> None:
        """Selects behind all layers, without gates around them."""
        self._select(program, find_blocks(program.graph, program.inputs))

    def exact_limit(self) -> EarlyExit:
        return replace(self, threshold=1.0)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        yield from exit_examples()
