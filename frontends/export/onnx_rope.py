"""When a rotary embedding is the one that ONNX operators mean: halves of a head, one table for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from tilewright.compiler.schema import arguments, target_name
from tilewright.frontends.export.onnx_graph import dtype_of, rank_of, shape_of


def same_size(a: Any, b: Any) -> bool:
    """True for equal sizes, be they numbers or symbols."""
    return str(a) == str(b)


_THROUGH = ("aten::unsqueeze", "aten::cos", "aten::sin", "aten::to", "aten::mul", "aten::clone")


def _is_doubled(node: Any) -> bool:
    """True when the last axis provably holds the same half twice: elementwise work on `cat((f, f), -1)`."""
    while isinstance(node, fx.Node):
        a, name = arguments(node), target_name(node.target)
        if name == "aten::cat":
            parts = a["tensors"]
            return len(parts) == 2 and parts[0] is parts[1] and a["dim"] % rank_of(node) == rank_of(node) - 1
        if name not in _THROUGH or (name == "aten::unsqueeze" and a["dim"] in (-1, rank_of(node) - 1)):
            return False
        if name == "aten::mul" and isinstance(a["other"], fx.Node):
            return False
        node = a["self"]
    return False


def rope_halves(a: Mapping[str, Any]) -> int | None:
    """Half the head size when RotaryEmbedding means this: x [B, H, S, D], tables [B, 1, S, D] doubled."""
    x, cos, sin = shape_of(a["x"]), shape_of(a["cos"]), shape_of(a["sin"])
    if a["interleaved"] or not len(x) == len(cos) == len(sin) == 4 or dtype_of(a["x"]) != dtype_of(a["cos"]):
        return None
    for table, node in ((cos, a["cos"]), (sin, a["sin"])):
        sizes = same_size(table[0], x[0]) and same_size(table[1], 1) and same_size(table[2], x[2])
        if not (sizes and same_size(table[3], x[3]) and _is_doubled(node)):
            return None
    return int(x[3]) // 2
