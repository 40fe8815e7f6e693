"""What flows into what: ancestor and descendant sets of a functional graph, and the classes of its nodes.

Sets are Python integers used as bit masks over node positions, so that a union or an intersection of sets
is one arithmetic operation: a graph of 2,500 nodes takes 1.5 MB and some milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

MATRIX_OPS = frozenset({"mm", "bmm", "addmm", "baddbmm", "matmul", "mv", "einsum", "_grouped_mm"})
LINEAR_OPS = frozenset({"linear", "linear_multi", "quantized_linear"})
CONV_OPS = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"})
ATTENTION_OPS = frozenset({"attention", "scaled_dot_product_attention", "flex_attention"})
CAST_OPS = frozenset({"to", "_to_copy", "type_as"})
NOOP_OPS = CAST_OPS | {
    "alias",
    "clone",
    "contiguous",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "dropout",
    "view",
}
SHAPE_ONLY_OPS = frozenset(
    {"sym_size", "sym_numel", "sym_stride", "empty_like", "zeros_like", "ones_like", "full_like", "new_zeros"}
    | {"new_ones", "new_full", "new_empty", "rand_like", "randn_like"}
)
"""Ops that read the shape of their first operand and none of its values."""


def op_name(node: fx.Node) -> str:
    """The op of a call without namespace and overload (`linear`), empty for a node that calls nothing."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return str(getattr(target, "__name__", target))


def tensor_of(node: object) -> torch.Tensor | None:
    """The (fake) tensor that a node stands for; None for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape_key(tensor: torch.Tensor) -> tuple[str, ...]:
    """A comparable form of a shape whose sizes may be symbolic; comparing it adds no guard."""
    return tuple(str(size) for size in tensor.shape)


def is_attention(node: fx.Node) -> bool:
    """True for a whole attention in one node."""
    name = op_name(node)
    return name in ATTENTION_OPS or name.startswith("_scaled_dot_product_")


def is_heavy(node: fx.Node) -> bool:
    """True for the ops that carry the arithmetic of a model: matrix products, convolutions, attentions."""
    name = op_name(node)
    return name in MATRIX_OPS or name in LINEAR_OPS or name in CONV_OPS or is_attention(node)


def is_mutating(node: fx.Node) -> bool:
    """True when a call writes to one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def passes_through(node: fx.Node) -> fx.Node | None:
    """The first operand of a node that keeps its values apart from rounding (casts and no-ops), else None."""
    name = op_name(node)
    idle_dropout = name == "dropout" and (node.args[1] == 0 or node.args[2] is False)
    if not (name in NOOP_OPS or idle_dropout) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or shape_key(before) != shape_key(after):
        return None
    return node.args[0] if before.is_floating_point() == after.is_floating_point() else None


def no_op_source(node: fx.Node) -> fx.Node | None:
    """The first operand of a node that changes neither values, shape nor dtype, else None."""
    source = passes_through(node)
    if source is None:
        return None
    before, after = tensor_of(source), tensor_of(node)
    return source if before is not None and after is not None and before.dtype == after.dtype else None


def is_pointwise(node: fx.Node) -> bool:
    """True for a call that computes each element of its result from that element of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def see_through(node: fx.Node) -> fx.Node:
    """The value behind a row of casts and no-ops."""
    source = passes_through(node)
    while source is not None:
        node, source = source, passes_through(source)
    return node


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The operands whose values a node reads; a shape is no value, nor is the dtype that `type_as` takes."""
    name = op_name(node)
    if name in SHAPE_ONLY_OPS:
        return []
    return node.all_input_nodes[:1] if name == "type_as" else node.all_input_nodes


class Flow:
    """Reachability over one graph. Masks have bit i set for the i-th of `nodes`; dead nodes are in none."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.live = self._live()
        self.ancestors = [0] * len(self.nodes)
        self.descendants = [0] * len(self.nodes)
        self.heavy = 0
        for i, node in enumerate(self.nodes):
            for source in data_inputs(node):
                j = self.index[source]
                self.ancestors[i] |= self.ancestors[j] | (1 << j)
            if is_heavy(node) and self.live >> i & 1:
                self.heavy |= 1 << i
        for i in range(len(self.nodes) - 1, -1, -1):
            if self.live >> i & 1 and self.nodes[i].op != "output":
                reached = self.descendants[i] | (1 << i)
                for source in data_inputs(self.nodes[i]):
                    self.descendants[self.index[source]] |= reached

    def _live(self) -> int:
        """Nodes that an output or a write depends on; assertions keep nothing alive."""
        live = 0
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i]
            if node.op == "output" or is_mutating(node):
                live |= 1 << i
            if live >> i & 1:
                for source in node.all_input_nodes:
                    live |= 1 << self.index[source]
        return live

    def bit(self, node: fx.Node) -> int:
        return 1 << self.index[node]

    def upto(self, node: fx.Node) -> int:
        """The node and all that flows into it."""
        return self.ancestors[self.index[node]] | self.bit(node)

    def below(self, node: fx.Node) -> int:
        """All that the node flows into, without itself."""
        return self.descendants[self.index[node]]

    def reaches(self, source: fx.Node, target: fx.Node) -> bool:
        """True when target is source or depends on its values."""
        return bool(self.upto(target) >> self.index[source] & 1)

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Live users in graph order; the output node counts as one."""
        return sorted((u for u in node.users if self.live >> self.index[u] & 1), key=self.index.__getitem__)

    def members(self, mask: int) -> Iterator[fx.Node]:
        """The nodes of a mask in graph order."""
        while mask:
            low = mask & -mask
            yield self.nodes[low.bit_length() - 1]
            mask ^= low
