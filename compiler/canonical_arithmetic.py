"""Rules that give arithmetic, products, constants and factories one spelling, bit for bit."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tilewright.compiler.canonical_context import Canonical, Rule
from tilewright.compiler.graph import is_op, normalized_args, rank, signature, tensor_val
from tilewright.compiler.storage_alias import base_name

aten = torch.ops.aten


def square(c: Canonical, node: fx.Node) -> bool:
    """`x * x` and `square(x)` of floats are `pow(x, 2)`, which computes x * x."""
    x = node.args[0]
    value = tensor_val(x)
    if value is None or not value.dtype.is_floating_point:
        return False
    if node.target is aten.mul.Tensor and node.args[1] is not x:
        return False
    return c.swap(node, aten.pow.Tensor_Scalar, (x, 2), "square")


def whole_exponent(c: Canonical, node: fx.Node) -> bool:
    """`pow(x, 2.0)` of floats is `pow(x, 2)`."""
    value, exponent = tensor_val(node.args[0]), node.args[1]
    if value is None or not value.dtype.is_floating_point or not isinstance(exponent, float):
        return False
    if not exponent.is_integer():
        return False
    return c.update(node, "whole-exponent", (node.args[0], int(exponent)))


def add_of_negative(c: Canonical, node: fx.Node) -> bool:
    """`x + (-y)` is `x - y`."""
    if node.kwargs or len(node.args) != 2:
        return False
    x, y = node.args
    if is_op(y, aten.neg.default) and isinstance(x, fx.Node):
        return c.swap(node, aten.sub.Tensor, (x, y.args[0]), "add-of-negative")  # type: ignore[union-attr]
    if is_op(x, aten.neg.default) and isinstance(y, fx.Node):
        return c.swap(node, aten.sub.Tensor, (y, x.args[0]), "add-of-negative")  # type: ignore[union-attr]
    return False


def matmul_form(c: Canonical, node: fx.Node) -> bool:
    """`mm` and `bmm` are `matmul`, which calls them for these ranks."""
    if node.target not in (aten.mm.default, aten.bmm.default):
        return False
    return c.swap(node, aten.matmul.default, node.args, "matmul-form")


def linear_form(c: Canonical, node: fx.Node) -> bool:
    """`matmul(x, w^T)` with a two-dimensional input w is `linear(x, w)`, which calls just that."""
    x, weight = node.args[0], _transposed_weight(node.args[1])
    if weight is None or not rank(x):
        return False
    return c.swap(node, aten.linear.default, (x, weight), "linear-form")


def addmm_form(c: Canonical, node: fx.Node) -> bool:
    """`addmm(b, x, w^T)` with scales of one is `linear(x, w, b)`, which calls just that in two dimensions."""
    given = normalized_args(node)
    weight = _transposed_weight(given["mat2"])
    if weight is None or rank(given["self"]) != 1 or given["beta"] != 1 or given["alpha"] != 1:
        return False
    return c.swap(node, aten.linear.default, (given["mat1"], weight, given["self"]), "linear-form")


def _transposed_weight(node: Any) -> fx.Node | None:
    if not is_op(node, aten.permute.default) or list(node.args[1]) != [1, 0]:
        return None
    weight = node.args[0]
    return weight if isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr") else None


_COMPARISONS = {
    getattr(aten, n).Tensor: getattr(aten, n).Scalar for n in ("eq", "ne", "lt", "le", "gt", "ge")
}
_SCALAR_FORMS = {
    **{getattr(aten, n).Tensor: getattr(aten, n).Tensor for n in ("add", "sub", "mul", "div")},
    **_COMPARISONS,
    aten.pow.Tensor_Tensor: aten.pow.Tensor_Scalar,
    aten.masked_fill.Tensor: aten.masked_fill.Scalar,
}


def fold_scalar(c: Canonical, node: fx.Node) -> bool:
    """A constant tensor without dimensions becomes a number where its dtype is that of the other operand."""
    form = _SCALAR_FORMS.get(node.target)
    if form is None or node.kwargs:
        return False
    last = len(node.args) - 1
    number = scalar_constant(c, node.args[last])
    x, constant = tensor_val(node.args[0]), tensor_val(node.args[last])
    if number is None or x is None or constant is None or x.dtype != constant.dtype or x.dim() == 0:
        return False
    if x.dtype in (torch.bool, torch.float16, torch.bfloat16) or x.dtype.is_complex:
        return False
    return c.swap(node, form, (*node.args[:last], number), "fold-scalar")


def scalar_constant(c: Canonical, node: Any) -> int | float | None:
    """The number in a constant without dimensions (`scalar_tensor`, `full([])`, captured); else None."""
    if is_op(node, aten.lift_fresh_copy.default, aten.detach.default):
        return scalar_constant(c, node.args[0])
    if is_op(node, aten.scalar_tensor.default) or (
        is_op(node, aten.full.default) and list(node.args[0]) == []
    ):
        number = node.args[-1]
        value = tensor_val(node)
        exact = value is not None and isinstance(number, int | float) and _exact(number, value.dtype)
        return number if exact else None
    if isinstance(node, fx.Node) and node.op == "get_attr" and "_tensor_constant" in str(node.target):
        value = getattr(c.gm, str(node.target), None)
        if type(value) is torch.Tensor and value.dim() == 0 and not value.is_complex():
            return value.item()  # type: ignore[return-value]
    return None


def _exact(number: float, dtype: torch.dtype) -> bool:
    """Whether a number survives in a dtype, so that the tensor and the number are the same operand."""
    with torch._C._DisableTorchDispatch():
        return bool(torch.tensor(number, dtype=dtype).item() == number)


_FACTORIES = frozenset(
    [
        "arange",
        "full",
        "zeros",
        "ones",
        "empty",
        "eye",
        "linspace",
        "rand",
        "randn",
        "randint",
        "scalar_tensor",
    ]
)
_LIKES = frozenset(["zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"])
_NEWS = {"new_zeros": aten.zeros.default, "new_ones": aten.ones.default, "new_full": aten.full.default}


def factory_form(c: Canonical, node: fx.Node) -> bool:
    """Factories name their dtype and device; strided layout and unpinned memory are not named."""
    value = tensor_val(node)
    if value is None or value.layout is not torch.strided:
        return False
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("layout", "pin_memory", "dtype", "device")}
    names = signature(node.target).names  # type: ignore[arg-type]
    if node.kwargs.get("pin_memory") or not {"dtype", "device"} <= set(names):
        return False
    source = tensor_val(node.args[0]) if node.args else None
    like = base_name(node.target) in _LIKES
    if not (like and source is not None and source.dtype == value.dtype):
        kwargs["dtype"] = value.dtype
    if not (like and source is not None and source.device == value.device):
        kwargs["device"] = value.device
    kwargs = {n: kwargs[n] for n in names if n in kwargs}
    return kwargs != dict(node.kwargs) and c.update(node, "factory-form", node.args, kwargs)


def new_form(c: Canonical, node: fx.Node) -> bool:
    """`x.new_zeros(size)` is `zeros(size)` with the dtype and device of the result."""
    value = tensor_val(node)
    if value is None or node.kwargs.get("pin_memory"):
        return False
    kwargs = {"dtype": value.dtype, "device": value.device}
    return c.swap(node, _NEWS[base_name(node.target)], node.args[1:], "factory-form", kwargs)


def arange_form(c: Canonical, node: fx.Node) -> bool:
    """`arange(0, n)` and `arange(0, n, 1)` are `arange(n)`."""
    if node.target not in (aten.arange.start, aten.arange.start_step):
        return False
    start, end, *step = node.args
    if type(start) is int and start == 0 and (not step or (type(step[0]) is int and step[0] == 1)):
        return c.swap(node, aten.arange.default, (end,), "arange-form", node.kwargs)
    if node.target is aten.arange.start_step and (not step or (type(step[0]) is int and step[0] == 1)):
        return c.swap(node, aten.arange.start, (start, end), "arange-form", node.kwargs)
    return False


def known_size(c: Canonical, node: fx.Node) -> bool:
    """Sizes and arithmetic on them that turned out to be plain numbers are written as numbers."""
    number = node.meta.get("val")
    if type(number) not in (int, float, bool):
        return False
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)
    return c.erase(node, "known-size")


SIZE_OPS = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)
PYTHON_OPS = frozenset(
    {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg}
)

RULES: dict[str, tuple[Rule, ...]] = {
    "mul": (square, fold_scalar),
    "square": (square,),
    "pow": (whole_exponent, fold_scalar),
    "add": (add_of_negative, fold_scalar),
    **{n: (fold_scalar,) for n in ["sub", "div", "eq", "ne", "lt", "le", "gt", "ge", "masked_fill"]},
    "mm": (matmul_form,),
    "bmm": (matmul_form,),
    "matmul": (linear_form,),
    "addmm": (addmm_form,),
    "arange": (arange_form, factory_form),
    **{n: (factory_form,) for n in sorted((_FACTORIES | _LIKES) - {"arange"})},
    **{n: (new_form,) for n in _NEWS},
}
"""Rules by the base name of the op they look at."""
