"""Balance activation channels against the weights that read them, so that both quantize well.

paper: arXiv:2211.10438 (SmoothQuant). Exact: the scales cancel. It needs the largest magnitude of each
channel on sample data, from a calibration file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
from tilewright.compiler.basis import Blocked
from tilewright.compiler.calibration import Statistics
from tilewright.compiler.smoothing import Site, apply_site, hidden_site, norm_site


@graph_pass(
    "smooth-scales",
    stage=Stage.WEIGHTS,
    exactness=Exactness.ROUNDING,
    paper="arXiv:2211.10438",
    after=("fold-norm-scale",),
    owns=("linear.scale",),
)
class SmoothScales(GraphPass):
    """Divide channels by s before a linear layer and multiply its weight by s.

    rewrite:
        linear(rms_norm(x, gain), W)
     -> linear(rms_norm(x, gain / s), W s)
    """

    alpha: float = 0.5
    """How much of the activations' range moves into the weights: 0 none, 1 all."""
    calibration: str = ""
    """A file of statistics; only alpha=0, which balances the weights alone, does without."""
    norms: bool = True
    """Smooth what norms with a gain give."""
    hidden: bool = True
    """Smooth what gated MLPs give to their down projections."""

    def validate(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise self.option_error("alpha", "expected 0 to 1")
        if self.alpha > 0.0 and not self.calibration:
            raise self.option_error("calibration", "alpha above 0 needs a calibration file")

    def apply(self, program: Program, log: PassLog) -> None:
        statistics = Statistics.load(Path(self.calibration)) if self.calibration else None
        if statistics is not None:
            statistics.check(program)
        for node in list(program.graph.nodes):
            found: Site | Blocked
            if self.norms and node.target in (ops.rms_norm, ops.layer_norm):
                found = norm_site(program, node)
            elif self.hidden and node.target is ops.gated_mlp:
                found = hidden_site(program, node)
            else:
                continue
            self._smooth(program, node, found, statistics, log)
        program.drop_unread()
        log.finish(("tilewright::rms_norm", "tilewright::layer_norm", "tilewright::gated_mlp"))

    def _smooth(
        self,
        program: Program,
        node: fx.Node,
        found: Site | Blocked,
        statistics: Statistics | None,
        log: PassLog,
    ) -> None:
        if isinstance(found, Blocked):
            log.refused(node, found.reason, blame=found.node)
            return
        largest = statistics.layer(program, found.readers[0]).absmax if statistics is not None else None
        if log.take(node):
            apply_site(program, found, largest, self.alpha, self.name)
            log.claim_slots(found.readers, {r: r for r in found.readers})
            log.applied(node, inserted=[found.source, *found.readers])

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, w, g = Tensor(2, 5, 12), Tensor(7, 12, weight=True), Tensor(12, weight=True)
        weights_alone = {"alpha": 0.0}
        yield weights_alone, Example(lambda x, g, w: ops.linear(ops.rms_norm(x, g, 1e-6, 1.0), w), (x, g, w))
        yield (
            weights_alone,
            Example(
                lambda x, g, b, w, v: (
                    ops.linear(n := ops.layer_norm(x, [12], g, b), w).sum() + ops.linear(n, v)
                ),
                (x, g, g, w, Tensor(3, 12, weight=True)),
            ),
        )
        mlp = (x, Tensor(8, 12, weight=True), Tensor(8, 12, weight=True), Tensor(8, weight=True))
        down = Tensor(5, 8, weight=True)

        def gated(x, gate, up, bias, down):
            return ops.linear(ops.gated_mlp(ops.linear(x, gate), ops.linear(x, up, bias), "silu"), down)

        yield weights_alone, Example(gated, (*mlp, down))
        yield (
            weights_alone,
            Example(lambda x, w: ops.linear(ops.rms_norm(x, None, 1e-6), w), (x, w), refusal="no gain"),
        )
