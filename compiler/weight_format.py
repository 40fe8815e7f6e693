"""How a quantized weight lies in memory: one frozen descriptor, packing and its inverse.

A packed weight is one uint8 matrix that holds codes, scales and offsets together.

`blocks8` (CPU): 8 rows side by side, so that a vector holds one value of each and scales apply without a sum
across lanes. A row of the matrix is a block of 8 weight rows; group by group it holds chunks of 32 columns,
then the 8 scales, then the 8 offsets. Byte r*4 + b of vector j of a chunk belongs to row r and column 4j + b.
Codes of less than 8 bits share the bytes of a stored vector: int4 two vectors (low, high nibble), int2 four,
int3 as int2 and a further vector with the third bit of vector j in bit j. 8-bit codes are stored as signed.

`rows` (GPU): a row of the matrix is a weight row: its codes in column order, low bits first, then its scales,
then its offsets. int3 has the low two bits of all columns, then the third bits.

With `int8-static` activations the matrix has one more row, which starts with their step in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.quantizers import (
    ACTIVATIONS,
    WHOLE_ROW,
    Activation,
    Quantized,
    Quantizer,
    groups,
)

Mode = Literal["symmetric", "float-zero"]
Packing = Literal["blocks8", "rows"]
Grid = Literal["short", "wide"]
BITS = (2, 3, 4, 8)
CHUNK = 32
"""Columns that are packed together; groups are whole numbers of them."""
BLOCK_ROWS = 8
_CHOICES = {
    "mode": get_args(Mode),
    "activation": ACTIVATIONS,
    "packing": get_args(Packing),
    "grid": get_args(Grid),
}


@dataclass(frozen=True)
class WeightFormat:
    """One format of a quantized weight and of the activations it meets. OptionError for an impossible one."""

    bits: int = 4
    group: int = 32
    """Columns per scale, a multiple of 32; 0: one scale per row."""
    mode: Mode = "symmetric"
    activation: Activation = "none"
    packing: Packing = "blocks8"
    grid: Grid = "short"
    """`wide`: the scales of groups are float32 as well, for files whose grids float16 does not hold."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"bits = {self.bits}: expected one of {', '.join(map(str, BITS))}")
        if self.group < 0 or self.group % CHUNK:
            raise OptionError(f"group = {self.group}: expected a multiple of {CHUNK}, or 0 for a whole row")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise OptionError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if self.grid == "wide" and self.group == WHOLE_ROW:
            raise OptionError("grid = 'wide': the scales of whole rows are float32 already")
        if self.activation == "int8-group" and self.group == WHOLE_ROW:
            raise OptionError("activation = 'int8-group': the weight has no groups", remedy="use int8-token")

    @property
    def text(self) -> str:
        """`int4.32.float-zero.int8-group.blocks8`: what the semantic op carries; `parse` reads it. A format
        with wide grids ends in `.wide`."""
        text = f"int{self.bits}.{self.group}.{self.mode}.{self.activation}.{self.packing}"
        return text if self.grid == "short" else f"{text}.{self.grid}"

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """The format of a text; OptionError for any other text."""
        parts = text.split(".")
        if not len(fields(cls)) - 1 <= len(parts) <= len(fields(cls)) or not parts[0].startswith("int"):
            raise OptionError(f"weight format {text!r}: expected int4.32.symmetric.none.blocks8 or the like")
        try:
            bits, group = int(parts[0][3:]), int(parts[1])
        except ValueError:
            raise OptionError(f"weight format {text!r}: bits and group must be whole numbers") from None
        return cls(bits, group, *parts[2:])  # type: ignore[arg-type]

    @property
    def scale_dtype(self) -> torch.dtype:
        """float16 for groups, as GGUF has it; float32 for one scale per row and for wide grids."""
        return torch.float32 if self.group == WHOLE_ROW or self.grid == "wide" else torch.float16

    @property
    def has_offset(self) -> bool:
        return self.mode == "float-zero"

    @property
    def has_step(self) -> bool:
        """The packed matrix holds the step of the activations."""
        return self.activation == "int8-static"

    @property
    def middle(self) -> int:
        """The code of zero in the symmetric mode."""
        return 1 << (self.bits - 1)

    def quantizer(self) -> Quantizer:
        """Rounding to nearest onto this format's grids."""
        narrow = self.bits == 8 and self.mode == "symmetric"
        return Quantizer(self.bits, self.mode, self.group, narrow=narrow, storage=self.scale_dtype)

    def chunks(self, columns: int) -> list[int]:
        """Chunks of 32 columns in each group of a row."""
        if self.group == WHOLE_ROW:
            return [-(-columns // CHUNK)]
        whole, rest = divmod(columns, self.group)
        return [self.group // CHUNK] * whole + ([-(-rest // CHUNK)] if rest else [])

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the packed uint8 matrix of a weight [rows, columns]."""
        per_row: int = CHUNK * self.bits // 8 * sum(self.chunks(columns))
        per_row += groups(columns, self.group) * self.scale_dtype.itemsize * (2 if self.has_offset else 1)
        last = 1 if self.has_step else 0
        if self.packing == "rows":
            return rows + last, -(-per_row // 4) * 4
        return -(-rows // BLOCK_ROWS) + last, BLOCK_ROWS * per_row

    def pack(self, weight: Quantized) -> Tensor:
        """Pack codes [N, K] with scale and offset [N, G] of this format's grid -> uint8 of `shape(N, K)`, but
        for the row of the step, which `with_step` adds."""
        rows, columns = weight.codes.shape
        if weight.group != self.group:
            raise OptionError(f"group = {weight.group}: the format has {self.group}")
        parameters = [weight.scale] + ([weight.offset] if self.has_offset else [])
        for part in parameters:
            if not torch.equal(part.to(self.scale_dtype).float(), part.float()):
                raise OptionError(f"scales or offsets do not fit {self.scale_dtype}")
        if self.packing == "rows":
            return self._pack_rows(weight.codes, parameters)
        pad, parts = -rows % BLOCK_ROWS, []
        codes = F.pad(weight.codes, (0, 0, 0, pad))
        grids = [F.pad(p, (0, 0, 0, pad)).to(self.scale_dtype) for p in parameters]
        at = index = 0
        for count, chunks in self._runs(columns):
            width = count * chunks * CHUNK
            empty = self.middle if self.bits == 8 else 0  # stored as zero
            run = F.pad(codes[:, at : at + width], (0, max(0, at + width - columns)), value=empty)
            # [block, 8 rows, group, chunk, vector, 4 columns] -> [block, group, chunk, vector, row x column]
            run = run.reshape(-1, BLOCK_ROWS, count, chunks, 8, 4).permute(0, 2, 3, 4, 1, 5).flatten(4)
            fields = [_join_codes(run, self.bits).flatten(2)]
            for grid in grids:
                column = grid[:, index : index + count].reshape(-1, BLOCK_ROWS, count).transpose(1, 2)
                fields.append(column.contiguous().view(torch.uint8))
            parts.append(torch.cat(fields, 2).flatten(1))
            at, index = at + width, index + count
        return torch.cat(parts, 1).contiguous()

    def with_step(self, packed: Tensor, step: float) -> Tensor:
        """What `pack` made, and the step of the activations behind it. OptionError for an impossible step."""
        if not self.has_step:
            raise OptionError(f"{self.activation} activations have no step")
        if not 0.0 < step < float("inf"):
            raise OptionError(f"step = {step!r}: expected a finite number above 0")
        last = packed.new_zeros(1, packed.shape[1])
        last[0, :4] = torch.tensor([step], dtype=torch.float32).view(torch.uint8).to(packed.device)
        return torch.cat((packed, last))

    def step_of(self, packed: Tensor) -> float:
        """The step of the activations that a packed weight holds."""
        return float(packed[-1, :4].clone().view(torch.float32))

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Quantized:
        """The inverse of `pack`."""
        if self.packing == "rows":
            return self._unpack_rows(packed, rows, columns)
        codes = list[Tensor]()
        grids: list[list[Tensor]] = [[] for _ in range(2 if self.has_offset else 1)]
        at, size = 0, BLOCK_ROWS * self.scale_dtype.itemsize
        for count, chunks in self._runs(columns):
            width = chunks * CHUNK * self.bits
            run = packed[:, at : at + count * (width + size * len(grids))].unflatten(1, (count, -1))
            stored = run[..., :width].unflatten(2, (chunks, self.bits, CHUNK))
            # [block, group, chunk, vector, 8 rows, 4 columns] -> [rows, columns]
            split = _split_codes(stored, self.bits).unflatten(-1, (BLOCK_ROWS, 4)).permute(0, 4, 1, 2, 3, 5)
            codes.append(split.flatten(2).flatten(0, 1))
            for i, grid in enumerate(grids):
                column = run[..., width + i * size : width + (i + 1) * size].contiguous()
                grid.append(column.view(self.scale_dtype).transpose(1, 2).flatten(0, 1))
            at += count * (width + size * len(grids))
        found = [torch.cat(grid, 1)[:rows].float() for grid in grids]
        offset = found[1] if self.has_offset else -self.middle * found[0]
        return Quantized(torch.cat(codes, 1)[:rows, :columns], found[0], offset, self.group)

    def dequantize(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """float32 [rows, columns]: the meaning of a packed weight."""
        return self.unpack(packed, rows, columns).dequantize()

    def pack_weight(self, weight: Tensor) -> Tensor:
        """A weight [N, K] of any floating dtype, rounded to nearest and packed, without a step."""
        return self.pack(self.quantizer().quantize(weight.float()))

    def round_weight(self, weight: Tensor) -> Tensor:
        """float32 [N, K]: the weight as its packed form means it."""
        return self.quantizer().quantize(weight.float()).dequantize()

    def problem(self, columns: int) -> str | None:
        """Why a weight of so many columns cannot have this format, or None."""
        if self.group > columns:
            return f"has {columns} columns, fewer than a group of {self.group}"
        return None

    def _runs(self, columns: int) -> list[tuple[int, int]]:
        """(groups, chunks of each) in order: the whole groups of a row, then the short one."""
        chunks = self.chunks(columns)
        whole = chunks.count(chunks[0])
        return [(whole, chunks[0])] + [(1, c) for c in chunks[whole:]]

    def _pack_rows(self, codes: Tensor, parameters: list[Tensor]) -> Tensor:
        rows, columns = codes.shape
        padded = F.pad(codes, (0, sum(self.chunks(columns)) * CHUNK - columns))
        planes = [(padded & 3, 2), (padded >> 2, 1)] if self.bits == 3 else [(padded, self.bits)]
        parts = []
        for plane, bits in planes:
            fields_ = plane.unflatten(1, (-1, 8 // bits))
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
            parts.append((fields_ << shifts).sum(-1, dtype=torch.uint8))
        parts += [p.to(self.scale_dtype).contiguous().view(torch.uint8) for p in parameters]
        packed = torch.cat(parts, 1)
        return F.pad(packed, (0, self.shape(rows, columns)[1] - packed.shape[1])).contiguous()

    def _unpack_rows(self, packed: Tensor, rows: int, columns: int) -> Quantized:
        wide, at, codes = sum(self.chunks(columns)) * CHUNK, 0, None
        for bits, shift in [(2, 0), (1, 2)] if self.bits == 3 else [(self.bits, 0)]:
            part = packed[:rows, at : at + wide * bits // 8]
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
            plane = ((part.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1) << shift
            codes = plane if codes is None else codes | plane
            at += wide * bits // 8
        count, size = groups(columns, self.group), self.scale_dtype.itemsize
        found = []
        for _ in range(2 if self.has_offset else 1):
            part = packed[:rows, at : at + count * size].contiguous()
            found.append(part.view(self.scale_dtype).float())
            at += count * size
        assert codes is not None, "there is at least one plane"
        offset = found[1] if self.has_offset else -self.middle * found[0]
        return Quantized(codes[:, :columns], found[0], offset, self.group)


def _join_codes(codes: Tensor, bits: int) -> Tensor:
    """[..., 8 vectors, 32] codes -> [..., `bits` stored vectors, 32]."""
    if bits == 8:
        return codes ^ 128
    if bits == 4:
        return codes[..., 0::2, :] | codes[..., 1::2, :] << 4
    low = codes & 3
    pairs = torch.stack([low[..., i : i + 4, :] for i in (0, 4)], -3)  # [..., 2, 4 of them, 32]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)[:, None]
    stored = (pairs << shifts).sum(-2, dtype=torch.uint8)
    if bits == 2:
        return stored
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)[:, None]
    high = ((codes >> 2) << shifts).sum(-2, dtype=torch.uint8)
    return torch.cat((stored, high[..., None, :]), -2)


def _split_codes(stored: Tensor, bits: int) -> Tensor:
    """The inverse of `_join_codes`."""
    if bits == 8:
        return stored ^ 128
    if bits == 4:
        return torch.stack((stored & 15, stored >> 4), -2).flatten(-3, -2)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=stored.device)[:, None]
    codes = ((stored[..., :2, None, :] >> shifts) & 3).flatten(-3, -2)
    if bits == 2:
        return codes
    shifts = torch.arange(8, dtype=torch.uint8, device=stored.device)[:, None]
    return codes | ((stored[..., 2:3, :] >> shifts) & 1) << 2


__all__ = ["BITS", "BLOCK_ROWS", "CHUNK", "Mode", "Packing", "WeightFormat"]
