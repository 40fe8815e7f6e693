"""Keys and values as codes of few bits in the layout of KIVI: what spec-cache-kv is made of.

A key shares its scale with the same channel of the tokens beside it, a value with the channels beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.compiler.quantizers import Quantizer


class Codes(NamedTuple):
    """Groups of g numbers: number ~ scale code + offset."""

    packed: Tensor
    """uint8 [..., S, D bits / 8]: the codes, those of a row side by side, the first in the lowest bits."""
    numbers: Tensor
    """float16 [..., 2]: the scale and the offset of each group."""


def encoded_keys(k: Tensor, group: int, bits: int) -> Codes:
    """Codes of keys [..., S, D], with numbers [..., S / group, D, 2]; bits: 8, 4, 2 or 1."""
    codes, numbers = _encoded(k.unflatten(-2, (-1, group)).transpose(-1, -2), bits)
    return Codes(_packed(codes.transpose(-1, -2).flatten(-3, -2), bits), numbers)


def encoded_values(v: Tensor, group: int, bits: int) -> Codes:
    """Codes of values [..., S, E], with numbers [..., S, E / group, 2]; bits: 8, 4, 2 or 1."""
    codes, numbers = _encoded(v.unflatten(-1, (-1, group)), bits)
    return Codes(_packed(codes.flatten(-2), bits), numbers)


def near_keys(codes: Codes, bits: int) -> Tensor:
    """float32 [..., S, D]: what codes of keys stand for."""
    scale, offset = codes.numbers.float().unbind(-1)
    values = _unpacked(codes.packed, bits).unflatten(-2, (scale.shape[-2], -1))
    return torch.addcmul(offset[..., None, :], values, scale[..., None, :]).flatten(-3, -2)


def near_values(codes: Codes, bits: int) -> Tensor:
    """float32 [..., S, E]: what codes of values stand for."""
    scale, offset = codes.numbers.float().unbind(-1)
    values = _unpacked(codes.packed, bits).unflatten(-1, (scale.shape[-1], -1))
    return torch.addcmul(offset[..., None], values, scale[..., None]).flatten(-2)


def _encoded(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(uint8 [..., g], float16 [..., 2]) of groups x [..., g]. The levels of 1 bit are the quartiles of the
    range, instead of its ends."""
    if bits == 1:
        low, high = torch.aminmax(x.float(), dim=-1)
        scale, offset = ((high - low) / 2).half(), ((3 * low + high) / 4).half()
        scale = torch.where(scale > 0, scale, 1.0)
        codes = torch.round((x.float() - offset[..., None].float()) / scale[..., None].float())
        codes = codes.clamp(0, 1).to(torch.uint8)
    else:
        found = Quantizer(bits, "float-zero", storage=torch.float16).quantize(x)
        codes, scale, offset = found.codes, found.scale[..., 0], found.offset[..., 0]
    return codes, torch.stack([scale, offset], -1).half()


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _packed(codes: Tensor, bits: int) -> Tensor:
    shifts = _shifts(bits, codes.device)
    found: Tensor = (codes.unflatten(-1, (-1, len(shifts))) << shifts).sum(-1, dtype=torch.uint8)
    return found


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """float32 [..., n]: a table of what each byte holds is faster than shifts."""
    every = torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None]
    table = ((every >> _shifts(bits, packed.device)) & ((1 << bits) - 1)).float()
    found: Tensor = functional.embedding(packed.int(), table).flatten(-2)
    return found


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
