"""State between steps inside a program: read a slot, or leave values in slots on the way.

Which request and branch is meant comes from the running call (`runtime.contracts.STATE`), so one compiled
program serves requests that take turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.compiler.ops.registry import define
from tilewright.runtime.contracts import STATE, StateAccess


def _access() -> StateAccess:
    access = STATE.get()
    if access is None:
        raise RuntimeError(
            "this program keeps state between steps and no request is running: call it inside "
            "`with state.call(request, branch, step):`"
        )
    return access


@define(
    "step_state_get(Tensor like, str slot, int layer, SymInt[] shape, ScalarType dtype) -> Tensor",
    flops=lambda *_, out: 0,
    fake=lambda like, slot, layer, shape, dtype: like.new_empty(shape, dtype=dtype),
)
def step_state_get(like: Tensor, slot: str, layer: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The tensor of a slot of this layer, of the given shape and dtype (float64 where `like` is); `like`
    names the device."""
    value: Tensor = _access().get(layer, slot)
    if list(value.shape) != list(shape):
        raise RuntimeError(f"slot {slot!r} of layer {layer} is {list(value.shape)}, expected {list(shape)}")
    return value.clone()


@define(
    "step_state_put(Tensor value, Tensor[] state, str[] slots, int layer) -> Tensor",
    flops=lambda *_, out: 0,
    fake=lambda value, state, slots, layer: torch.empty_like(value),
)
def step_state_put(value: Tensor, state: list[Tensor], slots: list[str], layer: int) -> Tensor:
    """`value`, after the tensors were put into this layer's slots; the copy makes the op's effect depend on
    what is used of it."""
    _access().put(layer, {slot: t.detach().clone() for slot, t in zip(slots, state, strict=True)})
    return value.clone()
