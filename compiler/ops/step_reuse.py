"""A stretch of residual blocks whose result may be reused from an earlier step.

`begin` stands before the stretch and asks `runtime.contracts.REUSE`; `end` stands behind it and either adds
the kept residual to the stretch's entry or keeps a new one. Whether what lies between is left out when its
result is not wanted is for lowering to say: the meaning does not depend on it.

A stretch of coupled streams has one gate, at the stream that leads; `end_beside` stands behind it on each of
the others, and goes by what was decided for the leading one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.compiler.ops.measured_copy import measured_copy
from tilewright.compiler.ops.registry import define
from tilewright.runtime.contracts import REUSE, Measure


def enter(entry: Tensor, probe: Tensor, gate: int, measure: Measure = measured_copy.definition) -> Tensor:
    """`entry` itself, after the decision for this gate was made from it and `probe`."""
    access = REUSE.get()
    if access is not None:
        access.decide(gate, entry, probe, measure)
    return entry


def leave(
    exit: Tensor, entry: Tensor, measured: Tensor, gate: int, measure: Measure = measured_copy.definition
) -> Tensor:
    """`exit` itself, or `entry` plus the kept residual where that was decided."""
    access = REUSE.get()
    if access is None:
        return exit
    if access.reuses(gate):
        kept: Tensor = access.residual(gate)
        return entry + kept
    access.keep(gate, exit, entry, measured, measure)
    return exit


def leave_beside(exit: Tensor, entry: Tensor, gate: int, stream: int) -> Tensor:
    """As `leave`, for another stream of the stretch."""
    access = REUSE.get()
    if access is None:
        return exit
    if access.reuses(gate):
        kept: Tensor = access.residual_beside(gate, stream, entry)
        return entry + kept
    access.keep_beside(gate, stream, exit, entry)
    return exit


@define(
    "step_reuse_begin(Tensor entry, Tensor probe, int gate) -> Tensor",
    flops=lambda *_, out: 0,
    fake=lambda entry, probe, gate: torch.empty_like(entry),
)
def step_reuse_begin(entry: Tensor, probe: Tensor, gate: int) -> Tensor:
    """A copy of `entry`, after the decision for this gate was made from it and `probe`."""
    return enter(entry, probe, gate).clone()


@define(
    "step_reuse_end(Tensor exit, Tensor entry, Tensor measured, int gate) -> Tensor",
    flops=lambda *_, out: out.numel(),
    fake=lambda exit, entry, measured, gate: torch.empty_like(exit),
)
def step_reuse_end(exit: Tensor, entry: Tensor, measured: Tensor, gate: int) -> Tensor:
    """A copy of `exit`, or `entry` plus the kept residual where that was decided."""
    found = leave(exit, entry, measured, gate)
    return found.clone() if found is exit else found


@define(
    "step_reuse_end_beside(Tensor exit, Tensor entry, int gate, int stream) -> Tensor",
    flops=lambda *_, out: out.numel(),
    fake=lambda exit, entry, gate, stream: torch.empty_like(exit),
)
def step_reuse_end_beside(exit: Tensor, entry: Tensor, gate: int, stream: int) -> Tensor:
    """`step_reuse_end` of stream number 1 or more of a stretch of coupled streams; runs before it."""
    found = leave_beside(exit, entry, gate, stream)
    return found.clone() if found is exit else found
