"""Terms that several match passes share: optional casts, halves of the last axis, numbers behind constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilewright.compiler import Match, Program, either

aten = torch.ops.aten
F32 = torch.float32


def maybe_cast(choice, x, dtype):
    """`x` or `x` cast to `dtype` (a parameter or a dtype); `choice` binds "cast" or "none"."""
    return either(choice, cast=aten.to.dtype(x, dtype), none=x)


def scalar(program: Program | None, value: Any) -> int | float | None:
    """The number a pattern value stands for: itself, `full([], n)`, `scalar_tensor(n)` or a 0-d constant; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, fx.Node):
        return None
    if value.target in (aten.lift_fresh_copy.default, aten.detach.default):
        return scalar(program, value.args[0])
    if value.target is aten.scalar_tensor.default:
        return scalar(program, value.args[0])
    if value.target is aten.full.default and list(value.args[0]) == []:
        return scalar(program, value.args[1])
    if value.op == "get_attr" and program is not None:
        held = program.module._buffers.get(str(value.target))
        if isinstance(held, torch.Tensor) and held.dim() == 0 and not held.is_complex():
            return scalar(program, held.item())
    return None


def last_axis_is(m: Match, dim: Any, name: str) -> bool:
    """True when `dim` counts to the last axis of the tensor bound to `name`."""
    rank = m.val(name).dim()
    return isinstance(dim, int) and dim % rank == rank - 1 if rank else False
