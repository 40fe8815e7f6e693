"""Quantized linear layers: MatMulNBits for grids with groups, MatMulInteger for a scale per row and token.

onnxruntime's fast kernels take integer zero points only, so a format whose grids have a float offset is
written as its symmetric part, which they run, and a product of the groups' sums with the rest:
w = s (c - m) + r, r = offset + s m, hence x w^T = x (s (c - m))^T + sums(x) r^T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tilewright.compiler.float_format import FloatFormat, parse_format
from tilewright.compiler.quantizers import ACTIVATION_MAX_4, SMALLEST_SCALED, Quantized
from tilewright.compiler.weight_format import WeightFormat
from tilewright.frontends.export.onnx_graph import MICROSOFT, OnnxGraph, Unsupported, rank_of, shape_of
from tilewright.frontends.export.onnx_pointwise import Arguments, Converter

_INT8_ACTIVATIONS, _FLOAT_ACTIVATIONS = 4, 1
"""`accuracy_level` of MatMulNBits."""


def _quantized_linear(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return _several(g, a["x"], [a["packed"]], [a["bias"]], [a["rows"]], a["format"])[0]


def _quantized_linear_multi(g: OnnxGraph, node: fx.Node, a: Arguments) -> list[str]:
    return _several(g, a["x"], a["packed"], a["biases"], a["rows"], a["format"])


def _several(
    g: OnnxGraph,
    x: fx.Node,
    packed: list[fx.Node],
    biases: list[fx.Node | None],
    rows: list[int],
    text: str,
) -> list[str]:
    """All weights that read one input as one product over their rows, split again behind it."""
    form, columns = parse_format(text), int(shape_of(x)[-1])
    if isinstance(form, FloatFormat):
        raise Unsupported(f"a weight of {form.name}, which onnxruntime's CPU kernels do not multiply")
    if not all(g.is_held(p) for p in packed):
        raise Unsupported("a quantized weight that only the call knows")
    parts = [form.unpack(g.tensor(p), n, columns) for p, n in zip(packed, rows, strict=True)]
    offset = torch.cat([p.offset for p in parts])
    codes, scale = torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts])
    weight, label = Quantized(codes, scale, offset, form.group), g.program.path_of(packed[0])
    step = form.step_of(g.tensor(packed[0])) if form.has_step else None
    biased = any(bias is not None for bias in biases)
    if form.group:
        found = _grouped(g, x, weight, form, label, step)
    else:
        found = _per_row(g, x, weight, form, label, step, biased)
    if biased:
        shifts = [torch.zeros(n) if b is None else _held(g, b) for b, n in zip(biases, rows, strict=True)]
        found = g.node("Add", [found, g.weight(torch.cat(shifts), f"{label}.bias")])
    if len(rows) == 1:
        return [found]
    return g.node_many("Split", [found, g.constant(rows, torch.int64)], len(rows), axis=-1)


def _held(g: OnnxGraph, bias: fx.Node) -> Tensor:
    if not g.is_held(bias):
        raise Unsupported("a bias that only the call knows")
    return g.tensor(bias).float()


def _grouped(
    g: OnnxGraph, x: fx.Node, weight: Quantized, form: WeightFormat, label: str, step: float | None
) -> str:
    """com.microsoft::MatMulNBits, 4 bits for narrower codes too; activations on a static grid or one of
    4 bits are rounded before it."""
    columns, given = int(shape_of(x)[-1]), g.name(x)
    if step is not None:
        given = g.shared("grid", "Mul", [_static(g, given, step), g.constant(step, torch.float32)])
    elif form.activation == "int4-token":
        given = g.shared("grid", "Mul", [*_tokens_of_4_bits(g, given)])
    bits, middle = (8 if form.bits == 8 else 4), form.middle
    shift = (1 << (bits - 1)) - middle
    rows, count = weight.scale.shape
    if form.group & (form.group - 1) or form.group < 16:
        raise Unsupported(f"a quantization group of {form.group}, which is no power of two")
    codes = F.pad(weight.codes + shift, (0, count * form.group - columns), value=1 << (bits - 1))
    stored = codes.reshape(rows, count, form.group).to(torch.uint8)
    if bits == 4:
        stored = stored[..., 0::2] | stored[..., 1::2] << 4
    level = _INT8_ACTIVATIONS if form.activation in ("int8-token", "int8-group") else _FLOAT_ACTIVATIONS
    scales = g.weight(weight.scale.float().flatten(), f"{label}.scales")
    inputs = [given, g.weight(stored, f"{label}.codes"), scales]
    sizes: dict[str, Any] = {"K": columns, "N": rows, "bits": bits, "block_size": form.group}
    rest = weight.offset.float() + middle * weight.scale.float()
    zeros = _whole_zeros(weight, shift, bits) if rest.any() else None
    if zeros is not None:
        inputs.append(g.weight(zeros, f"{label}.zeros"))
    found = g.node("MatMulNBits", inputs, domain=MICROSOFT, accuracy_level=level, **sizes)
    if zeros is not None or not rest.any():
        return found
    if columns % form.group:
        raise Unsupported(f"an offset grid over {columns} columns, which are no whole groups of {form.group}")
    sums, share = _group_sums(g, x, form.group, count)
    added = g.node("MatMul", [sums, g.weight((rest.t() / share).contiguous(), f"{label}.rest")])
    return g.node("Add", [found, added])


def _whole_zeros(weight: Quantized, shift: int, bits: int) -> Tensor | None:
    """The zero points of `bits` each, as MatMulNBits packs them, where every offset is a whole number of
    steps that is a code; None elsewhere. `shift` is what the stored codes have been moved by."""
    scale, offset = weight.scale.float(), weight.offset.float()
    zeros = torch.round(-offset / scale)
    if not torch.equal(zeros * scale, -offset) or zeros.min() + shift < 0 or zeros.max() + shift >= 1 << bits:
        return None
    stored = (zeros + shift).to(torch.uint8)
    if bits == 8:
        return stored
    stored = F.pad(stored, (0, stored.shape[1] % 2))
    return stored[:, 0::2] | stored[:, 1::2] << 4


def _group_sums(g: OnnxGraph, x: fx.Node, group: int, count: int) -> tuple[str, float]:
    """(the sums of each group of columns times a factor, that factor); one node where x has 3 axes."""
    given = g.name(x)
    if rank_of(x) == 3:
        pooled = g.shared("sums", "AveragePool", [given], kernel_shape=[group], strides=[group])
        return pooled, 1.0 / group
    shape = g.constant([0] * (rank_of(x) - 1) + [count, group], torch.int64)
    groups = g.shared("groups", "Reshape", [given, shape])
    return g.shared("sums", "ReduceSum", [groups, g.constant([-1], torch.int64)], keepdims=0), 1.0


def _static(g: OnnxGraph, x: str, step: float) -> str:
    """Whole float32 numbers in -127..127: activations in steps of `step`, as `quantize_static` has them."""
    inverse = g.constant(float(1.0 / torch.tensor(step)), torch.float32)
    low, high = (g.constant(sign * 127.0, torch.float32) for sign in (-1, 1))
    rounded = g.shared("whole", "Round", [g.shared("whole", "Mul", [x, inverse])])
    return g.shared("whole", "Clip", [rounded, low, high])


def _per_row(
    g: OnnxGraph,
    x: fx.Node,
    weight: Quantized,
    form: WeightFormat,
    label: str,
    step: float | None,
    biased: bool,
) -> str:
    """A scale per row: MatMulInteger on int8 activations with a scale per token or one for all, else
    DequantizeLinear.

    Both sides signed: with unsigned activations and signed weights the AVX2 kernels saturate. Where a bias
    follows, onnxruntime must not make one node of the product, its scales and the bias: with a scale per
    token it multiplies the bias by it (found with 1.32).
    """
    signed = (weight.codes.to(torch.int16) - form.middle).to(torch.int8)
    scale = weight.scale.float().flatten()
    if (weight.offset.float() + form.middle * weight.scale.float()).any():
        raise Unsupported("a scale per row with an offset")
    stored = g.weight(signed.t().contiguous(), f"{label}.codes")
    scales = g.weight(scale, f"{label}.scales")
    if form.activation == "none":
        return g.node("MatMul", [g.name(x), g.node("DequantizeLinear", [stored, scales], axis=1)])
    if step is not None:
        codes = g.cast(_static(g, g.name(x), step), torch.float32, torch.int8)
        steps = g.constant(step, torch.float32)
    elif form.activation == "int4-token":
        whole_codes, steps = _tokens_of_4_bits(g, g.name(x))
        codes = g.cast(whole_codes, torch.float32, torch.int8)
    else:
        codes, steps = _tokens(g, g.name(x))
    whole = g.cast(g.node("MatMulInteger", [codes, stored]), torch.int32, torch.float32)
    if biased and step is None:
        return g.node("Mul", [g.node("Mul", [whole, scales]), steps])
    return g.node("Mul", [whole, g.node("Mul", [steps, scales])])


def _tokens(g: OnnxGraph, x: str) -> tuple[str, str]:
    """(int8 codes, float32 step) of activations with one step per token, as `fake_activation` has them."""
    last, tiny = g.constant([-1], torch.int64), g.constant(torch.finfo(torch.float32).tiny, torch.float32)
    top = g.shared("top", "ReduceMax", [g.shared("top", "Abs", [x]), last], keepdims=1)
    step = g.shared("step", "Div", [top, g.constant(127.0, torch.float32)])
    step = g.shared("step", "Max", [step, tiny])
    rounded = g.shared("codes", "Round", [g.shared("codes", "Div", [x, step])])
    return g.cast(rounded, torch.float32, torch.int8), step


def _tokens_of_4_bits(g: OnnxGraph, x: str) -> tuple[str, str]:
    """(whole float32 numbers in -7..7, float32 step) of activations with one step per token.

    Multiplied by the inverse step as `quantize_activation` does: where a code is a seventh of the largest,
    one that a division rounds the other way shows.
    """
    last, least = g.constant([-1], torch.int64), g.constant(SMALLEST_SCALED, torch.float32)
    top = g.shared("top", "ReduceMax", [g.shared("top", "Abs", [x]), last], keepdims=1)
    top = g.shared("top", "Max", [top, least])
    inverse = g.shared("inverse", "Div", [g.constant(ACTIVATION_MAX_4, torch.float32), top])
    codes = g.shared("codes", "Round", [g.shared("codes", "Mul", [x, inverse])])
    share = g.constant(1.0 / ACTIVATION_MAX_4, torch.float32)
    return codes, g.shared("step", "Mul", [top, share])


QUANTIZED: dict[str, Converter] = {
    "tilewright::quantized_linear": _quantized_linear,
    "tilewright::quantized_linear_multi": _quantized_linear_multi,
}
