"""The numeric core of every quantization: how real numbers become small integers and back.

Three maps, each over a whole tensor, over rows, or over groups of `group` columns of a row (the last group of
a row may be shorter). Rounding is half to even everywhere, so that references and kernels agree on integers.

    symmetric    s = max|x| / (2^(b-1) - 1)           x ~ s (code - 2^(b-1))
    asymmetric   z = round(-min(x, 0) / s)            x ~ s (code - z)
    float-zero   s = (max - min) / (2^b - 1)          x ~ s code + min      (GGUF Q4_1, half-quadratic)

A scale and an offset of the storage dtype are rounded first and the codes are chosen for the rounded ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError

Kind = Literal["symmetric", "asymmetric", "float-zero"]
KINDS: tuple[str, ...] = get_args(Kind)
Activation = Literal["none", "int8-token", "int8-group", "int4-token", "int8-static"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
IDENTITY_BITS = 16
"""From this many bits on a quantizer is the identity and no node is made for it."""
ACTIVATION_MAX = 127
"""Activations use -127..127: two products with 8-bit weights then fit the 16-bit lanes of AVX2."""
ACTIVATION_MAX_4 = 7
"""Of 4-bit activations."""
SMALLEST_SCALED = 2e-36
"""Activations whose largest magnitude is below this count as zero: their inverse scale would overflow."""
WHOLE_ZERO_BITS = 4
"""Codes of more bits would leave too few for a scale whose multiples are exact in float16."""
WHOLE_ROW = 0
"""The group size that means one group per row."""


@dataclass(frozen=True)
class Quantized:
    """Codes and the affine map back: values ~ scale * codes + offset, group by group."""

    codes: Tensor
    """uint8 [..., K], each in 0..2^bits - 1."""
    scale: Tensor
    """float32 [..., G]."""
    offset: Tensor
    """float32 [..., G]."""
    group: int

    def dequantize(self) -> Tensor:
        """float32 [..., K]."""
        columns = self.codes.shape[-1]
        if self.group != WHOLE_ROW and columns % self.group:
            scale, offset = (spread(t, columns, self.group) for t in (self.scale, self.offset))
            return scale * self.codes.float() + offset
        blocks: Tensor = self.codes.unflatten(-1, (groups(columns, self.group), -1))
        # In place: a head's weight is hundreds of megabytes in float32, and once is enough.
        values = blocks.to(torch.float32, copy=True).mul_(self.scale[..., None]).add_(self.offset[..., None])
        return values.flatten(-2)


@dataclass(frozen=True)
class Quantizer:
    """One way of quantizing along the last axis. Raises OptionError for impossible settings."""

    bits: int
    kind: Kind = "symmetric"
    group: int = WHOLE_ROW
    """Columns that share a scale; 0: the whole row."""
    whole_tensor: bool = False
    """One scale for the whole tensor."""
    narrow: bool = False
    """Symmetric only: leave out the code of -2^(b-1), as exact 8-bit kernels on AVX2 want."""
    clip: float = 1.0
    """Share of the range that is kept."""
    storage: torch.dtype = torch.float32
    """dtype that scales and offsets are rounded to."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 and self.bits < IDENTITY_BITS:
            raise OptionError(f"bits = {self.bits}: expected 2 to 8, or {IDENTITY_BITS} for no quantization")
        if self.kind not in KINDS:
            raise OptionError(f"kind = {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.group < 0 or (self.group and self.whole_tensor):
            raise OptionError(
                f"group = {self.group}: expected 1 or more columns, or 0 for a whole row or tensor"
            )
        if not 0.0 < self.clip <= 1.0:
            raise OptionError(f"clip = {self.clip}: expected a share above 0, at most 1")

    @property
    def is_identity(self) -> bool:
        """True when values stay as they are."""
        return self.bits >= IDENTITY_BITS

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code of zero in the symmetric map."""
        return 1 << (self.bits - 1)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, offset), float32 [..., G] each, for values [..., K]."""
        low, high = self._range(x.float())
        low, high = low * self.clip, high * self.clip
        if self.kind == "symmetric":
            scale = self._stored(torch.maximum(-low, high) / (self.middle - 1))
            scale = torch.where(scale > 0, scale, 1.0)
            return scale, -self.middle * scale
        if self.kind == "float-zero":
            scale, offset = self._stored((high - low) / self.levels), self._stored(low)
            return torch.where(scale > 0, scale, 1.0), offset
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = self._stored((high - low) / self.levels)
        scale = torch.where(scale > 0, scale, 1.0)
        return scale, -scale * torch.round(-low / scale)

    def encode(self, x: Tensor, scale: Tensor, offset: Tensor) -> Quantized:
        """Codes of values [..., K] on a given grid."""
        columns, group = x.shape[-1], self.group
        wide, shift = (spread(t, columns, group) for t in (scale, offset))
        lowest = 1 if self.narrow and self.kind == "symmetric" else 0
        if self.kind == "float-zero":
            codes = torch.round((x.float() - shift) / wide)
        else:  # the offset is a whole number of steps: round the quotient alone, half to even around zero
            codes = torch.round(x.float() / wide) - torch.round(shift / wide)
        return Quantized(codes.clamp(lowest, self.levels).to(torch.uint8), scale, offset, group)

    def quantize(self, x: Tensor) -> Quantized:
        """Round values [..., K] to the nearest codes."""
        return self.encode(x, *self.grid(x))

    def fake(self, x: Tensor) -> Tensor:
        """The values after quantizing and back, in the dtype of x; x itself for the identity."""
        return x if self.is_identity else self.quantize(x).dequantize().to(x.dtype)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.whole_tensor:
            shape = (*x.shape[:-1], 1)
            return x.min().expand(shape), x.max().expand(shape)
        blocks = split(x, self.group)
        return blocks.amin(-1), blocks.amax(-1)

    def _stored(self, value: Tensor) -> Tensor:
        return value.to(self.storage).float()


def groups(columns: int, group: int) -> int:
    """Groups in a row: group j covers columns j*group up to the end of the row at most."""
    return 1 if group == WHOLE_ROW else -(-columns // group)


def split(x: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., G, group]; a short last group repeats its last value, which no range notices."""
    columns = x.shape[-1]
    if group == WHOLE_ROW:
        return x.unsqueeze(-2)
    missing = groups(columns, group) * group - columns
    if missing:
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), -1)
    return x.reshape(*x.shape[:-1], -1, group)


def spread(value: Tensor, columns: int, group: int) -> Tensor:
    """[..., G] -> [..., K]: the value of each column's group."""
    if group == WHOLE_ROW:
        return value.expand(*value.shape[:-1], columns)
    return value.repeat_interleave(group, -1)[..., :columns]


def half_quadratic(quantizer: Quantizer, x: Tensor, rounds: int = 20) -> Quantized:
    """Half-quadratic rounding (HQQ) of values [..., K]: the float offsets that shrink the p = 0.7 norm of the
    error, found by alternating a shrinkage of the error with the mean that fits the rest. Calibration-free.

    Only float-zero grids have an offset to move. The best round by mean absolute error is kept per group, so
    the result is never worse than plain rounding in that measure.
    """
    if quantizer.kind != "float-zero":
        raise OptionError(f"kind = {quantizer.kind!r}: half-quadratic rounding moves float offsets")
    x = x.float()
    found = best = quantizer.quantize(x)
    scale, group = found.scale, quantizer.group
    best_error = _mean_error(x, best)
    beta, power = 10.0, 0.7
    for _ in range(rounds):
        error = x - found.dequantize()
        shrunk = torch.sign(error) * F.relu(error.abs() - error.abs().pow(power - 1) / beta)
        shrunk = torch.where(error == 0, 0.0, shrunk)
        rest = x - shrunk - spread(scale, x.shape[-1], group) * found.codes.float()
        offset = _group_mean(rest, group).to(quantizer.storage).float()
        found = quantizer.encode(x, scale, offset)
        error_now = _mean_error(x, found)
        better = error_now < best_error
        if not bool(better.any()):
            break
        offset = torch.where(better, found.offset, best.offset)
        best, best_error = quantizer.encode(x, scale, offset), torch.minimum(error_now, best_error)
        beta *= 1.01
    return best


def whole_zero(quantizer: Quantizer, x: Tensor, ranges: int = 5) -> Quantized:
    """Float-zero grids of values [..., K] with offsets of whole numbers of steps: x ~ s (code - z), z a code.

    Runtimes with integer zero points multiply them at full speed. Per group, the range is narrowed and
    widened in `ranges` steps, s fitted to the codes by least squares, and what has the least squared error is
    kept. s is rounded to so few bits that s z is exact in the storage dtype.
    """
    if quantizer.kind != "float-zero" or quantizer.bits > WHOLE_ZERO_BITS:
        raise OptionError(
            f"kind = {quantizer.kind!r}, bits = {quantizer.bits}: whole zero points are offsets of "
            f"float-zero grids of at most {WHOLE_ZERO_BITS} bits"
        )
    size, levels = quantizer.group or x.shape[-1], quantizer.levels
    columns = x.shape[-1]
    blocks = F.pad(x.float(), (0, -columns % size)).unflatten(-1, (-1, size))  # zeros are on every grid
    low, high = blocks.amin(-1).clamp(max=0.0), blocks.amax(-1).clamp(min=0.0)
    best: tuple[Tensor, Tensor, Tensor] | None = None  # error, scale, zero
    for share in torch.linspace(0.84, 1.08, ranges).tolist():
        step = ((high - low) * (share / levels)).clamp(min=torch.finfo(quantizer.storage).tiny)
        for zero in (torch.floor(-low / step), torch.ceil(-low / step)):
            zero = zero.clamp(0, levels)
            codes = torch.round(blocks / step[..., None])
            codes = codes.clamp(-zero[..., None], (levels - zero)[..., None])
            fitted = (blocks * codes).sum(-1) / codes.square().sum(-1).clamp(min=1.0)
            scale = _exact_multiples(torch.where(fitted > 0, fitted, step), quantizer)
            error = (blocks - codes * scale[..., None]).square().sum(-1)
            if best is None:
                best = error, scale, zero
            else:
                better = error < best[0]
                pairs = zip((error, scale, zero), best, strict=True)
                best = tuple(torch.where(better, new, old) for new, old in pairs)  # type: ignore[assignment]
    assert best is not None, "one range at least is tried"
    return quantizer.encode(x, best[1], -best[1] * best[2])


def _exact_multiples(scale: Tensor, quantizer: Quantizer) -> Tensor:
    """Scales of the storage dtype rounded so that their products with every code are of it as well."""
    digits = 1 - int(math.log2(torch.finfo(quantizer.storage).eps)) - quantizer.bits
    share, exponent = torch.frexp(scale.to(quantizer.storage).float())
    found = torch.ldexp(torch.round(share * 2.0**digits) / 2.0**digits, exponent)
    return torch.where(found > 0, found, 1.0)


def _mean_error(x: Tensor, found: Quantized) -> Tensor:
    return split((x - found.dequantize()).abs(), found.group).mean(-1)


def _group_mean(x: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., G]; a short last group counts its own columns only."""
    columns = x.shape[-1]
    if group == WHOLE_ROW:
        return x.mean(-1, keepdim=True)
    missing = groups(columns, group) * group - columns
    counts = torch.full((groups(columns, group),), float(group), device=x.device)
    counts[-1] -= missing
    padded = F.pad(x, (0, missing))
    return padded.reshape(*x.shape[:-1], -1, group).sum(-1) / counts


def quantize_activation(x: Tensor, activation: Activation, group: int) -> tuple[Tensor, Tensor]:
    """(codes, scale) of activations [..., K]: whole float32 numbers in -127..127 [..., K], float32 [..., G].

    `int8-token` has one scale per row, `int8-group` one per `group` columns; `int4-token` is in -7..7. code =
    round(x * (127 / max|x|)), half to even, scale = max|x| / 127. A group that holds a NaN or an infinity has
    a NaN scale.
    """
    size = group if activation == "int8-group" else WHOLE_ROW
    most = ACTIVATION_MAX_4 if activation == "int4-token" else ACTIVATION_MAX
    largest = split(x.float().abs(), size).amax(-1)
    poison = largest * 0.0  # NaN for what has no scale
    inverse = torch.where(largest > SMALLEST_SCALED, most / largest, 0.0) + poison
    codes = torch.round(x.float() * spread(inverse, x.shape[-1], size))
    return codes, largest * (1.0 / most) + poison


def quantize_static(x: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """(codes, scale) of activations [..., K] on one grid for all: whole float32 numbers in -127..127
    [..., K], float32 [..., 1].

    code = round(x * (1 / step)), half to even, cut at -127 and 127. A row that holds a NaN or an infinity has
    a NaN scale, as it has where scales are taken from the row.
    """
    narrow = torch.tensor(step, dtype=torch.float32, device=x.device)
    codes = torch.round(x.float() * (1.0 / narrow)).clamp(-ACTIVATION_MAX, ACTIVATION_MAX)
    return codes, narrow + x.float().abs().amax(-1, keepdim=True) * 0.0


def fake_static(x: Tensor, step: float) -> Tensor:
    """Activations [..., K] after quantizing on the grid of a step and back, float32."""
    codes, scale = quantize_static(x, step)
    return codes * scale


def fake_activation(x: Tensor, activation: Activation, group: int) -> Tensor:
    """Activations [..., K] after quantizing with scales of their own and back, float32."""
    codes, scale = quantize_activation(x, activation, group)
    size = group if activation == "int8-group" else WHOLE_ROW
    return codes * spread(scale, x.shape[-1], size)


def weight_problem(weight: Tensor) -> str | None:
    """Why a weight cannot be quantized, or None."""
    if weight.dim() != 2:
        return f"has {weight.dim()} axes, a matrix has 2"
    if not weight.is_floating_point():
        return f"is {str(weight.dtype).removeprefix('torch.')}, not floating point"
    if weight.numel() == 0:
        return f"is empty: {list(weight.shape)}"
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):  # NaN is passed on; no temporary
        bad = int((~torch.isfinite(weight)).sum())
        return f"holds {bad} NaN or infinite values"
    return None
