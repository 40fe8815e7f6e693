"""Fold the gain of a normalisation into the linear layers that read it.

W (g * n) = (W diag(g)) n, and for a layer norm W (g * n + b) = (W diag(g)) n + W b. The gain-free norm
then commutes with rotations of the hidden state (QuaRot, arXiv:2404.00456), which is why weight passes want
it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

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
from tilewright.compiler.graph_schema import set_positional
from tilewright.compiler.schema import arguments


@graph_pass("fold-norm-scale", stage=Stage.WEIGHTS, exactness=Exactness.ROUNDING, owns=("linear.scale",))
class FoldNormScale(GraphPass):
    """Move norm gains and offsets into derived weights.

    rewrite:
        linear(rms_norm(x, gain), weight)
     -> linear(rms_norm(x), weight * gain)
    """

    def apply(self, program: Program, log: PassLog) -> None:
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target not in (ops.rms_norm, ops.layer_norm):
                continue
            problem = self._problem(program, node)
            if problem is not None:
                log.refused(node, problem[0], blame=problem[1])
            elif log.take(node):
                self._fold(program, node, log)
        log.finish(("tilewright::rms_norm", "tilewright::layer_norm"))

    @staticmethod
    def _problem(program: Program, norm: fx.Node) -> tuple[str, fx.Node] | None:
        given = arguments(norm)
        gain = given["weight"]
        if gain is None:
            return "it has no gain to fold", norm
        for name in ("weight", "bias"):
            value = given.get(name)
            if value is not None and not program.is_constant(value):
                return f"its {name} {value.name} is computed, not a weight", value
        if norm.target is ops.layer_norm and len(given["normalized_shape"]) != 1:
            return f"it normalises {len(given['normalized_shape'])} axes, a linear reads one", norm
        for user in norm.users:
            if user.target is not ops.linear or arguments(user)["x"] is not norm:
                return f"{user.name} reads it and is not a linear layer", user
            weight, bias = arguments(user)["weight"], arguments(user)["bias"]
            if not program.is_constant(weight) or (bias is not None and not program.is_constant(bias)):
                return f"the weight of {user.name} is computed, not a weight", user
            others = [u for u in weight.users if u is not user]
            if others:
                return f"the weight of {user.name} is tied: {others[0].name} reads it too", others[0]
        return None

    def _fold(self, program: Program, norm: fx.Node, log: PassLog) -> None:
        given = arguments(norm)
        gain, offset = given["weight"], float(given.get("offset", 0.0))
        shift = given.get("bias")
        users = list(norm.users)
        log.applied(norm, removed=[], inserted=users)
        for user in users:
            weight, bias = arguments(user)["weight"], arguments(user)["bias"]
            name = f"{program.path_of(weight)} * norm gain"
            folded = program.derive(name, (weight, gain), partial(_scaled, offset=offset), like=weight)
            moved = bias
            if shift is not None:
                sources = (weight, shift) if bias is None else (weight, shift, bias)
                moved = program.derive(f"{program.path_of(weight)} @ norm bias", sources, _shifted)
            user.args = (norm, folded, moved)
            user.kwargs = {}
            set_positional(user)
            user.meta["rewritten_by"] = (*user.meta.get("rewritten_by", ()), self.name)
        log.claim_slots(users, {u: u for u in users})
        if norm.target is ops.rms_norm:
            norm.args = (given["x"], None, given["eps"])
        else:
            norm.args = (given["x"], given["normalized_shape"], None, None, given["eps"])
        norm.kwargs = {}
        set_positional(norm)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, w = Tensor(2, 5, 12), Tensor(7, 12, weight=True)
        g, b = Tensor(12, weight=True), Tensor(12, weight=True)
        yield {}, Example(lambda x, g, w: ops.linear(ops.rms_norm(x, g, 1e-6), w), (x, g, w))
        yield {}, Example(lambda x, g, w: ops.linear(ops.rms_norm(x, g, 1e-6, 1.0), w), (x, g, w))
        yield (
            {},
            Example(
                lambda x, g, b, w, c: ops.linear(ops.layer_norm(x, [12], g, b), w, c),
                (x, g, b, w, Tensor(7, weight=True)),
            ),
        )
        yield {}, Example(lambda x, g, b, w: ops.linear(ops.layer_norm(x, [12], g, b), w), (x, g, b, w))
        yield {}, Example(lambda x, w: ops.linear(ops.rms_norm(x, None, 1e-6), w), (x, w), refusal="no gain")
        yield {}, Example(lambda x, g: ops.rms_norm(x, g, 1e-6) * 2, (x, g), refusal="not a linear")
        yield (
            {},
            Example(
                lambda x, g, w: ops.linear(ops.rms_norm(x, g * 2, 1e-6), w), (x, g, w), refusal="computed"
            ),
        )
        yield (
            {},
            Example(
                lambda x, g, w: ops.linear(ops.rms_norm(x, g, 1e-6), w * 2),
                (x, g, w),
                refusal="is computed, not",
            ),
        )
        tied = Example(lambda x, g, w: (ops.linear(ops.rms_norm(x, g, 1e-6), w), w.sum()), (x, g, w))
        yield {}, Example(tied.model, tied.inputs, refusal="tied")
        square = Tensor(5, 12, weight=True)
        yield (
            {},
            Example(
                lambda x, s, w: ops.linear(ops.layer_norm(x, [5, 12], s), w), (x, square, w), refusal="2 axes"
            ),
        )


def _scaled(weight: torch.Tensor, gain: torch.Tensor, *, offset: float) -> torch.Tensor:
    """W diag(g + offset), multiplied in float64 and rounded once."""
    return (weight.double() * (gain.double() + offset)).to(weight.dtype)


def _shifted(weight: torch.Tensor, shift: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    moved = weight.double() @ shift.double()
    return (moved if bias is None else moved + bias.double()).to(weight.dtype)
