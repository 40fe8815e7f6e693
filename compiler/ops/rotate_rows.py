"""Keys that carry a rotary embedding, turned to other positions: all rows at once, also out of a paged pool.

A rotary embedding is a rotation whose angles grow with the position, so that a key stored at position p
becomes that of position p + offset by the rotation of the offset alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewright.compiler.ops.paged import check_index, fail, wide
from tilewright.compiler.ops.registry import define
from tilewright.compiler.ops.rope import rope


def _fake(
    rows: Tensor,
    offsets: Tensor,
    pace: Tensor,
    page_table: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    if rows.dim() != 4 or not rows.dtype.is_floating_point:
        fail("rotate_rows", f"rows {list(rows.shape)} {rows.dtype} must be floating of 4 axes")
    if pace.dim() != 1 or pace.dtype != torch.float32 or not 1 <= pace.shape[0] <= rows.shape[3] // 2:
        fail(
            "rotate_rows",
            f"pace {list(pace.shape)} {pace.dtype} must be float32 [R / 2] with R = 2 to {rows.shape[3]}",
        )
    batch, heads, size, width = rows.shape
    if page_table is not None:
        check_index("rotate_rows", "page_table", page_table, torch.int32, 2, page_table.shape[0])
        batch, size = page_table.shape[0], page_table.shape[1] * size
    fits = offsets.dim() == 3 and offsets.dtype == torch.int64
    fits = fits and offsets.shape[0] in (1, batch) and offsets.shape[1] in (1, heads)
    if not fits or (size % offsets.shape[2] if offsets.shape[2] else size):
        fail(
            "rotate_rows",
            f"offsets {list(offsets.shape)} {offsets.dtype} must be int64 [1 or {batch}, 1 or {heads}, L] "
            f"with L a divisor of the {size} rows",
        )
    return rows.new_empty((batch, heads, size, width))


@define(
    "rotate_rows(Tensor rows, Tensor offsets, Tensor pace, Tensor? page_table=None, "
    "bool interleaved=False) -> Tensor",
    flops=lambda rows, *_, out, **__: 3 * math.prod(out.shape),
    fake=_fake,
)
def rotate_rows(
    rows: Tensor,
    offsets: Tensor,
    pace: Tensor,
    page_table: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rows [B, Hkv, S, D], each turned by `offset` positions; a new tensor in their dtype.

    With `page_table` int32 [B, n] the rows are a pool [N, Hkv, P, D], of which those that the table names are
    read: S = n P, and 0 where it has -1. `offsets` int64 [1 or B, 1 or Hkv, L] serve S / L rows that follow
    one another each: L = S a row each, L = n a page each, L = 1 all rows. An offset may be negative; one of 0
    leaves a row as it is. `pace` float32 [R / 2], as models hold it, are the radians by which a position
    turns pair i of the first R channels; the others stay. Pairs are those of `rope`. Angles are computed in
    float64, the rotation in at least float32, and rounded once. ValueError for arguments that do not fit.
    """
    batch, heads, size, width = _fake(rows, offsets, pace, page_table, interleaved).shape
    if page_table is not None:
        held = (page_table >= 0)[:, None, :, None, None]
        pages = rows[page_table.clamp(min=0).long()].transpose(1, 2)
        rows = torch.where(held, pages, 0).flatten(2, 3)
    angle = offsets.repeat_interleave(size // max(1, offsets.shape[2]), 2).double()[..., None] * pace.double()
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    cos, sin = (f(angle).to(wide(rows)) for f in (torch.cos, torch.sin))
    turned, rest = rows.tensor_split([2 * pace.shape[0]], -1)
    turned = rope.definition(turned.to(wide(rows)), cos, sin, interleaved).to(rows.dtype)
    return torch.cat([turned, rest], -1)
