"""One view of a graph node's operator and arguments: names from the op schema, defaults filled in."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

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
    return tuple(
        (a.name, a.has_default_value(), a.default_value if a.has_default_value() else None)
        for a in target._schema.arguments
    )


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call node by schema name, defaults filled; `0`, `1`, ... where there is no
    schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}
    given = dict(zip((a[0] for a in schema_arguments(node.target)), node.args, strict=False))
    given.update(node.kwargs)
    return {name: given.get(name, default) for name, _, default in schema_arguments(node.target)}


def tensor_meta(value: Any) -> torch.Tensor | None:
    """The fake tensor of a node, None for anything without one."""
    meta = value.meta.get("val") if isinstance(value, fx.Node) else None
    return meta if isinstance(meta, torch.Tensor) else None
