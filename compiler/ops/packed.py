"""Attention over a paged pool whose rows are codes of 8 or 4 bits, and what writes such a pool.

paper: arXiv:2404.00456 (QuaRot, section 4.2). Pools, tables and lengths are those of
`tilewright.compiler.ops.paged`, but a row of D channels is uint8 [W], W = D bits / 8 + 8 D / group: its
codes, then a float32 scale and offset for every `group` channels (0: all D), channel ~ scale code + offset as
of the `asymmetric` map of `tilewright.compiler.quantizers`. At 4 bits byte i of a group's codes holds channel
i of the group in its low half and channel i + group / 2 in its high half.

A row stands for exactly what `kv_round` makes of it in float32, so that a packed cache and a rounded one
differ by the order of sums alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.ops.paged import attend, check_index, fail, flops, held, wide, written
from tilewright.compiler.ops.registry import define
from tilewright.compiler.quantizers import Quantizer

NUMBERS = 8
"""Bytes of the scale and offset of a group."""


def packed_width(size: int, bits: int, group: int) -> int:
    """Bytes of a row of `size` channels. ValueError where bits and group have no such row."""
    share = group or size
    if bits not in (4, 8):
        fail("packed rows", f"bits = {bits}: expected 8 or 4")
    if group < 0 or size < 1 or size % share or share * bits % 8:
        fail(
            "packed rows",
            f"group = {group}: expected 0 or a divisor of the {size} channels of a head"
            f"{', an even number of them' if bits == 4 else ''}",
        )
    return size * bits // 8 + size // share * NUMBERS


def packed_size(width: int, bits: int, group: int) -> int:
    """Channels of a row of `width` bytes. ValueError where there is no such row."""
    size = (width - NUMBERS) * 8 // bits if not group else width * 8 * group // (group * bits + 8 * NUMBERS)
    if size < 1 or size % (group or size) or packed_width(size, bits, group) != width:
        fail("packed rows", f"no row of bits = {bits}, group = {group} has {width} bytes")
    return size


def pack_rows(x: Tensor, bits: int, group: int) -> Tensor:
    """Packed rows uint8 [..., W] of x [..., D]."""
    packed_width(x.shape[-1], bits, group)
    found = Quantizer(bits, "asymmetric", group).quantize(x)
    codes = found.codes
    if bits == 4:
        low, high = codes.unflatten(-1, (-1, 2, (group or x.shape[-1]) // 2)).unbind(-2)
        codes = (low | high << 4).flatten(-2)
    numbers = torch.stack([found.scale, found.offset], -1).flatten(-2)
    return torch.cat([codes, numbers.view(torch.uint8)], -1)


def unpack_rows(rows: Tensor, bits: int, group: int) -> Tensor:
    """What packed rows uint8 [..., W] stand for: float32 [..., D]."""
    size = packed_size(rows.shape[-1], bits, group)
    codes, numbers = rows[..., : size * bits // 8], rows[..., size * bits // 8 :].contiguous()
    if bits == 4:
        codes = codes.unflatten(-1, (-1, (group or size) // 2))
        codes = torch.stack([codes & 15, codes >> 4], -2).flatten(-3)
    scale, offset = numbers.view(torch.float32).unflatten(-1, (-1, 2)).unbind(-1)
    parts = codes.unflatten(-1, (scale.shape[-1], -1))
    found: Tensor = (scale[..., None] * parts.float() + offset[..., None]).flatten(-2)
    return found


def _check(
    op: str, rows: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, bits: int, group: int
) -> int:
    """The channels of a value; ValueError for a pool and rows [B, H, T, D] that do not fit."""
    fits = rows.dim() == k_pages.dim() == v_pages.dim() == 4 and k_pages.shape[:3] == v_pages.shape[:3]
    fits = fits and k_pages.dtype == v_pages.dtype == torch.uint8 and rows.dtype.is_floating_point
    fits = fits and k_pages.shape[1] > 0 and rows.shape[1] % k_pages.shape[1] == 0
    if not fits or k_pages.shape[3] != packed_width(rows.shape[3], bits, group):
        fail(
            op,
            f"rows {list(rows.shape)} {rows.dtype}, k_pages {list(k_pages.shape)}, v_pages "
            f"{list(v_pages.shape)} {k_pages.dtype} must be floating [B, H, T, D] and uint8 [N, Hkv, P, W], "
            f"H a multiple of Hkv, W of bits = {bits} and group = {group}",
        )
    check_index(op, "page_table", table, torch.int32, 2, rows.shape[0])
    return packed_size(v_pages.shape[3], bits, group)


def _fake_append(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    starts: Tensor,
    k: Tensor,
    v: Tensor,
    bits: int,
    group: int,
) -> None:
    value = _check("packed_append", k, k_pages, v_pages, table, bits, group)
    check_index("packed_append", "starts", starts, torch.int64, 1, k.shape[0])
    if k.shape[1] != k_pages.shape[1] or v.shape != (*k.shape[:3], value) or v.dtype != k.dtype:
        fail(
            "packed_append",
            f"k {list(k.shape)}, v {list(v.shape)} must be [B, Hkv, T, D] and [B, Hkv, T, {value}] of one "
            "dtype",
        )


@define(
    "packed_append(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, Tensor starts, Tensor k, "
    "Tensor v, int bits, int group=0) -> ()",
    flops=lambda k_pages, v_pages, page_table, starts, k, v, bits, group=0, *, out: (
        6 * (k.numel() + v.numel())
    ),
    fake=lambda *args: _fake_append(*(*args, 0)[:8]),
)
def packed_append(
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    starts: Tensor,
    k: Tensor,
    v: Tensor,
    bits: int,
    group: int = 0,
) -> None:
    """Round k [B, Hkv, T, D], v [B, Hkv, T, E] and write them at positions starts[b] .. starts[b] + T - 1.

    A group that holds a NaN or an infinity stands for NaNs. ValueError where a position has no page.
    """
    _fake_append(k_pages, v_pages, page_table, starts, k, v, bits, group)
    pages, slots = written("packed_append", page_table, starts, k.shape[2], k_pages.shape[2])
    for pool, x in ((k_pages, k), (v_pages, v)):
        pool[pages, :, slots] = pack_rows(x, bits, group).transpose(1, 2).flatten(0, 1)


def _fake_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    bits: int,
    group: int = 0,
    first: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    value = _check("packed_attention", q, k_pages, v_pages, page_table, bits, group)
    check_index("packed_attention", "lengths", lengths, torch.int64, 1, q.shape[0])
    check_index("packed_attention", "first", first, torch.int64, 1, q.shape[0])
    return q.new_empty((*q.shape[:3], value)), q.new_empty(q.shape[:3], dtype=wide(q))


def _flops(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    bits: int,
    group: int = 0,
    *_: Any,
    **__: Any,
) -> Any:
    """Those of `paged_attention`, and a product and sum for every channel that is restored."""
    keys, value = page_table.shape[-1] * k_pages.shape[2], packed_size(v_pages.shape[3], bits, group)
    restored = q.shape[0] * k_pages.shape[1] * keys * 2 * (q.shape[3] + value)
    return flops(q, keys, value) + restored


@define(
    "packed_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor lengths, int bits, "
    "int group=0, Tensor? first=None, float? scale=None) -> (Tensor, Tensor)",
    flops=_flops,
    fake=_fake_attention,
)
def packed_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    bits: int,
    group: int = 0,
    first: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`paged_attention` of q [B, H, T, D] over a packed pool: (out [B, H, T, E] in the dtype of q, lse)."""
    _fake_attention(q, k_pages, v_pages, page_table, lengths, bits, group, first, scale)
    kept = held(page_table, k_pages.shape[2], lengths, first)[:, None]
    at = page_table.clamp(min=0).long()
    rows = (pages[at].transpose(1, 2).flatten(2, 3) for pages in (k_pages, v_pages))
    k, v = (torch.where(kept[..., None], unpack_rows(x, bits, group), 0).to(wide(q)) for x in rows)
    return attend(q, k, v, kept, lengths, scale)
