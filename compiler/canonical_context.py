"""What every rule of the canonicaliser uses: replacement that keeps values, and when a copy may go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tilewright.compiler.graph import (
    all_inputs,
    arg,
    compute_val,
    copy_source,
    fake_mode_of,
    is_impure,
    is_op,
    output_node,
    tensor_val,
)
from tilewright.compiler.storage_alias import Aliases, base_name, written

aten = torch.ops.aten

END = 9223372036854775807
"""What "to the end" looks like as a slice end."""

Rule = Callable[["Canonical", fx.Node], bool]
"""One rule: looks at one call, returns True when it changed the graph."""

_KNOWN_NAMESPACES = frozenset({"aten", "prims", "prim", "tilewright", "higher_order", "profiler"})


def layout(value: torch.Tensor) -> tuple[str, ...]:
    """dtype, device, sizes and the strides of dimensions longer than one, comparable also when symbolic."""
    strides = [
        str(st) for s, st in zip(value.shape, value.stride(), strict=True) if not (type(s) is int and s == 1)
    ]
    return (str(value.dtype), str(value.device), str(tuple(value.shape)), *strides)


class Canonical:
    """The state of one canonicalisation: graph, counts per rule and the memory that must stay apart."""

    def __init__(self, gm: fx.GraphModule, training: bool) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.training = training
        self.counts: Counter[str] = Counter()
        self.held_back = False
        """Whether a copy was kept: what shares memory may be fewer values once the graph is smaller."""
        aliases = Aliases(self.graph)
        self._group = {n: aliases.leader(n) for n in self.graph.nodes}
        final = _write_backs(self.graph)
        kept = [n for c in final for n in all_inputs(c.args)] + all_inputs(output_node(self.graph).args)
        self._escaping = {self._group[n] for n in kept}
        self._in_place = {self._group[w] for n in self.graph.nodes if n not in final for w in written(n)}
        self.layout_free = not any(_reads_layout(n) for n in self.graph.nodes)

    def may_drop_copy(self, copy: fx.Node, source: fx.Node) -> bool:
        """Whether readers of a copy may read its source.

        They may when neither memory is written in between and the copy is not returned. What is written once
        at the end of the graph may be read before.
        """
        mine, theirs = self._group[copy], self._group[source]
        free = mine not in self._escaping and mine not in self._in_place and theirs not in self._in_place
        self.held_back = self.held_back or not free
        return free

    def replace(self, node: fx.Node, new: fx.Node, rule: str) -> bool:
        """Let the users of a node use another one, and erase it."""
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.counts[rule] += 1
        return True

    def erase(self, node: fx.Node, rule: str) -> bool:
        """Erase a node without users."""
        self.graph.erase_node(node)
        self.counts[rule] += 1
        return True

    def swap(
        self,
        node: fx.Node,
        target: Any,
        args: Sequence[Any],
        rule: str,
        kwargs: Mapping[str, Any] | None = None,
        *,
        same_memory: bool = False,
    ) -> bool:
        """Replace a call by another one, unless its traced value would differ in sizes, dtype or strides.

        Equal strides matter because the order of a reduction, and so its rounding, follows the memory. With
        `same_memory` the caller knows them to be equal and nothing is traced.
        """
        old = tensor_val(node)
        if old is None:
            return False
        if not same_memory:
            value = self.value_of(node, target, args, kwargs or {})
            if value is None or layout(value) != layout(old):
                return False
        with self.graph.inserting_before(node):
            new = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        copy_source(node, new)
        new.meta["val"] = old
        self._group[new] = self._group[node]
        return self.replace(node, new, rule)

    def swap_chain(self, node: fx.Node, calls: Sequence[tuple[Any, Sequence[Any]]], rule: str) -> bool:
        """Replace a call by several, each on the result of the one before; the first has all arguments."""
        made: list[fx.Node] = []
        for target, tail in calls:
            args = (*made[-1:], *tail)
            value = self.value_of(node, target, args, {})
            if value is None:
                break
            with self.graph.inserting_before(node):
                made.append(self.graph.call_function(target, args))
            copy_source(node, made[-1])
            made[-1].meta["val"] = value
            self._group[made[-1]] = self._group[node]
        old = tensor_val(node)
        if len(made) == len(calls) and old is not None and layout(made[-1].meta["val"]) == layout(old):
            return self.replace(node, made[-1], rule)
        for new in reversed(made):
            self.graph.erase_node(new)
        return False

    def value_of(
        self, node: fx.Node, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """The fake tensor a call would give in place of a node; None when it cannot be made."""
        mode = fake_mode_of(node, list(args))
        if mode is None or any("val" not in n.meta for n in all_inputs((args, kwargs))):
            return None
        try:
            value = compute_val(target, args, kwargs, mode)
        except (RuntimeError, ValueError):
            return None
        return value if isinstance(value, torch.Tensor) else None

    def update(
        self, node: fx.Node, rule: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> bool:
        """Spell the arguments of a call in another way that means the same."""
        node.args = tuple(args)
        if kwargs is not None:
            node.kwargs = dict(kwargs)
        self.counts[rule] += 1
        return True


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values agree in dtype, device, sizes and strides as far as they were traced."""
    x, y = tensor_val(a), tensor_val(b)
    return x is not None and y is not None and layout(x) == layout(y)


def same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values agree in dtype, device and sizes."""
    x, y = tensor_val(a), tensor_val(b)
    if x is None or y is None:
        return False
    return x.dtype == y.dtype and x.device == y.device and str(tuple(x.shape)) == str(tuple(y.shape))


def _reads_layout(node: fx.Node) -> bool:
    """Ops of unknown namespaces, and reads by stride, may depend on the strides of what they are given."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.namespace not in _KNOWN_NAMESPACES or base_name(node.target).startswith("as_strided")


def _write_backs(graph: fx.Graph) -> set[fx.Node]:
    """The writes to inputs at the end of the graph after which nothing reads what they change."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    final: set[fx.Node] = set()
    oldest_read = len(order)
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            continue
        if is_op(node, aten.copy_.default) and _is_input(arg(node, "self")):
            if oldest_read >= order[node]:
                final.add(node)
        elif is_impure(node):
            break
        else:
            reads = [order[n] for n in node.all_input_nodes if not is_op(n, aten.copy_.default)]
            oldest_read = min([oldest_read, *reads])
    return final


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")
