"""The one text form of a graph and of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from tilewright.compiler.diagnostics import printable
from tilewright.compiler.module_paths import module_path


def op_name(target: Any) -> str:
    """The short name of a call target: `add.Tensor`, `linear`, `tilewright.attention`, `getitem`."""
    if isinstance(target, torch._ops.OpOverload):
        space = "" if target.namespace == "aten" else f"{target.namespace}."
        name = target._schema.name.split("::")[1]
        return f"{space}{name}" + ("" if target._overloadname == "default" else f".{target._overloadname}")
    if isinstance(target, str):
        return printable(target)
    return getattr(target, "__name__", type(target).__name__)


def print_graph(graph: fx.Graph) -> str:
    """The one text form of a graph, one node a line, the same for graphs that differ only in node names.

    `%7 f32[1, 9, 32, 64] = permute(%6, [0, 2, 1, 3])  # layers.0.self_attn`
    """
    number = {n: f"%{i}" for i, n in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_text(node.args[0], number)}")
            continue
        where = printable(module_path(node))
        kind = describe(node.meta.get("val"))
        left = f"{number[node]} {kind}".rstrip()
        lines.append(f"{left} = {call_text(node, number)}" + (f"  # {where}" if where else ""))
    return "\n".join(lines)


_SHORT_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def describe(value: Any) -> str:
    """`f32[2, 3]` for a tensor, `sym s0` for a symbolic number, else the type name; empty when unknown."""
    if isinstance(value, torch.Tensor):
        name = _SHORT_DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{name}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return f"sym {value}"
    if isinstance(value, list | tuple):
        return f"({', '.join(describe(v) for v in value)})"
    return "" if value is None else type(value).__name__


def call_text(node: fx.Node, number: Mapping[fx.Node, str]) -> str:
    if node.op == "placeholder":
        return "input"
    name = op_name(node.target)
    if node.op == "get_attr":
        return f"attribute {name}"
    given = [_text(a, number) for a in node.args]
    given += [f"{k}={_text(v, number)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(given)})"


def _text(value: Any, number: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return number[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(v, number) for v in value)}]"
    if isinstance(value, torch.dtype):
        return _SHORT_DTYPES.get(value, str(value))
    return repr(value)


def line_of(node: fx.Node) -> str:
    """One node by itself for messages: name, call with its inputs named, what it computes."""
    text = call_text(node, {n: f"%{n.name}" for n in node.all_input_nodes})
    return f"%{node.name} {describe(node.meta.get('val'))} = {text}"
