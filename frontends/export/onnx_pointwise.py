"""ATen elementwise ops, reductions and products as standard ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tilewright.frontends.export.onnx_graph import (
    OnnxGraph,
    Unsupported,
    dtype_of,
    rank_of,
    shape_of,
)

Arguments = dict[str, Any]
Converter = Callable[[OnnxGraph, fx.Node, Arguments], Any]
"""Writes one node; returns the name of its value, or a list of names."""


def _pair(a: Arguments) -> tuple[Any, Any]:
    """The two operands whatever the schema calls them (`self`, `other`, or positions)."""
    left, right = list(a.values())[:2]
    return left, right


def _common(left: Any, right: Any) -> torch.dtype:
    """The dtype in which two operands meet: torch's promotion, where a number is weaker than a tensor."""

    def sample(value: Any) -> Any:
        if isinstance(value, fx.Node):
            val = value.meta["val"]
            return torch.empty(val.shape if val.dim() == 0 else (1,), dtype=val.dtype) if isinstance(
                val, torch.Tensor
            ) else 1 if dtype_of(value) == torch.int64 else 1.0  # fmt: skip
        return value

    return torch.result_type(sample(left), sample(right))


def binary(op: str) -> Converter:
    """An elementwise op of two operands that meet in the dtype of the result."""

    def convert(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
        left, right = _pair(a)
        dtype = dtype_of(node)
        second = g.operand(right, dtype)
        if a.get("alpha", 1) != 1:
            second = g.node("Mul", [second, g.operand(a["alpha"], dtype)])
        return g.node(op, [g.operand(left, dtype), second])

    return convert


def comparison(op: str, *, negated: bool = False) -> Converter:
    """A comparison in the dtype where the operands meet; bool result."""

    def convert(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
        left, right = _pair(a)
        dtype = _common(left, right)
        found = g.node(op, [g.operand(left, dtype), g.operand(right, dtype)])
        return g.node("Not", [found]) if negated else found

    return convert


def logical(on_bool: str, on_bits: str) -> Converter:
    """and, or, xor, not: of booleans, or of the bits of integers."""

    def convert(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
        dtype = dtype_of(node)
        operands = [v for v in a.values() if v is not None][: 1 if on_bool == "Not" else 2]
        op = on_bool if dtype == torch.bool else on_bits
        return g.node(op, [g.operand(v, dtype) for v in operands])

    return convert


def unary(op: str) -> Converter:
    """An elementwise op of one operand, which torch promotes to the dtype of the result."""

    def convert(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
        return g.node(op, [g.operand(next(iter(a.values())), dtype_of(node))])

    return convert


def identity(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    """clone, contiguous, alias: values have no memory in ONNX. Casts: the dtype of the result."""
    source = next(iter(a.values()))
    return g.operand(source, dtype_of(node))


def _divide(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    left, right = _pair(a)
    dtype, mode = dtype_of(node), a.get("rounding_mode")
    found = g.node("Div", [g.operand(left, dtype), g.operand(right, dtype)])
    if mode is None or not dtype.is_floating_point:
        if mode == "floor" and not dtype.is_floating_point:
            raise Unsupported("integer division that rounds down")
        return found
    if mode != "floor":
        raise Unsupported(f"division with rounding_mode={mode!r}")
    return g.node("Floor", [found])


def _subtract_reversed(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    left, right = _pair(a)
    return str(binary("Sub")(g, node, {"self": right, "other": left, "alpha": a.get("alpha", 1)}))


def _size_division(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    """`//`: sizes are not negative, so that division which cuts rounds down."""
    left, right = _pair(a)
    if isinstance(node.meta["val"], torch.Tensor):
        return _divide(g, node, {"self": left, "other": right, "rounding_mode": "floor"})
    return g.node("Div", [g.operand(left, torch.int64), g.operand(right, torch.int64)])


def _remainder(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    left, right = _pair(a)
    dtype = dtype_of(node)
    if dtype.is_floating_point:
        raise Unsupported("remainder of floating-point numbers")
    return g.node("Mod", [g.operand(left, dtype), g.operand(right, dtype)])


def _rsqrt(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("Reciprocal", [unary("Sqrt")(g, node, a)])


def _silu(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    x = g.name(a["self"])
    return g.node("Mul", [x, g.node("Sigmoid", [x])])


def _gelu(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("Gelu", [g.name(a["self"])], approximate=a.get("approximate") or "none")


def _exponential_minus_one(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype = dtype_of(node)
    return g.node("Sub", [g.node("Exp", [g.operand(a["self"], dtype)]), g.constant(1, dtype)])


def _clamp(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype = dtype_of(node)
    found = g.operand(a["self"], dtype)
    for op, bound in (("Max", a.get("min")), ("Min", a.get("max"))):
        if bound is not None:
            found = g.node(op, [found, g.operand(bound, dtype)])
    return found


def _where(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype = dtype_of(node)
    condition = g.operand(a["condition"], torch.bool)
    return g.node("Where", [condition, g.operand(a["self"], dtype), g.operand(a["other"], dtype)])


def _masked_fill(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype = dtype_of(node)
    fill = g.operand(a["value"], dtype)
    return g.node("Where", [g.operand(a["mask"], torch.bool), fill, g.operand(a["self"], dtype)])


def reduction(op: str) -> Converter:
    """A reduction over axes, given as an input since opset 18."""

    def convert(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
        dtype = dtype_of(node)
        axes = a.get("dim")
        axes = list(range(rank_of(a["self"]))) if axes is None or axes == [] else axes
        axes = [axes] if isinstance(axes, int) else list(axes)
        source = g.operand(a["self"], dtype)
        return g.node(op, [source, g.constant(axes, torch.int64)], keepdims=int(bool(a.get("keepdim"))))

    return convert


def _softmax(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype = dtype_of(node)
    return g.node("Softmax", [g.operand(a["self"], dtype)], axis=a["dim"])


def _cumsum(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("CumSum", [g.operand(a["self"], dtype_of(node)), g.constant(a["dim"], torch.int64)])


def _matmul(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("MatMul", [g.name(v) for v in _pair(a)])


def _addmm(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise Unsupported(f"addmm with beta={a['beta']}, alpha={a['alpha']}")
    return g.node("Add", [g.node("MatMul", [g.name(a["mat1"]), g.name(a["mat2"])]), g.name(a["self"])])


def _convolution(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    source, weight = a["input"], a["weight"]
    spatial = rank_of(source) - 2

    def spread(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * spatial if len(values) == 1 else values

    padding = a["padding"]
    if isinstance(padding, str):
        raise Unsupported(f"convolution with padding={padding!r}")
    pads = spread(padding)
    inputs = [g.name(source), g.name(weight)] + ([g.name(a["bias"])] if a["bias"] is not None else [])
    return g.node(
        "Conv",
        inputs,
        strides=spread(a["stride"]),
        pads=pads * 2,
        dilations=spread(a["dilation"]),
        group=a["groups"],
        kernel_shape=[int(n) for n in shape_of(weight)[2:]],
    )


def _power(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    left, right = _pair(a)
    dtype = dtype_of(node)
    base = g.operand(left, dtype)
    if right == 2:
        return g.node("Mul", [base, base])
    return g.node("Pow", [base, g.operand(right, dtype)])


def _isfinite_op(op: str) -> Converter:
    def convert(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
        return g.node(op, [g.name(a["self"])])

    return convert


def _nan_to_num(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    if a.get("posinf") is not None or a.get("neginf") is not None:
        raise Unsupported("nan_to_num with values for infinities")
    dtype, x = dtype_of(node), g.name(a["self"])
    top = torch.finfo(dtype).max
    bounded = g.node("Clip", [x, g.constant(-top, dtype), g.constant(top, dtype)])
    nan = a.get("nan")
    return g.node("Where", [g.node("IsNaN", [x]), g.constant(0.0 if nan is None else nan, dtype), bounded])


def _leaky(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("LeakyRelu", [g.name(a["self"])], alpha=float(a["negative_slope"]))


def _round(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    if a.get("decimals"):
        raise Unsupported("round to decimals")
    return str(unary("Round")(g, node, a))


def _log1p(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype = dtype_of(node)
    return g.node("Log", [g.node("Add", [g.operand(a["self"], dtype), g.constant(1, dtype)])])


def _log2(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    dtype = dtype_of(node)
    return g.node("Div", [g.node("Log", [g.operand(a["self"], dtype)]), g.constant(math.log(2), dtype)])


def _cast_size(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.cast(g.name(next(iter(a.values()))), dtype_of(next(iter(a.values()))), dtype_of(node))


_UNARY = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tanh": "Tanh",
    "sigmoid": "Sigmoid", "relu": "Relu", "abs": "Abs", "erf": "Erf", "reciprocal": "Reciprocal",
    "floor": "Floor", "ceil": "Ceil", "softplus": "Softplus", "hardswish": "HardSwish", "mish": "Mish",
    "sign": "Sign", "tan": "Tan", "atan": "Atan",
}  # fmt: skip
_IDENTITY = (
    "clone", "contiguous", "alias", "detach", "to", "_to_copy", "type_as", "lift_fresh_copy",
)  # fmt: skip

POINTWISE: dict[str, Converter] = {
    **{f"aten::{name}": unary(op) for name, op in _UNARY.items()},
    **{f"aten::{name}": identity for name in _IDENTITY},
    "aten::add": binary("Add"),
    "aten::sub": binary("Sub"),
    "aten::rsub": _subtract_reversed,
    "aten::mul": binary("Mul"),
    "aten::div": _divide,
    "aten::true_divide": _divide,
    "aten::floordiv": _size_division,
    "aten::floor_divide": _size_division,
    "aten::remainder": _remainder,
    "aten::mod": _remainder,
    "aten::pow": _power,
    "aten::maximum": binary("Max"),
    "aten::minimum": binary("Min"),
    "aten::sym_max": binary("Max"),
    "aten::sym_min": binary("Min"),
    "aten::sym_float": _cast_size,
    "aten::eq": comparison("Equal"),
    "aten::ne": comparison("Equal", negated=True),
    "aten::lt": comparison("Less"),
    "aten::le": comparison("LessOrEqual"),
    "aten::gt": comparison("Greater"),
    "aten::ge": comparison("GreaterOrEqual"),
    **{f"aten::{name}": logical("And", "BitwiseAnd") for name in ("__and__", "bitwise_and", "logical_and")},
    **{f"aten::{name}": logical("Or", "BitwiseOr") for name in ("__or__", "bitwise_or", "logical_or")},
    **{f"aten::{name}": logical("Xor", "BitwiseXor") for name in ("__xor__", "bitwise_xor", "logical_xor")},
    **{f"aten::{name}": logical("Not", "BitwiseNot") for name in ("bitwise_not", "logical_not")},
    "aten::where": _where,
    "aten::masked_fill": _masked_fill,
    "aten::clamp": _clamp,
    "aten::clamp_min": _clamp,
    "aten::clamp_max": _clamp,
    "aten::rsqrt": _rsqrt,
    "aten::silu": _silu,
    "aten::gelu": _gelu,
    "aten::expm1": _exponential_minus_one,
    "aten::log1p": _log1p,
    "aten::log2": _log2,
    "aten::round": _round,
    "aten::leaky_relu": _leaky,
    "aten::isnan": _isfinite_op("IsNaN"),
    "aten::isinf": _isfinite_op("IsInf"),
    "aten::nan_to_num": _nan_to_num,
    "aten::mean": reduction("ReduceMean"),
    "aten::sum": reduction("ReduceSum"),
    "aten::amax": reduction("ReduceMax"),
    "aten::amin": reduction("ReduceMin"),
    "aten::softmax": _softmax,
    "aten::_softmax": _softmax,
    "aten::cumsum": _cumsum,
    "aten::matmul": _matmul,
    "aten::mm": _matmul,
    "aten::bmm": _matmul,
    "aten::addmm": _addmm,
    "aten::conv1d": _convolution,
    "aten::conv2d": _convolution,
    "aten::conv3d": _convolution,
}
"""By schema name; python's operators on sizes have the names of their ATen twins."""
