"""One view of a graph node's operator and arguments: names from the op schema, defaults filled in."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from tilewright.compiler.graph_schema import signature

GETITEM = "getitem"

_OPERATORS = {
    operator.add: "aten::add",
    operator.sub: "aten::sub",
    operator.mul: "aten::mul",
    operator.truediv: "aten::div",
    operator.neg: "aten::neg",
    operator.pow: "aten::pow",
    operator.matmul: "aten::matmul",
    operator.and_: "aten::bitwise_and",
    operator.or_: "aten::bitwise_or",
    operator.invert: "aten::bitwise_not",
    operator.getitem: GETITEM,
}


@functools.lru_cache(maxsize=4096)
def target_name(target: Any) -> str:
    """`aten::mul` for any overload, operator or torch function that means it; `getitem` for tuple access."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    if isinstance(target, str):
        return f"aten::{target}"
    return _OPERATORS.get(target, f"aten::{getattr(target, '__name__', '?')}")


def op_name(node: fx.Node) -> str:
    """Operator name of a call node, the node kind (`placeholder`, `get_attr`, `output`) otherwise."""
    return target_name(node.target) if node.op in ("call_function", "call_method") else str(node.op)


@functools.lru_cache(maxsize=4096)
def schema_arguments(target: torch._ops.OpOverload) -> tuple[tuple[str, bool, Any], ...]:
    """(name, has default, default) for each argument of an overload, in order."""
    sig = signature(target)
    return tuple((name, name in sig.defaults, sig.defaults.get(name)) for name in sig.names)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call node by schema name, defaults filled; `0`, `1`, ... where there is no
    schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    sig = signature(node.target)
    given = dict(zip(sig.positional, node.args, strict=False))
    given.update(node.kwargs)
    return {name: given[name] if name in given else sig.defaults.get(name) for name in sig.names}


def tensor_meta(value: Any) -> torch.Tensor | None:
    """The fake tensor of a node, None for anything without one."""
    meta = value.meta.get("val") if isinstance(value, fx.Node) else None
    return meta if isinstance(meta, torch.Tensor) else None
