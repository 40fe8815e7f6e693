"""Small floats: every code, every rounding against tables made from the definitions, packing, refusals."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.float_format import (
    FP8,
    FloatFormat,
    decode_e2m1,
    decode_fp8,
    encode_e2m1,
    encode_fp8,
    fake_fp8,
    parse_format,
)
from tilewright.compiler.weight_format import WeightFormat

FORMATS = [
    FloatFormat("fp8-e4m3"),
    FloatFormat("fp8-e5m2", 32),
    FloatFormat("fp8-e4m3", 96, activation="fp8-token"),
    FloatFormat("fp8-e5m2", per_tensor=True),
    FloatFormat("nvfp4", 16),
]
BITS = {"fp8-e4m3": (4, 3), "fp8-e5m2": (5, 2), "e2m1": (2, 1)}


def table(name: str) -> list[float]:
    """The value of every code from sign, exponent and mantissa; NaN and infinity as the formats have them."""
    exponent_bits, mantissa_bits = BITS[name]
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for code in range(2 << (exponent_bits + mantissa_bits)):
        sign, rest = (
            code >> (exponent_bits + mantissa_bits),
            code & ((1 << (exponent_bits + mantissa_bits)) - 1),
        )
        exponent, mantissa = divmod(rest, 1 << mantissa_bits)
        value = math.ldexp(
            mantissa + (exponent > 0) * 2**mantissa_bits, max(exponent, 1) - bias - mantissa_bits
        )
        if (name == "fp8-e4m3" and rest == 0x7F) or (name == "fp8-e5m2" and exponent == 31 and mantissa):
            value = math.nan
        elif name == "fp8-e5m2" and exponent == 31:
            value = math.inf
        found.append(-value if sign else value)
    return found


def nearest(name: str, value: float) -> int:
    """The code of a magnitude: nearest by exact comparison, ties to even, saturating."""
    finite = [(v, c) for c, v in enumerate(table(name)[: len(table(name)) // 2]) if math.isfinite(v)]
    return min(finite, key=lambda pair: (abs(Fraction(pair[0]) - Fraction(value)), pair[1] % 2))[1]


@pytest.mark.parametrize("name", list(BITS))
def test_every_code_has_its_value_and_comes_back(name: str) -> None:
    values = torch.tensor(table(name))
    codes = torch.arange(len(values), dtype=torch.uint8)
    fp8 = name in FP8
    got = decode_fp8(codes, name) if fp8 else decode_e2m1(codes)
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(got.nan_to_num(nan=7.0), values.nan_to_num(nan=7.0))
    finite = values.isfinite()
    back = encode_fp8(values[finite], name) if fp8 else encode_e2m1(values[finite])
    assert torch.equal(back, codes[finite])


@pytest.mark.parametrize("name", list(BITS))
def test_rounding_is_to_nearest_even_and_saturates(name: str) -> None:
    finite = [v for v in table(name)[: len(table(name)) // 2] if math.isfinite(v)]
    given = []
    for a, b in zip(finite, finite[1:], strict=False):
        middle = torch.tensor((a + b) / 2)
        ends = torch.tensor([0.0, math.inf])
        given += [float(torch.nextafter(middle, end)) for end in ends] + [float(middle)]
    given += [finite[-1] * f for f in (1.01, 1.5, 1e6)] + [3e38, 1e-45, finite[1] / 2]
    values = torch.tensor(given)
    want = torch.tensor([nearest(name, v) for v in given], dtype=torch.uint8)
    sign = 8 if name == "e2m1" else 128
    encode = encode_e2m1 if name == "e2m1" else lambda v: encode_fp8(v, name)
    assert torch.equal(encode(values), want)
    assert torch.equal(encode(-values), want | sign)


def by_hand(form: FloatFormat, weight: torch.Tensor) -> torch.Tensor:
    """The rounded weight in float64, element by element, from the tables alone."""
    element = "e2m1" if form.name == "nvfp4" else form.name
    values = [v for v in table(element)[: len(table(element)) // 2] if math.isfinite(v)]
    rows, columns = weight.shape
    width = columns if form.group == 0 else form.group
    most = weight.abs().max()
    whole = most / (448.0 * 6.0) if form.name == "nvfp4" else most / values[-1]
    out = torch.empty(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for at in range(0, columns, width):
            group = weight[r, at : at + width]
            scale = whole if form.per_tensor else group.abs().max() / values[-1]
            factor = scale.double()
            if form.name == "nvfp4":
                fine = max(float(scale / whole), 2.0**-6)
                fine = table("fp8-e4m3")[nearest("fp8-e4m3", fine)]
                scale, factor = fine * whole, fine * whole.double()
            for i, w in enumerate(group):
                value = values[nearest(element, float((w / scale).abs()))]
                out[r, at + i] = math.copysign(value, float(w)) * factor
    return out


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.text)
def test_a_weight_is_rounded_as_by_hand_and_packing_keeps_it(form: FloatFormat) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 96, generator=generator) * 10.0 ** torch.randint(
        -4, 1, (5, 96), generator=generator
    )
    packed = form.pack_weight(weight)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == form.shape(5, 96)
    got = form.dequantize(packed, 5, 96)
    torch.testing.assert_close(got.double(), by_hand(form, weight), rtol=1.5e-7, atol=0.0)
    assert torch.equal(form.pack_weight(got), form.pack_weight(form.round_weight(got))), "a fixed point"
    assert parse_format(form.text) == form


def test_odd_columns_zeros_pieces_and_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.compiler import float_format

    for form in FORMATS:
        columns = 192 if form.group else 37
        weight = torch.randn(7, columns)
        weight[2] = 0.0
        whole = form.pack_weight(weight)
        assert torch.equal(form.dequantize(whole, 7, columns)[2], torch.zeros(columns))
        monkeypatch.setattr(float_format, "_PIECE", 2 * columns)
        assert torch.equal(form.pack_weight(weight), whole)
        monkeypatch.undo()
        for size in (0.0, 1e-44, 3e38):
            rounded = form.round_weight(weight.clamp(-1, 1) * size)
            assert rounded.isfinite().all()
            assert float(rounded.abs().max()) <= size * 1.000001


@pytest.mark.parametrize("form", FORMATS[::2], ids=lambda form: form.text)
def test_a_file_keeps_weight_and_format(form: FloatFormat, tmp_path: Path) -> None:
    weight = torch.randn(11, 96)
    packed = form.pack_weight(weight)
    save_file({"w": packed}, tmp_path / "w.safetensors", metadata={"format": form.text})
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        found, back = file.get_tensor("w"), parse_format(file.metadata()["format"])
    assert back == form
    assert torch.equal(back.dequantize(found, 11, 96), form.round_weight(weight))


def test_bytes_per_weight() -> None:
    for form, bits in (
        (FloatFormat("fp8-e4m3"), 8 + 32 / 576),
        (FloatFormat("fp8-e5m2", 64), 8.5),
        (FloatFormat("nvfp4", 16), 4.5 + 32 / 576),
    ):
        rows, width = form.shape(64, 576)
        assert rows * width * 8 / (64 * 576) == pytest.approx(bits)


def test_fp8_activations() -> None:
    """Against the table; a NaN, an infinity and nothing but zeros."""
    x = torch.randn(3, 40)
    got = fake_fp8(x)
    values = table("fp8-e4m3")
    for row in range(3):
        most = x[row].abs().max()
        for i in range(40):
            held = float(x[row, i] * (448.0 / most))
            want = math.copysign(values[nearest("fp8-e4m3", abs(held))], held) * float(most) / 448.0
            assert float(got[row, i]) == pytest.approx(want, rel=3e-7)
    odd = torch.zeros(3, 4)
    odd[1, 2], odd[2, 0] = math.nan, math.inf
    assert fake_fp8(odd).isnan().tolist() == [[False] * 4, [True] * 4, [True] * 4]
    assert torch.equal(fake_fp8(odd)[0], torch.zeros(4))


def test_errors_name_the_legal_values() -> None:
    for make, said in (
        (lambda: FloatFormat("fp8-e3m4"), "weight = 'fp8-e3m4': expected one of fp8-e4m3, fp8-e5m2, nvfp4"),
        (lambda: FloatFormat("fp8-e4m3", 48), "group = 48"),
        (lambda: FloatFormat("fp8-e4m3", 32, per_tensor=True), "group = 32"),
        (lambda: FloatFormat("nvfp4", 32), "nvfp4 has a scale per 16 columns"),
        (lambda: FloatFormat("fp8-e4m3", activation="int8-token"), "go with none or fp8-token"),
        (lambda: FloatFormat("nvfp4", 16, activation="fp8-token"), "go with none"),
        (lambda: parse_format("fp8-e4m3.none"), "weight format 'fp8-e4m3.none'"),
        (lambda: parse_format("nvfp4.16.none.blocks8"), "weight format 'nvfp4.16.none.blocks8'"),
        (lambda: FloatFormat("nvfp4", 16).pack_weight(torch.ones(2, 40)), "no whole groups of 16"),
        (lambda: parse_format("int4.32"), "weight format 'int4.32'"),
    ):
        with pytest.raises(OptionError) as raised:
            make()
        assert said in str(raised.value)
    assert isinstance(parse_format("int4.32.symmetric.none.rows"), WeightFormat)
