"""Decode with fewer channels than the prompt was read with, over the same cache.

paper: OverFill, two-stage models for decoding (github.com/friendshipkim/overfill). A prompt is read by the
whole model: its keys and values cost arithmetic, not memory traffic. Each token after it reads the weights
once more, so those calls run with the channels that matter most. Heads keep their size, so the cache is that
of the whole model. The paper trains what is left; without training it serves as a draft that the whole model
confirms (`tilewright.speculate`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor, fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass
from tilewright.compiler.basis import Blocked
from tilewright.compiler.calibration import Statistics
from tilewright.compiler.width import (
    Channels,
    Trimmer,
    hidden_channels,
    importance,
    norm_factor,
    stream_channels,
)
from tilewright.passes.skip._width_examples import masked, width_examples


@graph_pass(
    "prune-width-for-decode",
    stage=Stage.WEIGHTS,
    exactness=Exactness.APPROXIMATE,
    paper="OverFill",
    owns=("linear.width",),
)
class PruneWidthForDecode(GraphPass):
    """Leave out the least important channels of residual streams and MLPs in calls of few tokens.

    rewrite:
        x + linear(act(linear(norm(x), U)), D)
     -> x[kept] + linear(act(linear(norm(x[kept]), U[hidden, kept])), D[kept, hidden])
    """

    hidden_ratio: float = 0.0
    """Share of a residual stream's channels to leave out; the paper's 0.45 is for models trained after it."""
    mlp_ratio: float = 0.2
    """Share of each MLP's inner channels to leave out."""
    importance: Literal["activation", "weight"] = "activation"
    """What a channel counts by: the mean it has on sample data, or the L2 norm of the weights that read it.
    Weights say little: without 320 of its 1,536 inner channels SmolLM2's perplexity is 1.37 times what it
    was when they are chosen by data, 61,000 times when by weights."""
    calibration: str = ""
    """A file of statistics with means (`tilewright calibrate --means`), for importance=activation."""
    max_tokens: int = 1
    """Calls of more tokens are prompts, which the whole model reads. A draft model is fed up to 2."""
    multiple: int = 64
    """The number of channels kept is rounded to a multiple of this."""

    def validate(self) -> None:
        for name in ("hidden_ratio", "mlp_ratio"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise self.option_error(name, "expected 0 to below 1")
        for name in ("max_tokens", "multiple"):
            if getattr(self, name) < 1:
                raise self.option_error(name, "expected 1 or more")
        if bool(self.calibration) != (self.importance == "activation") and (
            self.hidden_ratio or self.mlp_ratio
        ):
            missing = "importance=activation needs a file of statistics, importance=weight none"
            expected = "only importance=activation reads a file" if self.calibration else missing
            raise self.option_error("calibration", expected)

    def apply(self, program: Program, log: PassLog) -> None:
        if any(self.name in n.meta.get("rewritten_by", ()) for n in program.graph.nodes):
            log.note("channels were left out before")
            return
        trimmer = Trimmer(program, self.name)
        for node, channels, kept, factors in list(self._chosen(program, log)):
            if log.take(node):
                trimmer.trim(channels, kept, factors)
                linears = [*channels.writers, *channels.readers]
                log.claim_slots(linears, {n: n for n in linears})
                log.applied(node, rule="stream" if channels.stream else "mlp", inserted=linears)
                log.note(f"{node.name}: {kept.numel()} of {channels.width} channels stay")
        trimmer.finish()
        log.finish(("residual stream", "tilewright::linear"))

    def _chosen(
        self, program: Program, log: PassLog | None = None
    ) -> Iterator[tuple[fx.Node, Channels, Tensor, dict[fx.Node, float]]]:
        """(node, channels, those to keep, factors of the norms' gains) of all that loses channels."""
        statistics = Statistics.load(Path(self.calibration)) if self.calibration else None
        if statistics is not None:
            statistics.check(program)
        found = [(n, c, self.mlp_ratio) for n, c in hidden_channels(program)] if self.mlp_ratio else []
        found += [(n, c, self.hidden_ratio) for n, c in stream_channels(program)] if self.hidden_ratio else []
        for node, channels, ratio in found:
            blocked = channels if isinstance(channels, Blocked) else self._blocked(node, channels, ratio)
            if blocked is not None and log is not None:
                log.refused(node, blocked.reason, blame=blocked.node)
            if blocked is not None or isinstance(channels, Blocked):
                continue
            order = importance(program, channels, statistics).topk(self._kept(channels, ratio)).indices
            kept, factors = order.sort().values, dict[fx.Node, float]()
            if statistics is not None:
                factors = {n: norm_factor(program, channels, n, kept, statistics) for n in channels.norms}
            yield node, channels, kept, factors

    def _kept(self, channels: Channels, ratio: float) -> int:
        return max(1, round((1.0 - ratio) * channels.width / self.multiple)) * self.multiple

    def _blocked(self, node: fx.Node, channels: Channels, ratio: float) -> Blocked | None:
        """Why a call or a number of channels stays as it is."""
        sizes = node.meta["val"].shape
        if len(sizes) != 3:
            return Blocked(node, f"it is {list(sizes)}: expected [batch, tokens, channels]")
        if not isinstance(sizes[1], int) or sizes[1] > self.max_tokens:
            return Blocked(node, f"{sizes[1]} tokens in a call: prompts are read at full width (max_tokens)")
        if self._kept(channels, ratio) >= channels.width:
            what = f"{channels.width} channels less {ratio:g}: all stay"
            return Blocked(node, f"{what} ({self.multiple} at a time)")
        return None

    def reference(self, program: Program) -> None:
        """The channels that go are zero where they are written; the norms' means run over the others."""
        for _, channels, kept, factors in list(self._chosen(program)):
            masked(program, channels, kept, factors)

    def exact_limit(self) -> PruneWidthForDecode:
        return replace(self, hidden_ratio=0.0, mlp_ratio=0.0)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        yield from width_examples()
