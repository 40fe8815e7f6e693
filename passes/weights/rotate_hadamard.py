"""Rotate channels by Hadamard matrices, so that no activation channel stands out when it is quantized.

paper: arXiv:2404.00456 (QuaRot), arXiv:2405.16406 (SpinQuant). R1 turns the residual stream and R2 the value
heads, both in the weights alone; R4 turns the input of the down projections and R3 queries and keys, by a
fast transform at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from tilewright.compiler.basis import Basis, Blocked, find_streams, find_value_heads
from tilewright.compiler.channel_ops import channels
from tilewright.compiler.hadamard import HadamardPlan, plan_for
from tilewright.compiler.inner_rotation import attention_inputs, hidden_readers
from tilewright.compiler.rotation import ROTATED, Rotation, Rotator
from tilewright.compiler.schema import arguments


@graph_pass(
    "rotate-hadamard",
    stage=Stage.WEIGHTS,
    exactness=Exactness.ROUNDING,
    paper="arXiv:2404.00456",
    after=("fold-norm-scale", "smooth-scales", "smooth-rotate"),
    owns=("linear.rotation",),
)
class RotateHadamard(GraphPass):
    """Put orthogonal matrices and their inverses where they cancel.

    rewrite:
        x = x + linear(h, W); y = linear(rms_norm(x), V)
     -> x = x + linear(h, R^T W); y = linear(rms_norm(x), V R)
    """

    r1: bool = True
    """Rotate the residual streams by a random-sign Hadamard matrix; their norms must have no gain left."""
    r2: bool = True
    """Rotate the value heads of each attention."""
    r3: bool = False
    """Rotate queries and keys online; of use where attention or the key cache is quantized."""
    r4: bool = True
    """Rotate the input of the projections behind an activation online."""
    seed: int = 0
    """Seed of the random signs of r1."""
    caches: bool = False
    """Let value caches hold rotated values: then every program that shares them must be compiled alike."""

    def validate(self) -> None:
        if self.seed < 0:
            raise self.option_error("seed", "it must be 0 or more")

    def apply(self, program: Program, log: PassLog) -> None:
        rotator = Rotator(program)
        if self.r1:
            for node, found in find_streams(program):
                self._rotate(node, found, rotator, log, "r1", self.seed)
        if self.r2:
            for node, found in find_value_heads(program, caches=self.caches):
                self._rotate(node, found, rotator, log, "r2", None)
        if self.r4:
            self._rotate_hidden(program, rotator, log)
        if self.r3:
            self._rotate_scores(program, rotator, log)
        rotator.finish()
        log.finish(("residual stream", "tilewright::attention", "tilewright::linear"))

    @staticmethod
    def _rotate(
        node: fx.Node, found: Basis | Blocked, rotator: Rotator, log: PassLog, rule: str, seed: int | None
    ) -> None:
        if isinstance(found, Basis):
            done = next((n for n in found.members if rule in n.meta.get(ROTATED, ())), None)
            found = found if done is None else Blocked(done, f"{done.name} is rotated already")
        plan = _plan(node, found.width) if isinstance(found, Basis) else found
        if isinstance(plan, Blocked):
            log.refused(node, plan.reason, rule=rule, blame=plan.node)
        elif isinstance(found, Basis) and log.take(node):
            rotator.rotate(found, Rotation.of(plan, seed), rule)
            if found.exits or found.entries:
                log.note(
                    f"{rule} at {node.name}: {len(found.entries)} values enter and {len(found.exits)} leave "
                    "the rotated basis at run time (tied tables, constants, results)"
                )
            _record(node, rotator, log, rule)

    @staticmethod
    def _rotate_hidden(program: Program, rotator: Rotator, log: PassLog) -> None:
        for linear in hidden_readers(program):
            x, weight = arguments(linear)["x"], arguments(linear)["weight"]
            plan = _plan(linear, x.meta["val"].shape[-1])
            if not program.is_constant(weight):
                plan = Blocked(weight, "its weight is computed, not a weight")
            if isinstance(plan, Blocked):
                log.refused(linear, plan.reason, rule="r4", blame=plan.node)
            elif log.take(linear):
                turned = rotator.online(x, Rotation.of(plan), "r4")
                rotator.read_rotated(linear, Rotation.of(plan), "r4")
                linear.replace_input_with(x, turned)
                _record(linear, rotator, log, "r4")

    @staticmethod
    def _rotate_scores(program: Program, rotator: Rotator, log: PassLog) -> None:
        for attention in [n for n in program.graph.nodes if n.target is ops.attention]:
            found = attention_inputs(program, attention)
            plan = (
                found if isinstance(found, Blocked) else _plan(attention, channels(found[0][0].meta["val"]))
            )
            if isinstance(plan, Blocked):
                log.refused(attention, plan.reason, rule="r3", blame=plan.node)
            elif not isinstance(found, Blocked) and log.take(attention):
                for value, user in found:
                    user.replace_input_with(value, rotator.online(value, Rotation.of(plan), "r3"))
                _record(attention, rotator, log, "r3")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        only = {"r1": False, "r2": False, "r4": False}
        yield {}, Example(_decoder, _INPUTS, count=3)
        yield {**only, "r1": True, "seed": 3}, Example(_decoder, _INPUTS)
        yield {**only, "r2": True}, Example(_decoder, _INPUTS)
        yield {**only, "r4": True}, Example(_decoder, _INPUTS)
        yield {**only, "r3": True}, Example(_decoder, _INPUTS)
        gain = Tensor(16, weight=True)
        yield {**only, "r1": True}, Example(_decoder, (*_INPUTS, gain), refusal="not folded")
        odd = (Tensor(2, 7), Tensor(4, 7, weight=True))
        yield {}, Example(lambda x, w: ops.linear(x.relu(), w), odd, refusal="no Hadamard matrix mixes 7")
        keys = Tensor(2, 2, 5, 8)
        yield {**only, "r3": True}, Example(ops.attention, (keys, keys, keys), refusal="comes from")


def _decoder(tokens, table, wq, wk, wv, wo, wg, wu, wd, head, gain=None):
    """One decoder layer: 2 heads of 4 channels on 16 channels, 36 hidden ones."""

    def heads(x, weight):
        return ops.linear(x, weight).reshape(2, 5, 2, 4).permute(0, 2, 1, 3)

    x = ops.embedding(table, tokens)
    n = ops.rms_norm(x, gain, 1e-6)
    mixed = ops.attention(heads(n, wq), heads(n, wk), heads(n, wv))
    x = x + ops.linear(mixed.permute(0, 2, 1, 3).reshape(2, 5, 8), wo)
    n = ops.rms_norm(x, None, 1e-6)
    x = x + ops.linear(ops.gated_mlp(ops.linear(n, wg), ops.linear(n, wu), "silu"), wd)
    return ops.linear(ops.rms_norm(x, None, 1e-6), head)


_SHAPES = ((6, 16), (8, 16), (8, 16), (8, 16), (16, 8), (36, 16), (36, 16), (16, 36), (6, 16))
_INPUTS = (Tensor(2, 5, dtype=torch.int64), *(Tensor(*shape, gain=0.5, weight=True) for shape in _SHAPES))


def _plan(node: fx.Node, width: Any) -> HadamardPlan | Blocked:
    plan = plan_for(width) if isinstance(width, int) else None
    return plan or Blocked(node, f"no Hadamard matrix mixes {width} channels")


def _record(node: fx.Node, rotator: Rotator, log: PassLog, rule: str) -> None:
    touched = rotator.take_touched()
    linears = [n for n in touched if n.target is ops.linear]
    log.claim_slots(linears, {n: n for n in linears})
    log.applied(node, rule=rule, inserted=touched)
