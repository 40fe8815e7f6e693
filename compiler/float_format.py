"""Weights kept as small floats: fp8 (e4m3, e5m2) and NVFP4, with what every byte of them means.

    fp8-e4m3   w ~ s v            v of 4 exponent and 3 mantissa bits, up to 448; no infinity, 0x7f never made
    fp8-e5m2   w ~ s v            v of 5 and 2 bits, up to 57344; the codes of infinity and NaN never made
    nvfp4      w ~ G (t v)        v in +-{0, .5, 1, 1.5, 2, 3, 4, 6}, t an e4m3 per 16 columns

s is max|w| / max|v| in float32, of a row, of `group` columns of it or of the whole weight. G is
max|w| / (448 * 6) of the whole weight and t = e4m3(max|w of its columns| / 6 / G), at least 2^-6, as torchao
has them. Rounding is to nearest, ties to even, saturating at the ends.

A packed weight is one uint8 matrix; a row of it is a weight row: its codes in column order (NVFP4: two to a
byte, the earlier in the low bits), padded to 32 columns; its float32 scales; for NVFP4 its t, two for every
32 columns. A scale of the whole weight is repeated in every row, so that rows stand alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.quantizers import SMALLEST_SCALED, WHOLE_ROW, fake_activation, groups, split, spread
from tilewright.compiler.weight_format import CHUNK, WeightFormat

FloatName = Literal["fp8-e4m3", "fp8-e5m2", "nvfp4"]
FLOAT_NAMES: tuple[str, ...] = get_args(FloatName)
FP8 = {"fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}
NVFP4_GROUP = 16
E2M1_MAX = 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitude of the low three bits of a code; the fourth bit is the sign."""
_E4M3_MAX = 448.0
_E4M3_SMALLEST = 2.0**-6
_TENSOR = "tensor"
_PIECE = 1 << 20
"""Elements that are rounded at once, so that temporaries stay small."""


@dataclass(frozen=True)
class FloatFormat:
    """One format of a weight of small floats. OptionError for an impossible one."""

    name: str = "fp8-e4m3"
    group: int = WHOLE_ROW
    """fp8: columns per scale, a multiple of 32, or 0 for one scale per row. NVFP4: 16."""
    per_tensor: bool = False
    """fp8: one scale for the whole weight."""
    activation: str = "none"
    """`fp8-token`: activations are rounded to e4m3 with a scale per token. Of fp8 weights only."""

    def __post_init__(self) -> None:
        if self.name not in FLOAT_NAMES:
            raise OptionError(f"weight = {self.name!r}: expected one of {', '.join(FLOAT_NAMES)}")
        if self.name == "nvfp4":
            if self.group != NVFP4_GROUP or self.per_tensor:
                raise OptionError(f"group = {self.group}: nvfp4 has a scale per {NVFP4_GROUP} columns")
        elif self.group < 0 or self.group % CHUNK or (self.group and self.per_tensor):
            raise OptionError(
                f"group = {self.group}: {self.name} has a scale per multiple of {CHUNK} columns, per row "
                "(0), or for the whole weight"
            )
        if self.activation not in ("none", "fp8-token") or (self.activation != "none" and self.is_nvfp4):
            known = "none" if self.is_nvfp4 else "none or fp8-token"
            raise OptionError(f"activation = {self.activation!r}: {self.name} weights go with {known}")

    @property
    def is_nvfp4(self) -> bool:
        return self.name == "nvfp4"

    @property
    def packing(self) -> str:
        """`rows` on every device."""
        return "rows"

    @property
    def text(self) -> str:
        """`fp8-e4m3.128.none.rows`, `fp8-e5m2.tensor.none.rows`: what the semantic op carries."""
        scales = _TENSOR if self.per_tensor else str(self.group)
        return f"{self.name}.{scales}.{self.activation}.{self.packing}"

    @classmethod
    def parse(cls, text: str) -> FloatFormat:
        """The format of a text; OptionError for any other text."""
        parts = text.split(".")
        whole = len(parts) == 4 and parts[1] == _TENSOR
        if len(parts) != 4 or parts[3] != "rows" or not (whole or parts[1].isdecimal()):
            raise OptionError(f"weight format {text!r}: expected fp8-e4m3.0.none.rows or the like")
        return cls(parts[0], 0 if whole else int(parts[1]), whole, parts[2])

    @property
    def code_bits(self) -> int:
        return 4 if self.is_nvfp4 else 8

    @property
    def largest(self) -> float:
        """The largest value of a code."""
        return E2M1_MAX if self.is_nvfp4 else torch.finfo(FP8[self.name]).max

    def problem(self, columns: int) -> str | None:
        """Why a weight of so many columns cannot have this format, or None."""
        if self.group and columns % self.group:
            return f"has {columns} columns, which are no whole groups of {self.group}"
        return None

    def places(self, columns: int) -> tuple[int, int, int]:
        """Bytes of a row before its float32 scales, before its e4m3 scales, and in all."""
        chunks = -(-columns // CHUNK)
        scales = chunks * CHUNK * self.code_bits // 8
        fine = scales + 4 * (1 if self.is_nvfp4 else groups(columns, self.group))
        end = fine + (2 * chunks if self.is_nvfp4 else 0)
        return scales, fine, -(-end // 4) * 4

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the packed uint8 matrix of a weight [rows, columns]."""
        return rows, self.places(columns)[2]

    def pack_weight(self, weight: Tensor) -> Tensor:
        """Round and pack a finite weight [N, K] of any floating dtype -> uint8 of `shape(N, K)`.

        OptionError for columns that are no whole groups.
        """
        problem = self.problem(weight.shape[1])
        if problem is not None:
            raise OptionError(f"a weight {problem}")
        whole = None
        if self.per_tensor or self.is_nvfp4:
            most = torch.stack(torch.aminmax(weight)).abs().max().float()
            whole = _divisor(most / (self.largest * (_E4M3_MAX if self.is_nvfp4 else 1.0)))
        pieces = weight.split(max(1, _PIECE // weight.shape[1]))
        return torch.cat([self._pack_rows(piece.float(), whole) for piece in pieces])

    def round_weight(self, weight: Tensor) -> Tensor:
        """float32 [N, K]: the weight as its packed form means it."""
        return self.dequantize(self.pack_weight(weight), *weight.shape)

    def _pack_rows(self, weight: Tensor, whole: Tensor | None) -> Tensor:
        rows, columns = weight.shape
        missing = -columns % CHUNK
        if self.is_nvfp4:
            assert whole is not None, "NVFP4 has a scale of the whole weight"
            most = split(weight, NVFP4_GROUP).abs().amax(-1)
            fine = (most / E2M1_MAX / whole).clamp(_E4M3_SMALLEST, _E4M3_MAX).to(torch.float8_e4m3fn)
            step = spread(fine.float() * whole, columns, NVFP4_GROUP)
            codes = F.pad(encode_e2m1(weight / _divisor(step)), (0, missing))
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
            fine_bytes = F.pad(fine.view(torch.uint8), (0, missing // NVFP4_GROUP))
            fields = [codes, _bytes(whole.repeat(rows, 1)), fine_bytes]
        else:
            scale = self._scales(weight) if whole is None else whole.repeat(rows, 1)
            held = weight / spread(scale, columns, self.group)
            fields = [F.pad(encode_fp8(held, self.name), (0, missing)), _bytes(scale)]
        packed = torch.cat(fields, 1)
        return F.pad(packed, (0, self.shape(rows, columns)[1] - packed.shape[1])).contiguous()

    def _scales(self, weight: Tensor) -> Tensor:
        return _divisor(split(weight, self.group).abs().amax(-1) / self.largest)

    def unpack(self, packed: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes uint8 [N, K], float32 scales [N, G], NVFP4's e4m3 scales as float32 [N, K/16] or None)."""
        scales, fine, _ = self.places(columns)
        codes = packed[:, :scales]
        if self.is_nvfp4:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
        scale = packed[:, scales:fine].contiguous().view(torch.float32)
        if not self.is_nvfp4:
            return codes[:, :columns], scale, None
        fine_bytes = packed[:, fine : fine + columns // NVFP4_GROUP].contiguous()
        return codes[:, :columns], scale, fine_bytes.view(torch.float8_e4m3fn).float()

    def dequantize(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """float32 [rows, columns]: the meaning of a packed weight; one rounding, that of the last product."""
        codes, scale, fine = self.unpack(packed, rows, columns)
        if fine is None:
            return decode_fp8(codes, self.name) * spread(scale, columns, self.group)
        return decode_e2m1(codes) * spread(fine, columns, NVFP4_GROUP) * scale


AnyFormat = WeightFormat | FloatFormat


def parse_format(text: str) -> AnyFormat:
    """The integer or float format of a text; OptionError, naming the text, for any other."""
    return (FloatFormat if text.startswith(("fp8-", "nvfp4")) else WeightFormat).parse(text)


def rounded_activation(x: Tensor, text: str) -> Tensor:
    """Activations [..., K] as the format of a text takes them, after rounding and back: float32."""
    form = parse_format(text)
    if isinstance(form, FloatFormat):
        return fake_fp8(x) if form.activation == "fp8-token" else x.float()
    return fake_activation(x, form.activation, form.group) if form.activation != "none" else x.float()


def encode_fp8(values: Tensor, name: str) -> Tensor:
    """uint8 codes of float values: to nearest, ties to even, saturating; NaN is for the caller to refuse."""
    dtype = FP8[name]
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype).view(torch.uint8)


def decode_fp8(codes: Tensor, name: str) -> Tensor:
    """float32 values of uint8 codes."""
    return codes.contiguous().view(FP8[name]).float()


def encode_e2m1(values: Tensor) -> Tensor:
    """uint8 codes 0..15 of float32 values: to nearest, ties to the code that is even, saturating at 6."""
    middle = torch.tensor([(a + b) / 2 for a, b in zip(E2M1, E2M1[1:], strict=False)], device=values.device)
    # The code above a middle is taken from the middle on when it is even, and just after it when it is odd.
    after = torch.nextafter(middle, torch.full_like(middle, torch.inf))
    first = torch.where(torch.arange(1, 8, device=values.device) % 2 == 0, middle, after)
    codes = torch.bucketize(values.abs(), first, right=True, out_int32=True).to(torch.uint8)
    return codes | values.signbit().to(torch.uint8) << 3


def decode_e2m1(codes: Tensor) -> Tensor:
    """float32 values of codes 0..15."""
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], device=codes.device)
    return table[codes.int()]


def fake_fp8(x: Tensor) -> Tensor:
    """Activations [..., K] after rounding to e4m3 with a scale per token, float32.

    v = e4m3(x * (448 / max|x|)) and x ~ v * (max|x| / 448). A token that holds a NaN or an infinity becomes
    NaN; one whose largest magnitude is below 2e-36 becomes zero.
    """
    inverse, scale = fp8_scales(x)
    held = (x.float() * inverse).clamp(-_E4M3_MAX, _E4M3_MAX)
    return held.to(torch.float8_e4m3fn).float() * scale


def fp8_scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """(what activations are multiplied by, what their codes are), float32 [..., 1] each."""
    largest = x.float().abs().amax(-1, keepdim=True)
    poison = largest * 0.0
    inverse = torch.where(largest > SMALLEST_SCALED, _E4M3_MAX / largest, 0.0) + poison
    return inverse, largest * (1.0 / _E4M3_MAX) + poison


def _divisor(scale: Tensor) -> Tensor:
    """The scale, 1 where nothing but zeros (or less than float32 can divide by) is to be scaled."""
    return torch.where(scale > 0, scale, 1.0)


def _bytes(scale: Tensor) -> Tensor:
    return scale.float().contiguous().view(torch.uint8)


__all__ = ["FLOAT_NAMES", "AnyFormat", "FloatFormat", "FloatName", "parse_format", "rounded_activation"]
