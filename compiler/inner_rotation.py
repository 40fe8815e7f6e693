"""Rotations inside a layer that need an op at run time: behind an activation, between queries and keys."""

from __future__ import annotations

from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.basis import Blocked
from tilewright.compiler.channel_ops import channels, same_basis
from tilewright.compiler.dataflow import op_name, see_through, tensor_of
from tilewright.compiler.program import Program
from tilewright.compiler.schema import arguments

ACTIVATIONS = frozenset(
    {"gated_mlp", "silu", "gelu", "relu", "relu6", "hardswish", "leaky_relu", "elu", "mish", "softplus"}
)
_KEEPS_OUTLIERS = frozenset({"mul", "pow", "square"})


def hidden_readers(program: Program) -> list[fx.Node]:
    """The linear layers that read an activation: the down projections of MLPs, in graph order."""
    return [
        n
        for n in program.graph.nodes
        if n.target is ops.linear and _is_activation(arguments(n)["x"], depth=2)
    ]


def _is_activation(value: fx.Node, depth: int) -> bool:
    """True for the result of an activation, or a product or power of one (gates, squared ReLU)."""
    value = see_through(value)
    name = op_name(value)
    if name in ACTIVATIONS:
        return True
    return (
        depth > 0
        and name in _KEEPS_OUTLIERS
        and any(_is_activation(s, depth - 1) for s in value.all_input_nodes)
    )


def attention_inputs(program: Program, attention: fx.Node) -> list[tuple[fx.Node, fx.Node]] | Blocked:
    """(value, user) of the queries and of the keys, where a rotation of both cancels in their products.

    The keys' place is the one before they are repeated for their query heads.
    """
    found = []
    for name in ("q", "k"):
        value, user = arguments(attention)[name], attention
        while _repeats(value):
            value, user = same_basis(value)[0], value
        if value.target is ops.hadamard:
            return Blocked(value, f"its {name} is rotated already")
        kept = _kept(program, value)
        if kept is not None:
            return Blocked(
                kept, f"its {name} comes from {kept.name}, which other programs may read unrotated"
            )
        meta = tensor_of(value)
        if meta is None or channels(meta) < 2:
            return Blocked(value, f"its {name} has no fixed number of channels")
        found.append((value, user))
    return found


def _repeats(value: fx.Node) -> bool:
    """A view or a copy per query head of one operand, read by one node."""
    return (
        op_name(value) in ("reshape", "expand", "unsqueeze")
        and len(same_basis(value)) == 1
        and len(value.users) == 1
    )


def _kept(program: Program, value: fx.Node) -> fx.Node | None:
    """The placeholder or cache update that a value comes from through moves alone, else None."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop()
        if op_name(node) == "kv_update" or (node.op == "placeholder" and not program.is_weight(node)):
            return node
        for source in same_basis(node):
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return None
