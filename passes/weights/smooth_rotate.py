"""Smooth the input of down projections, then rotate it: the Hadamard matrix spreads what is left.

paper: arXiv:2506.05413 (SmoothRot). Massive outliers of a few hidden channels are first moved into the
weights, so that the rotation has a smaller maximum to spread over the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from tilewright.compiler.basis import Blocked
from tilewright.compiler.calibration import Statistics
from tilewright.compiler.hadamard import HadamardPlan, plan_for
from tilewright.compiler.rotation import Rotation, Rotator
from tilewright.compiler.smoothing import Site, apply_site, hidden_site


@graph_pass(
    "smooth-rotate",
    stage=Stage.WEIGHTS,
    exactness=Exactness.ROUNDING,
    paper="arXiv:2506.05413",
    owns=("linear.rotation",),
)
class SmoothRotate(GraphPass):
    """Scale hidden channels by 1 / s, rotate them online, and undo both in the down projection.

    rewrite:
        linear(act(g) * linear(x, U), D)
     -> linear(hadamard(act(g) * linear(x, U / s)), D s H)
    """

    alpha: float = 0.5
    """How much of the activations' range moves into the weights: 0 none, 1 all."""
    calibration: str = ""
    """A file of statistics; only alpha=0, which balances the weights alone, does without."""

    def validate(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise self.option_error("alpha", "expected 0 to 1")
        if self.alpha > 0.0 and not self.calibration:
            raise self.option_error("calibration", "alpha above 0 needs a calibration file")

    def apply(self, program: Program, log: PassLog) -> None:
        statistics = Statistics.load(Path(self.calibration)) if self.calibration else None
        if statistics is not None:
            statistics.check(program)
        rotator = Rotator(program)
        for node in [n for n in program.graph.nodes if n.target is ops.gated_mlp]:
            found, plan = hidden_site(program, node), _plan(node)
            problem = found if isinstance(found, Blocked) else plan
            if isinstance(problem, Blocked):
                log.refused(node, problem.reason, blame=problem.node)
                continue
            assert isinstance(found, Site), "a site that is not blocked"
            largest = statistics.layer(program, found.readers[0]).absmax if statistics is not None else None
            if log.take(node):
                apply_site(program, found, largest, self.alpha, self.name)
                turned = rotator.online(node, Rotation.of(problem), "r4")
                for reader in found.readers:
                    reader.replace_input_with(node, turned)
                    rotator.read_rotated(reader, Rotation.of(problem), "r4")
                log.claim_slots(found.readers, {r: r for r in found.readers})
                log.applied(node, inserted=[found.source, turned, *found.readers])
        rotator.finish()
        log.finish(("tilewright::gated_mlp",))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x = Tensor(2, 5, 12)
        gate, up, down = (Tensor(*s, weight=True) for s in ((16, 12), (16, 12), (7, 16)))

        def gated(x, gate, up, down):
            return ops.linear(ops.gated_mlp(ops.linear(x, gate), ops.linear(x, up), "silu"), down)

        yield {"alpha": 0.0}, Example(gated, (x, gate, up, down))
        yield (
            {"alpha": 0.0},
            Example(lambda x, y: ops.gated_mlp(x, y, "silu"), (x, x), refusal="no linear layer"),
        )


def _plan(node: fx.Node) -> HadamardPlan | Blocked:
    value: Any = node.meta["val"]
    width = value.shape[-1] if isinstance(value, torch.Tensor) else None
    plan = plan_for(width) if isinstance(width, int) else None
    return plan or Blocked(node, f"no Hadamard matrix mixes {width} channels")
