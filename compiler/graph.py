"""FX helpers: insertion with metadata, purity, dead code, comparison; schema and text helpers come along."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from tilewright.compiler.graph_schema import (
    Signature,
    arg,
    is_random,
    normalized_args,
    rank,
    same,
    set_positional,
    shape,
    signature,
    static_shape,
    tensor_val,
    val,
)
from tilewright.compiler.graph_text import describe, line_of, module_path, op_name, print_graph

PURE_FUNCTIONS = frozenset(
    {getattr(operator, n) for n in dir(operator) if not n.startswith("_")}
    | {getattr(math, n) for n in dir(math) if not n.startswith("_")}
    | {getattr(torch, n) for n in dir(torch) if n.startswith("sym_")}
    | {torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_max, torch.sym_min}
    | {min, max, int, float, bool, abs, round, pow}
)
_COPIED_META = ("stack_trace", "nn_module_stack", "seq_nr", "partitioner_tag", "custom")


def is_op(node: object, *targets: Any) -> bool:
    """True for a call of one of the given overloads (`aten.add.Tensor`)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def fake_mode_of(*values: Any) -> Any:
    """The fake tensor mode that the given nodes' values live in; None when none holds a fake tensor."""
    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, fx.Node):
            look(value.meta.get("val"))
        elif isinstance(value, list | tuple):
            for v in value:
                look(v)
        elif isinstance(value, torch._subclasses.FakeTensor):
            found.append(value.fake_mode)

    for value in values:
        if not found:
            look(value)
    return found[0] if found else None


def compute_val(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], mode: Any) -> Any:
    """Run an op on the values of its argument nodes under a fake mode and return its fake result."""
    real_args = map_arg(tuple(args), lambda n: n.meta["val"])
    real_kwargs = map_arg(dict(kwargs), lambda n: n.meta["val"])
    with mode, torch.no_grad():
        return target(*real_args, **real_kwargs)


def insert_like(
    graph: fx.Graph,
    before: fx.Node,
    target: Any,
    args: Sequence[Any],
    like_meta_from: fx.Node,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """Insert a call in front of `before`: its value is computed, its origin that of `like_meta_from`."""
    given = dict(kwargs or {})
    mode = fake_mode_of(args, list(given.values()), like_meta_from)
    value = None if mode is None else compute_val(target, args, given, mode)
    with graph.inserting_before(before):
        node = graph.call_function(target, tuple(args), given)
    copy_source(like_meta_from, node)
    if mode is not None:
        node.meta["val"] = value
    return node


def copy_source(source: fx.Node, node: fx.Node) -> None:
    """Copy where a node comes from (stack trace, module stack), not what it computes."""
    for key in _COPIED_META:
        if key in source.meta:
            node.meta.setdefault(key, source.meta[key])


def mutates(node: fx.Node) -> bool:
    """True for a call whose schema writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(signature(node.target).mutated)


def is_impure(node: fx.Node) -> bool:
    """True for nodes that do more than compute their value, so that they stay without users.

    Placeholders, output, writes, checks that return nothing, calls of what is not an op, random ops unless
    their dropout probability is zero (an attention call is tagged random although it is pure at 0).
    """
    if node.op == "get_attr":
        return False
    if node.op != "call_function":
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target not in PURE_FUNCTIONS
    sig = signature(target)
    if sig.mutated or sig.returns == 0:
        return True
    if torch.Tag.nondeterministic_seeded in target.tags:
        return is_random(normalized_args(node))
    return False


def dead_code(graph: fx.Graph) -> list[str]:
    """Erase pure nodes without users; returns their names, last first."""
    removed = []
    for node in reversed(list(graph.nodes)):
        if not node.users and not is_impure(node):
            removed.append(node.name)
            graph.erase_node(node)
    return removed


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders in call order."""
    return [n for n in graph.nodes if n.op == "placeholder"]


def output_node(graph: fx.Graph) -> fx.Node:
    """The one output node."""
    end: fx.Node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return end


def all_inputs(args: Iterable[Any]) -> list[fx.Node]:
    """Nodes among nested arguments, in order, with repeats."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    map_arg(tuple(args), note)
    return found


def structural_difference(
    a: fx.GraphModule, b: fx.GraphModule, inputs: Mapping[str, str] | None = None
) -> str | None:
    """The first difference between two graphs up to node names and the order of independent nodes, or None.

    `inputs` maps placeholder names of `a` to those of `b`; without it placeholders match by position. Sharing
    counts: one node used twice is not the same as two equal nodes. Nodes with effects are compared in order.
    """
    return _Comparison(a, b, inputs).run()


class _Comparison:
    """One walk over two graphs that pairs their nodes."""

    def __init__(self, a: fx.GraphModule, b: fx.GraphModule, inputs: Mapping[str, str] | None) -> None:
        self.a, self.b = a, b
        self.there: dict[fx.Node, fx.Node] = {}
        self.back: dict[fx.Node, fx.Node] = {}
        self.inputs = inputs

    def run(self) -> str | None:
        message = self._pair_inputs()
        effects_a, effects_b = (_effects(m.graph) for m in (self.a, self.b))
        for x, y in zip(effects_a, effects_b, strict=False):
            message = message or self._pair_tree(x, y)
        if message is None and len(effects_a) != len(effects_b):
            longer = max(effects_a, effects_b, key=len)
            extra = line_of(longer[min(len(effects_a), len(effects_b))])
            message = f"{len(effects_a)} nodes with effects against {len(effects_b)}: {extra}"
        return message or self._pair_tree(output_node(self.a.graph), output_node(self.b.graph))

    def _pair_inputs(self) -> str | None:
        left, right = placeholders(self.a.graph), placeholders(self.b.graph)
        if self.inputs is None:
            if len(left) != len(right):
                return f"{len(left)} inputs against {len(right)}"
            pairs = list(zip(left, right, strict=True))
        else:
            named = {n.name: n for n in right}
            pairs = [(n, named[self.inputs[n.name]]) for n in left if n.name in self.inputs]
        for x, y in pairs:
            self.there[x], self.back[y] = y, x
        return None

    def _pair_tree(self, root_a: fx.Node, root_b: fx.Node) -> str | None:
        """Pair two nodes and everything they read, arguments first, so that the first cause is reported."""
        stack = [(root_a, root_b, False)]
        while stack:
            x, y, ready = stack.pop()
            if self.there.get(x) is y and self.back.get(y) is x:
                continue
            if "placeholder" in (x.op, y.op):
                return f"{line_of(x)} against {line_of(y)}"
            if x in self.there or y in self.back:
                return f"{line_of(x)} and {line_of(y)}: one is shared where the other is not"
            if ready:
                self.there[x], self.back[y] = y, x
                continue
            if x.op != y.op or (x.op != "get_attr" and x.target != y.target):
                return f"{line_of(x)} against {line_of(y)}"
            message = self._arguments(x, y) if x.op != "get_attr" else self._attribute(x, y)
            if message is not None:
                return message
            stack.append((x, y, True))
            stack.extend((m, n, False) for m, n in zip(x.all_input_nodes, y.all_input_nodes, strict=True))
        return None

    def _arguments(self, x: fx.Node, y: fx.Node) -> str | None:
        position_x = {n: i for i, n in enumerate(x.all_input_nodes)}
        position_y = {n: i for i, n in enumerate(y.all_input_nodes)}
        left = map_arg((x.args, x.kwargs), lambda n: _Place(position_x[n]))
        right = map_arg((y.args, y.kwargs), lambda n: _Place(position_y[n]))
        if len(position_x) != len(position_y) or not same(left, right):
            return f"{line_of(x)} against {line_of(y)}"
        return None

    def _attribute(self, x: fx.Node, y: fx.Node) -> str | None:
        left, right = _attribute(self.a, str(x.target)), _attribute(self.b, str(y.target))
        equal = left is right
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            equal = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return None if equal else f"{line_of(x)} against {line_of(y)}: the constants differ"


class _Place(int):
    """The position of a node among the inputs of another; its own type, so that it equals no number."""


def _effects(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op not in ("placeholder", "output") and is_impure(n)]


def _attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


__all__ = [
    "PURE_FUNCTIONS",
    "Signature",
    "all_inputs",
    "arg",
    "compute_val",
    "copy_source",
    "dead_code",
    "describe",
    "fake_mode_of",
    "insert_like",
    "is_impure",
    "is_op",
    "module_path",
    "mutates",
    "normalized_args",
    "op_name",
    "output_node",
    "placeholders",
    "print_graph",
    "rank",
    "same",
    "set_positional",
    "shape",
    "signature",
    "static_shape",
    "structural_difference",
    "tensor_val",
    "val",
]
