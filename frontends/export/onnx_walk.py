"""From a program to an ONNX model: every node by its converter, what has none reported all at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import ModelProto, ValueInfoProto, helper
from torch import Tensor, fx

from tilewright.compiler.diagnostics import ExportError
from tilewright.compiler.graph import dead_code
from tilewright.compiler.graph_text import op_name
from tilewright.compiler.ops import semantic_op
from tilewright.compiler.program import InputKind, Program
from tilewright.compiler.schema import arguments, target_name
from tilewright.frontends.export.captured import axis_text
from tilewright.frontends.export.onnx_contributed import fold_contributed
from tilewright.frontends.export.onnx_custom import CustomOperators
from tilewright.frontends.export.onnx_graph import (
    IR_VERSION,
    OPSET,
    OnnxGraph,
    Unsupported,
    dtype_of,
    onnx_type,
    place,
)
from tilewright.frontends.export.onnx_held import held_steps
from tilewright.frontends.export.onnx_layout import LAYOUT
from tilewright.frontends.export.onnx_pointwise import POINTWISE, Converter
from tilewright.frontends.export.onnx_quantized import QUANTIZED
from tilewright.frontends.export.onnx_reshapes import fold_reshapes
from tilewright.frontends.export.onnx_semantic import SEMANTIC, fits
from tilewright.frontends.export.onnx_sparse import SPARSE
from tilewright.frontends.lowering import inline_definition

CONVERTERS: dict[str, Converter] = {**POINTWISE, **LAYOUT, **SEMANTIC, **QUANTIZED, **SPARSE}
CHECKS = ("aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::sym_constrain_range_for_size")
"""Calls that only check; nothing is written for them."""
_NODES_SHOWN = 3


@dataclass
class OnnxModel:
    """A model without its weights: they go into a file of their own."""

    proto: ModelProto
    weights: dict[str, Tensor]
    """Every initializer by name, in the order of first use."""
    inputs: list[dict[str, Any]]
    """name, dtype and shape (numbers and names of dynamic axes) of each input, in order."""
    outputs: list[dict[str, Any]]
    given: list[int]
    """Which of the program's inputs each input is."""


def to_onnx(
    program: Program,
    input_names: Mapping[str, str],
    output_names: Sequence[str],
    axes: Mapping[str, str],
    custom: CustomOperators | None = None,
    position: str = "",
) -> OnnxModel:
    """The ONNX model of a program after its passes.

    input_names: placeholder name -> name in the model; output_names: one per output; axes: symbol of a
    dynamic size -> name; custom: gathers the operators of ours that are to be used; position: the input that
    says how much of its buffers a decode step holds, for onnxruntime's own operator. Raises ExportError that
    lists every operator without a counterpart.
    """
    _inline_the_rest(program, custom)
    g = OnnxGraph(program)
    if position:
        g.held_steps = held_steps(program, position)
    inputs, given = _inputs(g, input_names, axes)
    _walk(g, custom)
    results = _results(g, list(output_names))
    kept = {value for _, _, value in results}
    fold_reshapes(g, kept)
    fold_contributed(g, kept)
    ins = [_value_info(name, dtype, shape) for name, dtype, shape in inputs]
    outs, renamed = [], dict[str, str]()
    for name, node, value in results:
        if value in renamed or value not in {o for n in g.nodes for o in n.output}:
            value = g.node("Identity", [value])
        renamed[value] = name
        outs.append((name, dtype_of(node), _shape(node, axes)))
    _rename(g, renamed)
    imports = [helper.make_opsetid("", OPSET), *[helper.make_opsetid(d, 1) for d in sorted(g.domains)]]
    graph = helper.make_graph(g.nodes, "main", ins, [_value_info(*o) for o in outs])
    functions = list(g.functions.values())
    proto = helper.make_model(graph, opset_imports=imports, producer_name="tilewright", functions=functions)
    proto.ir_version = IR_VERSION
    used = {name for node in g.nodes for name in node.input}
    weights = {name: tensor for name, tensor in g.weights.items() if name in used}
    return OnnxModel(proto, weights, [_row(i) for i in inputs], [_row(o) for o in outs], given)


def _inline_the_rest(program: Program, custom: CustomOperators | None) -> None:
    """Write semantic ops that no operator means as their definitions."""
    traces: dict[Any, fx.GraphModule] = {}
    for node in list(program.graph.nodes):
        op = semantic_op(node.target) if node.op == "call_function" else None
        if op is None or op.opaque or (target_name(node.target) in CONVERTERS and fits(node)):
            continue
        if custom is not None and custom.choice(node) is not None:
            continue
        inline_definition(program, op, node, traces)
    dead_code(program.graph)


def _walk(g: OnnxGraph, custom: CustomOperators | None) -> None:
    missing: dict[tuple[str, str, str], list[str]] = {}
    for node in g.program.graph.nodes:
        if node.op != "call_function" or target_name(node.target) in CHECKS or _is_write(node):
            continue
        g.at(node)
        try:
            g.values[node] = _written(g, node, custom)
        except Unsupported as error:
            missing.setdefault((op_name(node.target), place(node), str(error)), []).append(node.name)
            g.values[node] = _stand_in(g, node)  # what reads it is judged as well
    if missing:
        raise _refusal(missing)


def _written(g: OnnxGraph, node: fx.Node, custom: CustomOperators | None) -> Any:
    choice = custom.choice(node) if custom is not None else None
    if custom is not None and choice is not None:
        return custom.write(g, node, choice)
    convert = CONVERTERS.get(target_name(node.target))
    if convert is None:
        raise Unsupported("has no ONNX operator")
    return convert(g, node, arguments(node))


def _stand_in(g: OnnxGraph, node: fx.Node) -> Any:
    """Names for the results of a call that cannot be written; the model is refused behind the walk."""
    results = node.meta.get("val")
    return [g.fresh() for _ in results] if isinstance(results, (list, tuple)) else g.fresh()


def _refusal(missing: Mapping[tuple[str, str, str], list[str]]) -> ExportError:
    """One row for the same call of many layers; every row names what and where it is."""
    rows = []
    for (op, where, reason), nodes in missing.items():
        more = f" and {len(nodes) - _NODES_SHOWN} more" if len(nodes) > _NODES_SHOWN else ""
        rows.append(f"{op} at {', '.join(nodes[:_NODES_SHOWN])}{more} ({where}): {reason}")
    count = sum(map(len, missing.values()))
    return ExportError(
        f"{count} calls cannot be written as ONNX: {'; '.join(rows)}",
        remedy="rewrite these lines, or export with format pt2",
    )


def _is_write(node: fx.Node) -> bool:
    """The copy into an input that ends a program which changes its state."""
    return target_name(node.target) == "aten::copy_" and isinstance(node.args[0], fx.Node)


def _inputs(
    g: OnnxGraph, names: Mapping[str, str], axes: Mapping[str, str]
) -> tuple[list[tuple[str, torch.dtype, list[Any]]], list[int]]:
    found, given = [], []
    specs = {spec.name: (i, spec) for i, spec in enumerate(g.program.inputs)}
    for node in g.program.graph.nodes:
        if node.op != "placeholder":
            continue
        index, spec = specs[node.name]
        if spec.kind is InputKind.WEIGHT and not spec.mutated:
            continue
        if not isinstance(node.meta.get("val"), Tensor):
            if node.users:
                raise ExportError(f"input {spec.name} is no tensor and the model reads it")
            continue
        name = g.fresh(names.get(node.name, _plain(spec.source or node.name)))
        g.values[node] = name
        found.append((name, dtype_of(node), _shape(node, axes)))
        given.append(index)
    return found, given


def _results(g: OnnxGraph, names: list[str]) -> list[tuple[str, fx.Node, str]]:
    """(name, node, value) of each output; what the program writes into its inputs comes last."""
    end = next(n for n in reversed(g.program.graph.nodes) if n.op == "output")
    values = [v for v in _leaves(end.args[0]) if isinstance(v, fx.Node)]
    names += [f"output{i}" for i in range(len(names), len(values))]
    found = [(name, v, g.name(v)) for name, v in zip(names, values, strict=False)]
    for node in g.program.graph.nodes:
        if node.op == "call_function" and _is_write(node):
            target, value = node.args[0], node.args[1]
            found.append((f"{g.name(target)}.next", value, g.name(value)))
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _rename(g: OnnxGraph, names: Mapping[str, str]) -> None:
    """Give values the names that the outputs must have."""
    taken = {name: g.fresh(name + ".inner") for name in names.values()}
    swap = {**taken, **names}
    for node in g.nodes:
        for row in (node.input, node.output):
            for i, name in enumerate(row):
                if name in swap:
                    row[i] = swap[name]


def _shape(node: fx.Node, axes: Mapping[str, str]) -> list[Any]:
    return [n if isinstance(n, int) else axis_text(n, axes) for n in node.meta["val"].shape]


def _value_info(name: str, dtype: torch.dtype, shape: list[Any]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx_type(dtype), shape)


def _row(value: tuple[str, torch.dtype, list[Any]]) -> dict[str, Any]:
    name, dtype, shape = value
    return {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": shape}


def _plain(source: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", source)
