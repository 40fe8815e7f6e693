"""The Hadamard transform along the last axis: the online half of a rotation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.hadamard import transform
from tilewright.compiler.ops.registry import define


def _flops(
    x: Any, block: int, base: Any = None, signs: Any = None, inverse: bool = False, *, out: Any
) -> Any:
    order = 1 if base is None else int(base.shape[0])
    additions = order + int(math.log2(block // order))
    return math.prod(x.shape) * (additions + 1 + (signs is not None))


@define(
    "hadamard(Tensor x, int block, Tensor? base=None, Tensor? signs=None, bool inverse=False) -> Tensor",
    flops=_flops,
)
def hadamard(
    x: Tensor, block: int, base: Tensor | None = None, signs: Tensor | None = None, inverse: bool = False
) -> Tensor:
    """x diag(signs) (base x Sylvester) / sqrt(block) along the last axis, or its inverse.

    x [..., D], `block` divides D and is K times a power of two, base [K, K] of +1 and -1 (None for K = 1),
    signs [D]. Computed in float32 (float64 for float64 input), result in the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return transform(x.to(wide), block, base, signs, inverse).to(x.dtype)
