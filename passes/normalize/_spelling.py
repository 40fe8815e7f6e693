"""Terms that several match passes share."""

from __future__ import annotations

import torch

from tilewright.compiler import either

aten = torch.ops.aten
F32 = torch.float32


def maybe_cast(choice, x, dtype):
    """`x` or `x` cast to `dtype` (a parameter or a dtype); `choice` binds "cast" or "none"."""
    return either(choice, cast=aten.to.dtype(x, dtype), none=x)
