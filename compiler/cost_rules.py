"""Flops of aten ops by family, as formulas; tables that grow by one name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

Size: TypeAlias = Any
"""int or sympy.Expr (sympy has no types; the alias says what is meant)."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NO_COST = _words(
    "sym_size sym_stride sym_numel sym_storage_offset _assert_tensor_metadata _assert_async _assert_scalar "
    "empty empty_like empty_strided empty_permuted new_empty detach alias sym_constrain_range_for_size "
    "sym_constrain_range _local_scalar_dense item"
)
"""Run nothing on the device, or only name memory."""

MAYBE_VIEWS = _words(
    "reshape flatten contiguous to type_as dropout feature_dropout alpha_dropout reshape_as view_as_complex "
    "view_as_real movedim expand_as float half bfloat16 double unflatten"
)
"""Give back their input's memory when nothing has to change."""

GATHERS = _words("embedding index index_select gather take take_along_dim")
"""Read as much of their first argument as they return."""

WRITES_INTO = {
    "kv_update": "new",
    "index_copy": "source",
    "index_copy_": "source",
    "index_put": "values",
    "index_put_": "values",
    "slice_scatter": "src",
    "select_scatter": "src",
    "scatter": "src",
    "copy_": "src",
}
"""Ops that write the named argument into their first one, which is not read when that happens in place."""

FILLS = _words("zeros_like ones_like full_like rand_like randn_like new_zeros new_ones new_full")
"""Take a tensor for its shape only."""

_MOVES = _words(
    "cat stack hstack vstack clone copy copy_ pad constant_pad_nd roll flip repeat tile repeat_interleave to "
    "_to_copy type_as float half bfloat16 double contiguous reshape flatten index index_select gather take "
    "embedding index_put index_put_ index_copy index_copy_ slice_scatter select_scatter scatter tril triu "
    "arange zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor tensor "
    "lift_fresh_copy one_hot expand_copy meshgrid unfold im2col pixel_shuffle pixel_unshuffle fill eye "
    "concat concatenate channel_shuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d"
)

_FLOPS_PER_ELEMENT = {
    **dict.fromkeys(_words("softmax _softmax log_softmax _log_softmax _safe_softmax"), 5),
    **dict.fromkeys(_words("layer_norm native_layer_norm group_norm native_group_norm"), 6),
    **dict.fromkeys(
        _words("batch_norm native_batch_norm instance_norm _native_batch_norm_legit_no_training"), 6
    ),
    **dict.fromkeys(_words("rms_norm _fused_rms_norm"), 4),
    **dict.fromkeys(_words("silu gelu mish softplus hardswish elu selu celu"), 5),
    **dict.fromkeys(_words("var std var_mean std_mean"), 4),
    **dict.fromkeys(_words("cumsum cumprod logcumsumexp cummax cummin"), 1),
    **dict.fromkeys(_words("dropout bernoulli masked_fill masked_scatter logical_not logcumsumexp"), 1),
}
"""Per element of the first tensor; activations count as in `gated_mlp`, norms as the semantic ops do."""

_LEFT_FACTOR = {
    **dict.fromkeys(_words("mm bmm matmul mv _int_mm _scaled_mm"), "self"),
    **dict.fromkeys(_words("addmm _addmm_activation"), "mat1"),
    **dict.fromkeys(_words("baddbmm addbmm"), "batch1"),
}
"""Matrix products by the argument whose last axis is contracted."""

_CONVOLUTIONS = _words(
    "conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d"
)


def size_of(value: Any) -> Size:
    """A dimension as an int or a sympy expression; never asks for the value of a symbol, so adds no guard."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_Integer else expr
    return value


def product(sizes: Iterable[Any]) -> Size:
    """Product of dimensions: the ints first, then the symbols, so that few symbolic products are built."""
    values = [size_of(s) for s in sizes]
    number = math.prod(v for v in values if isinstance(v, int))
    for value in values:
        if not isinstance(value, int):
            number = number * value
    return number


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Every tensor in a node's value."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_of(item)]
    return []


def rule_flops(name: str, tags: Sequence[Any], arguments: Mapping[str, Any], value: Any) -> Size | None:
    """Flops of an aten op by its name without overload, its tags, its arguments by name and its value.

    None when there is no rule. Bias additions inside an op are left out, as in the semantic ops.
    """
    if name in _MOVES or name in FILLS:
        return 0
    if name in _LEFT_FACTOR:
        return 2 * product(tensors_of(value)[0].shape) * size_of(arguments[_LEFT_FACTOR[name]].shape[-1])
    if name == "linear":
        return 2 * product(arguments["input"].shape) * product(arguments["weight"].shape[:-1])
    if name in ("dot", "vdot"):
        return 2 * product(arguments["self"].shape)
    if name in _CONVOLUTIONS:
        return _convolution(name, arguments, value)
    if name == "scaled_dot_product_attention" or name.startswith("_scaled_dot_product"):
        return _attention(arguments["query"], arguments["key"], arguments["value"])
    if name == "einsum":
        return _einsum(arguments["equation"], arguments["tensors"])
    first = next((t for a in arguments.values() for t in tensors_of(a)), None)
    plain = name.removesuffix("_")
    if plain in _FLOPS_PER_ELEMENT and first is not None:
        return _FLOPS_PER_ELEMENT[plain] * product(first.shape)
    if torch.Tag.reduction in tags and first is not None:
        return product(first.shape)
    if torch.Tag.pointwise in tags:
        return sum(product(t.shape) for t in tensors_of(value))
    return None


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Size:
    """Both products and a softmax of 5 per score; a causal mask does not halve it, as in `attention`."""
    rows = product(q.shape[:-1])
    return rows * size_of(k.shape[-2]) * (2 * size_of(q.shape[-1]) + 2 * size_of(v.shape[-1]) + 5)


def _convolution(name: str, arguments: Mapping[str, Any], value: Any) -> Size:
    """Each element of the smaller grid meets weight[0]'s elements: outputs, or inputs when transposed."""
    transposed = "transpose" in name or bool(arguments.get("transposed", False))
    grid = arguments["input"] if transposed else value
    return 2 * product(grid.shape) * product(arguments["weight"].shape[1:])


def _einsum(equation: str, operands: Sequence[torch.Tensor]) -> Size | None:
    """Two operands without an ellipsis: every combination of the letters is one multiply-add."""
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        return None
    letters: dict[str, Any] = {}
    for term, operand in zip(terms, operands, strict=True):
        letters.update(zip(term, operand.shape, strict=True))
    return 2 * product(letters.values())
