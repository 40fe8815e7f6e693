"""GPTQ: rounding column by column, each column's error made up for by the columns not yet rounded.

paper: arXiv:2210.17323. For H = sum of x x^T over the calibration data it lowers |X W^T - X W'^T|^2; where
H = I it is rounding to nearest. A group's grid is taken when the group is reached, from its columns as they
are by then.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError, TilewrightError
from tilewright.compiler.paging import give_back_freed, page_out
from tilewright.compiler.quantizers import WHOLE_ROW, Quantized, Quantizer

BLOCK = 128
"""Columns whose errors are carried on together where a row is one group."""
_ATTEMPTS = 4


class HessianError(TilewrightError):
    """A Hessian that cannot be factored, however much it is damped."""


def gptq(quantizer: Quantizer, weight: Tensor, hessian: Tensor, *, damping: float = 0.01) -> Quantized:
    """Codes and grids of a weight [N, K] for inputs with the second moments `hessian` [K, K], of any scale.

    damping: share of the mean diagonal that is added to it, tenfold after each failed factorisation.
    Inputs that never occurred (a zero on the diagonal) count as their weight being zero. A Hessian that a
    file holds leaves memory.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise OptionError(f"the Hessian is {list(hessian.shape)}, the weight has {columns} columns")
    if not 0.0 < damping <= 1.0:
        raise OptionError(f"damping = {damping}: expected above 0, at most 1")
    left = weight.float().clone()
    dead = hessian.diagonal() == 0
    left[:, dead] = 0.0
    give_back_freed()  # what making the weight took: the matrices that follow are larger
    factor = _inverse_factor(hessian.double(), dead, damping).to(left)
    give_back_freed()
    width = quantizer.group or BLOCK
    grid = quantizer.grid(left) if quantizer.group == WHOLE_ROW else None
    row = Quantizer(
        quantizer.bits,
        quantizer.kind,
        narrow=quantizer.narrow,
        clip=quantizer.clip,
        storage=quantizer.storage,
    )
    codes, scales, offsets = torch.empty_like(left, dtype=torch.uint8), list[Tensor](), list[Tensor]()
    for first in range(0, columns, width):
        last = min(first + width, columns)
        scale, offset = grid if grid is not None else row.grid(left[:, first:last])
        errors = torch.empty_like(left[:, first:last])
        for k in range(first, last):
            found = row.encode(left[:, k : k + 1], scale, offset)
            codes[:, k] = found.codes[:, 0]
            error = (left[:, k] - found.dequantize()[:, 0]) / factor[k, k]
            left[:, k:last] -= error[:, None] * factor[k, k:last]
            errors[:, k - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
        scales.append(scale)
        offsets.append(offset)
    if grid is not None:
        return Quantized(codes, *grid, quantizer.group)
    return Quantized(codes, torch.cat(scales, 1), torch.cat(offsets, 1), quantizer.group)


def _inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, float64 [K, K]."""
    if not bool(torch.isfinite(hessian).all()):
        raise HessianError("the Hessian holds NaN or infinite values")
    diagonal = hessian.diagonal().clone()
    diagonal[dead] = 1.0
    for attempt in range(_ATTEMPTS):
        damped = hessian.clone()
        page_out(hessian)
        damped.diagonal().copy_(diagonal + damping * 10**attempt * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # few matrices of this size at once
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            del lower
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return cast(Tensor, factor)
    worst = damping * 10 ** (_ATTEMPTS - 1)
    raise HessianError(
        f"the Hessian is not positive definite, even with {worst:g} of its mean diagonal added",
        remedy="calibrate on more data",
    )
