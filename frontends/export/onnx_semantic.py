"""Semantic ops as the standard operators that mean the same; what has none is written as its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilewright.compiler.schema import arguments, target_name
from tilewright.frontends.export.onnx_graph import OnnxGraph, Unsupported, dtype_of, rank_of, shape_of
from tilewright.frontends.export.onnx_held import grouped_query
from tilewright.frontends.export.onnx_pointwise import Arguments, Converter
from tilewright.frontends.export.onnx_rope import rope_halves, same_size


def fits(node: fx.Node) -> bool:
    """True when a standard operator means exactly what this call of a semantic op means."""
    name = target_name(node.target)
    a = arguments(node)
    if name == "tilewright::attention":
        plain = a["sinks"] is None and a["softcap"] == 0.0
        return plain and rank_of(a["q"]) == rank_of(a["k"]) == 4 and _mask_rank(a["mask"]) <= 4
    if name in ("tilewright::rms_norm", "tilewright::add_rms_norm"):
        return dtype_of(a["x"]) == torch.float32
    if name == "tilewright::rope":
        return rope_halves(a) is not None
    return name in SEMANTIC


def _mask_rank(mask: Any) -> int:
    return 0 if mask is None else rank_of(mask)


def _attention(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    if node in g.held_steps:
        return grouped_query(g, node, g.held_steps[node])
    q, k, v, mask = (a[name] for name in ("q", "k", "v", "mask"))
    scale = shape_of(q)[-1] ** -0.5 if a["scale"] is None else a["scale"]
    inputs = [g.name(q), g.name(k), g.name(v)]
    if mask is not None:
        inputs.append(_whole_mask(g, q, k, mask))
    return g.node("Attention", inputs, scale=float(scale), is_causal=int(a["causal"]))


def _whole_mask(g: OnnxGraph, q: fx.Node, k: fx.Node, mask: fx.Node) -> str:
    """The mask as [.., .., S, T]: runtimes broadcast it over batch and heads only."""
    name, known = g.name(mask), shape_of(mask)
    if len(known) < 4:
        axes = g.constant(list(range(4 - len(known))), torch.int64)
        name = g.shared("mask", "Unsqueeze", [name, axes])
    lines, columns = shape_of(q)[2], shape_of(k)[2]
    if same_size(known[-2], lines) and same_size(known[-1], columns):
        return name
    ends = [_size_name(g, node, 2) for node in (q, k)]
    shape = g.node("Concat", [g.constant([1, 1], torch.int64), *ends], axis=0)
    return g.shared("whole mask", "Expand", [name, shape])


def _size_name(g: OnnxGraph, node: fx.Node, axis: int) -> str:
    known = shape_of(node)[axis]
    if isinstance(known, int):
        return g.constant([known], torch.int64)
    return g.shared(axis, "Shape", [g.name(node)], start=axis, end=axis + 1)


def _linear(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return linear(g, a["x"], a["weight"], a["bias"])


def linear(g: OnnxGraph, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> str:
    """x W^T + b. A weight that only linear layers read is stored transposed; a tied one stays as it is."""
    only_linear = all(target_name(user.target).startswith("tilewright::linear") for user in weight.users)
    if g.is_held(weight) and only_linear:
        path = g.program.path_of(weight)
        name = g.held(("transposed", weight), path, lambda: g.tensor(weight).t().contiguous())
    else:
        name = g.shared("transposed", "Transpose", [g.name(weight)], perm=[1, 0])
    found = g.node("MatMul", [g.name(x), name])
    return found if bias is None else g.node("Add", [found, g.name(bias)])


def _linear_multi(g: OnnxGraph, node: fx.Node, a: Arguments) -> list[str]:
    return [linear(g, a["x"], w, b) for w, b in zip(a["weights"], a["biases"], strict=True)]


def _embedding(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return g.node("Gather", [g.name(a["weight"]), g.name(a["indices"])], axis=0)


def _rms(g: OnnxGraph, x: str, a: Arguments) -> str:
    columns = shape_of(a["x"])[-1]
    if a["weight"] is None:
        scale = g.constant(torch.ones(columns), torch.float32)
    else:
        scale = g.operand(a["weight"], torch.float32)
        if a["offset"] != 0.0:
            scale = g.shared("offset", "Add", [scale, g.constant(a["offset"], torch.float32)])
    return g.node("RMSNormalization", [x, scale], axis=-1, epsilon=float(a["eps"]))


def _rms_norm(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    return _rms(g, g.name(a["x"]), a)


def _add_rms_norm(g: OnnxGraph, node: fx.Node, a: Arguments) -> list[str]:
    total = g.node("Add", [g.name(a["residual"]), g.name(a["x"])])
    shapes = [[str(n) for n in shape_of(a[name])] for name in ("residual", "x")]
    if shapes[0] == shapes[1] and rank_of(node.args[0]) in (2, 3):
        g.normed_sums.add(total)
    return [_rms(g, total, a), total]


def _layer_norm(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    sizes, dtype = list(a["normalized_shape"]), dtype_of(a["x"])
    scale = g.constant(torch.ones(sizes), dtype) if a["weight"] is None else g.name(a["weight"])
    shift = [] if a["bias"] is None else [g.name(a["bias"])]
    inputs = [g.name(a["x"]), scale, *shift]
    return g.node("LayerNormalization", inputs, axis=-len(sizes), epsilon=float(a["eps"]))


def _gated_mlp(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    gate, kind = g.name(a["gate"]), a["activation"]
    if kind == "silu":
        gate = g.node("Mul", [gate, g.node("Sigmoid", [gate])])
    elif kind in ("gelu", "gelu_tanh"):
        gate = g.node("Gelu", [gate], approximate="tanh" if kind == "gelu_tanh" else "none")
    else:
        gate = g.node({"relu": "Relu", "sigmoid": "Sigmoid"}[kind], [gate])
    return g.node("Mul", [gate, g.name(a["up"])])


def _rope(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    half, tables = rope_halves(a), []
    for table in (a["cos"], a["sin"]):
        ends = [g.constant([n], torch.int64) for n in (0, half, 3)]
        first = g.shared("half", "Slice", [g.name(table), *ends])
        tables.append(g.shared("half", "Squeeze", [first, g.constant([1], torch.int64)]))
    return g.node("RotaryEmbedding", [g.name(a["x"]), *tables])


def _kv_update(g: OnnxGraph, node: fx.Node, a: Arguments) -> str:
    """The cache with new rows where they belong, so that a runtime which holds the result in the place of the
    cache moves nothing else."""
    if any(node in (step.k, step.v) for step in g.held_steps.values()):
        return g.fresh()  # GroupQueryAttention will make it
    axis = a["dim"] % rank_of(node)
    lead = shape_of(node)[:axis]
    if not all(isinstance(n, int) for n in lead):
        raise Unsupported("a cache whose batch or heads only the call knows")
    grid = torch.zeros([*lead, 1, axis + 1], dtype=torch.int64)
    for d, n in enumerate(lead):
        grid[..., d] = torch.arange(n).reshape([n if d == e else 1 for e in range(axis)] + [1])
    column = g.shared(
        "column", "Unsqueeze", [g.operand(a["positions"], torch.int64), g.constant([-1], torch.int64)]
    )
    last = g.constant([0] * axis + [1], torch.int64)
    places = g.shared("places", "Mul", [column, last])
    where = g.shared("places", "Add", [places, g.constant(grid, torch.int64)])
    return g.node("ScatterND", [g.name(a["cache"]), where, g.name(a["new"])])


SEMANTIC: dict[str, Converter] = {
    "tilewright::attention": _attention,
    "tilewright::linear": _linear,
    "tilewright::linear_multi": _linear_multi,
    "tilewright::embedding": _embedding,
    "tilewright::rms_norm": _rms_norm,
    "tilewright::add_rms_norm": _add_rms_norm,
    "tilewright::layer_norm": _layer_norm,
    "tilewright::gated_mlp": _gated_mlp,
    "tilewright::rope": _rope,
    "tilewright::kv_update": _kv_update,
}
"""By schema name; a call that does not `fit` is written as its definition."""
