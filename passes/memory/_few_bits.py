"""Keys and values as codes of few bits in the layout of KIVI: what spec-cache-kv is made of.

A key shares its scale with the same channel of the tokens beside it, a value with the channels beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilewright.compiler.quantizers import Quantizer


class Codes(NamedTuple):
    """Groups of g numbers: number ~ scale code + offset."""

    packed: Tensor
    """uint8 [..., w], w = g bits / 8: from its low bits on byte i holds the codes of numbers i, i + w, ..."""
    numbers: Tensor
    """float16 [..., 2]: the scale and the offset of each group."""


def encoded(x: Tensor, bits: int) -> Codes:
    """Codes of groups x [..., g].

    bits: 8, 4, 2, or 1, whose two levels are the quartiles of the range instead of its ends."""
    if bits == 1:
        low, high = torch.aminmax(x.float(), dim=-1)
        scale, offset = ((high - low) / 2).half(), ((3 * low + high) / 4).half()
        scale = torch.where(scale > 0, scale, 1.0)
        codes = torch.round((x.float() - offset[..., None].float()) / scale[..., None].float())
        codes = codes.clamp(0, 1).to(torch.uint8)
    else:
        found = Quantizer(bits, "float-zero", storage=torch.float16).quantize(x)
        codes, scale, offset = found.codes, found.scale[..., 0], found.offset[..., 0]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
    packed = (codes.unflatten(-1, (len(shifts), -1)) << shifts[:, None]).sum(-2, dtype=torch.uint8)
    return Codes(packed, torch.stack([scale, offset], -1).half())


def decoded(codes: Codes, bits: int) -> Tensor:
    """float32 [..., g]: what codes stand for."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.packed.device)
    values = (codes.packed[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)
    scale, offset = codes.numbers.float().unbind(-1)
    found: Tensor = scale[..., None] * values.flatten(-2).float() + offset[..., None]
    return found


def key_groups(k: Tensor, group: int) -> Tensor:
    """[..., S / group, D, group] of keys [..., S, D]."""
    found: Tensor = k.unflatten(-2, (-1, group)).transpose(-1, -2)
    return found


def value_groups(v: Tensor, group: int) -> Tensor:
    """[..., S, E / group, group] of values [..., S, E]."""
    found: Tensor = v.unflatten(-1, (-1, group))
    return found


def near_keys(codes: Codes, bits: int) -> Tensor:
    """float32 [..., S, D] of the codes of `key_groups`."""
    return decoded(codes, bits).transpose(-1, -2).flatten(-3, -2)


def near_values(codes: Codes, bits: int) -> Tensor:
    """float32 [..., S, E] of the codes of `value_groups`."""
    return decoded(codes, bits).flatten(-2)


def rounded(x: Tensor, bits: int) -> Tensor:
    """Groups x [..., g] as their codes would give them, by the formulas: what the pass is held to."""
    x, levels = x.float(), 2**bits - 1
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    step, start = (high - low) / levels, low
    if bits == 1:
        step, start = (high - low) / 2, (3 * low + high) / 4
    step, start = step.half().float(), start.half().float()
    step = step + (step == 0).float()
    found: Tensor = torch.round((x - start) / step).clamp(0, levels) * step + start
    return found
