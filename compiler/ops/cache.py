"""Writing new keys or values into a preallocated cache, and rounding what is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright.compiler.hadamard import transform
from tilewright.compiler.ops.registry import define
from tilewright.compiler.quantizers import Quantizer


@define(
    "kv_update(Tensor cache, Tensor new, Tensor positions, int dim) -> Tensor",
    flops=lambda cache, new, positions, dim, *, out: 0 * math.prod(new.shape),
)
def kv_update(cache: Tensor, new: Tensor, positions: Tensor, dim: int) -> Tensor:
    """The cache with `new` written at index positions [T] along axis dim; functional, the input is not
    changed."""
    return torch.index_copy(cache, dim, positions, new)


@define(
    "kv_round(Tensor new, int bits, int group, bool rotate=False) -> Tensor",
    flops=lambda new, bits, group, rotate=False, *, out: (
        (6 + (2 * int(math.log2(new.shape[-1])) + 2 if rotate else 0)) * math.prod(new.shape)
    ),
)
def kv_round(new: Tensor, bits: int, group: int, rotate: bool = False) -> Tensor:
    """Keys or values [..., D] after rounding to `bits` bits and back, in their own shape and dtype.

    One scale and one whole zero point for `group` channels of a token and head (0: all D), as of the
    `asymmetric` map of `tilewright.compiler.quantizers`. With `rotate` the rounding happens behind a Hadamard
    transform of the channels, D a power of two. The result is emulated storage: it takes as many bytes as
    `new`.
    """
    quantizer = Quantizer(bits, "asymmetric", group)
    wide = new.float()
    if not rotate:
        return quantizer.fake(wide).to(new.dtype)
    size = new.shape[-1]
    turned = quantizer.fake(transform(wide, size, None, None, False))
    return transform(turned, size, None, None, True).to(new.dtype)
