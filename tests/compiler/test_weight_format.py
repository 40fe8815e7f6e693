"""Packing and its inverse, for every format, odd sizes, and through a file."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.quantizers import Quantized
from tilewright.compiler.weight_format import BITS, WeightFormat

FORMATS = [
    WeightFormat(bits, group, mode, packing=packing)
    for bits, group, mode, packing in itertools.product(
        BITS, (0, 32, 64), ("symmetric", "float-zero"), ("blocks8", "rows")
    )
]


def _ids(value: object) -> str:
    return value.text if isinstance(value, WeightFormat) else str(value)


@pytest.mark.parametrize("form", FORMATS, ids=_ids)
def test_pack_and_unpack_are_inverse(form: WeightFormat) -> None:
    torch.manual_seed(1)
    for rows, columns in ((8, 64), (5, 37), (19, 100), (1, 1), (16, 96)):
        weight = form.quantizer().quantize(torch.randn(rows, columns))
        packed = form.pack(weight)
        assert packed.dtype == torch.uint8
        assert tuple(packed.shape) == form.shape(rows, columns)
        back = form.unpack(packed, rows, columns)
        assert torch.equal(back.codes, weight.codes)
        assert torch.equal(back.scale, weight.scale)
        assert torch.equal(back.offset, weight.offset)
        assert torch.equal(form.dequantize(packed, rows, columns), weight.dequantize())


@pytest.mark.parametrize("form", FORMATS, ids=_ids)
def test_every_code_survives(form: WeightFormat) -> None:
    """All codes in all positions, not only those that rounding reaches."""
    rows, columns = 9, 70
    codes = torch.arange(rows * columns).view(rows, columns) * 37 % 2**form.bits
    count = 1 if form.group == 0 else -(-columns // form.group)
    scale = torch.rand(rows, count).add(0.5).to(form.scale_dtype).float()
    offset = torch.randn(rows, count).half().float() if form.has_offset else -form.middle * scale
    weight = Quantized(codes.to(torch.uint8), scale, offset, form.group)
    back = form.unpack(form.pack(weight), rows, columns)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.offset, offset)


@pytest.mark.parametrize("form", FORMATS[::5], ids=_ids)
def test_a_file_keeps_weight_and_format(form: WeightFormat, tmp_path: object) -> None:
    packed = form.pack(form.quantizer().quantize(torch.randn(11, 70)))
    path = f"{tmp_path}/weight.safetensors"
    save_file({"w": packed}, path, metadata={"format": form.text, "rows": "11", "columns": "70"})
    assert torch.equal(load_file(path)["w"], packed)
    assert WeightFormat.parse(form.text) == form


def test_bytes_per_weight() -> None:
    rows, columns = 64, 576
    sizes = {
        WeightFormat(4, 32): 4.5,
        WeightFormat(4, 32, "float-zero"): 5.0,
        WeightFormat(8, 0): 8 + 32 / columns,
        WeightFormat(3, 64): 3.25,
        WeightFormat(2, 64, "float-zero"): 2.5,
    }
    for form, bits in sizes.items():
        height, width = form.shape(rows, columns)
        assert height * width * 8 / (rows * columns) == pytest.approx(bits)


def test_errors_name_the_legal_values() -> None:
    for make, said in (
        (lambda: WeightFormat(bits=5), "bits = 5: expected one of 2, 3, 4, 8"),
        (lambda: WeightFormat(group=48), "group = 48: expected a multiple of 32"),
        (lambda: WeightFormat(group=-32), "group = -32"),
        (lambda: WeightFormat(mode="asymmetric"), "mode = 'asymmetric': expected one of symmetric"),
        (lambda: WeightFormat(group=0, activation="int8-group"), "the weight has no groups"),
        (lambda: WeightFormat.parse("int4.32"), "weight format 'int4.32'"),
        (lambda: WeightFormat.parse("int4.x.symmetric.none.rows"), "whole numbers"),
        (lambda: WeightFormat.parse("int4.32.symmetric.fp8.rows"), "activation = 'fp8'"),
    ):
        with pytest.raises(OptionError) as raised:
            make()
        assert said in str(raised.value)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    form = WeightFormat(4, 32)
    weight = WeightFormat(4, 32).quantizer().quantize(torch.randn(8, 64))
    with pytest.raises(OptionError, match="do not fit torch.float16"):
        form.pack(Quantized(weight.codes, weight.scale + 1e-6, weight.offset, 32))
    with pytest.raises(OptionError, match="group = 64: the format has 32"):
        form.pack(Quantized(weight.codes, weight.scale, weight.offset, 64))
