"""Folds nodes into onnxruntime's own operators, in models that need it anyway.

A model with MatMulNBits or GroupQueryAttention runs nowhere else, so the rest of it may say the same: a sum
and its norm as SkipSimplifiedLayerNormalization, and one product for queries, keys and values given to
GroupQueryAttention as it is. Models of standard operators alone stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import NodeProto, helper

from tilewright.frontends.export.onnx_graph import MICROSOFT, OnnxGraph
from tilewright.frontends.export.onnx_reshapes import drop_unread


def fold_contributed(g: OnnxGraph, kept: Collection[str]) -> None:
    """Rewrite what has a contributed operator, where the model has some already; kept: its results."""
    if MICROSOFT not in g.domains:
        return
    made = {name: node for node in g.nodes for name in node.output}
    for i, node in enumerate(g.nodes):
        if node.op_type == "GroupQueryAttention":
            _pack(node, made)
        elif node.op_type == "RMSNormalization":
            g.nodes[i] = _add_and_norm(g, node, made) or node
    drop_unread(g, kept)


def _pack(node: NodeProto, made: dict[str, NodeProto]) -> None:
    """Queries, keys and values that are one value split in this order: give that value."""
    parts = list(node.input[:3])
    split = made.get(parts[0])
    if split is not None and split.op_type == "Split" and list(split.output) == parts:
        node.input[0], node.input[1], node.input[2] = split.input[0], "", ""


def _add_and_norm(g: OnnxGraph, norm: NodeProto, made: dict[str, NodeProto]) -> NodeProto | None:
    """The sum and the norm of a node that makes the norm; other readers of the sum read its second output."""
    total = norm.input[0]
    if total not in g.normed_sums:
        return None
    add = made[total]
    add.output[0] = g.fresh(f"{total}.unread")
    attributes = {a.name: helper.get_attribute_value(a) for a in norm.attribute if a.name == "epsilon"}
    outputs = [norm.output[0], "", "", total]
    inputs = [*add.input, norm.input[1]]
    return helper.make_node(
        "SkipSimplifiedLayerNormalization", inputs, outputs, name=norm.name, domain=MICROSOFT, **attributes
    )
