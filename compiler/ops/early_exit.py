"""A stretch of residual layers that only some tokens still go through.

`begin` and `end` stand around the stretch, `select` behind each of its layers: a token that is not active
keeps its value. So a layer's keys and values of such a token come from the state it left with. Where no token
is active, lowering runs what the layers write and nothing else; the meaning does not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.compiler.ops.registry import define
from tilewright.runtime.contracts import EXITS, STATE


def enter(entry: Tensor, active: Tensor, gate: int, layers: int) -> Tensor:
    """`entry` itself, after whoever counts was told, and state between steps where no token goes on: what the
    layers collect for later steps then may be missing."""
    counting, state = EXITS.get(), STATE.get()
    if counting is not None:
        counting.reached(gate, layers, active)
    if state is not None and not active.any():
        state.left_out()
    return entry


@define(
    "early_exit_begin(Tensor entry, Tensor active, Tensor[] held, int gate, int layers) -> Tensor",
    flops=lambda *_, out: 0,
    fake=lambda entry, active, held, gate, layers: torch.empty_like(entry),
)
def early_exit_begin(entry: Tensor, active: Tensor, held: list[Tensor], gate: int, layers: int) -> Tensor:
    """`entry` [B, S, C]. active: bool [B, S]. held: what the layers' writes need beside the entry. layers:
    of the stretch, for whoever counts (`runtime.contracts.EXITS`)."""
    return enter(entry, active, gate, layers).clone()


@define(
    "early_exit_select(Tensor new, Tensor old, Tensor active) -> Tensor",
    flops=lambda *_, out: 0,
)
def early_exit_select(new: Tensor, old: Tensor, active: Tensor) -> Tensor:
    """new, old: [B, S, C]; active: bool [B, S]. `old` where a token is not active."""
    return torch.where(active.unsqueeze(-1), new, old)


@define(
    "early_exit_end(Tensor exit, Tensor entry, Tensor active, int gate) -> Tensor",
    flops=lambda *_, out: 0,
    fake=lambda exit, entry, active, gate: torch.empty_like(entry),
)
def early_exit_end(exit: Tensor, entry: Tensor, active: Tensor, gate: int) -> Tensor:
    """As `early_exit_select` of `exit` and `entry`: `exit` is not read where no token is active."""
    return torch.where(active.unsqueeze(-1), exit, entry)
