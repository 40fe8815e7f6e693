"""In-place writes become values: no mutation is left but one write-back of each changed input.

Each memory that is written has one root value. A write through a view makes a new value of the view, and
scatters it back step by step into a new root; later readers of any alias get their view of the newest root.
A memory with a write or a view that is not modelled stays as it was, in place, and the reason is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from tilewright.compiler.diagnostics import VerifyError
from tilewright.compiler.graph import (
    all_inputs,
    compute_val,
    dead_code,
    fake_mode_of,
    insert_like,
    is_op,
    normalized_args,
    output_node,
    same,
    shape,
    signature,
    tensor_val,
)
from tilewright.compiler.graph_schema import is_random
from tilewright.compiler.storage_alias import Aliases, Step, StorageClass, base_name, hidden_writes, written

aten = torch.ops.aten

_SCATTER = {"slice": aten.slice_scatter.default, "select": aten.select_scatter.default}
_SCATTER["diagonal"] = aten.diagonal_scatter.default
_GATHER = {"slice": aten.slice.Tensor, "select": aten.select.int}
_UNSTABLE_TAGS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@dataclass
class Functionalized:
    """What became of the writes of a graph."""

    mutated: dict[str, fx.Node] = field(default_factory=dict)
    """Final value of each written input, by placeholder (or attribute) node name."""
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)
    """Nodes whose memory stays in place, and why."""
    rewritten: int = 0
    """Writes that became values."""


def functionalize(gm: fx.GraphModule) -> Functionalized:
    """Replace the writes of a flat ATen graph by values, in place; see the module's docstring.

    Readers see bit-equal values and inputs end with bit-equal contents. Outputs that shared memory with a
    written input still do.
    """
    graph = gm.graph
    result = Functionalized()
    if not any(written(n) for n in graph.nodes):
        return result
    aliases = Aliases(graph)
    functional = {}
    strided = next((n for n in graph.nodes if base_name(n.target).startswith("as_strided")), None)
    for leader, group in aliases.classes.items():
        if not group.writers:
            continue
        reason = _refusal(aliases, group, strided)
        if reason is None:
            functional[leader] = group
        else:
            result.refused.append(reason)
    if functional:
        _Rewriter(graph, aliases, functional, result).run()
    gm.recompile()
    return result


def _refusal(aliases: Aliases, group: StorageClass, strided: fx.Node | None) -> tuple[fx.Node, str] | None:
    """The first reason why a written memory has to stay in place, with the node it is about; else None."""
    if group.reasons:
        return group.reasons[0]
    if strided is not None:
        return strided, f"{strided.name} reads memory by strides, which functional values do not keep"
    for node in group.members:
        step = aliases.steps.get(node)
        if step is not None and step.kind == "opaque":
            return node, f"{node.name} ({node.target}) shares memory in a way that is not modelled"
        if node.op != "output" and "val" not in node.meta:
            return node, f"{node.name} carries no traced value"
    for node in group.writers:
        why = _unsupported_write(node)
        if why is not None:
            return node, f"{node.name} ({node.target}) {why}"
        for alias, step in aliases.path(written(node)[0]):
            if step.kind == "parts":
                return node, f"{node.name} writes to a list of views"
            if (
                step.kind == "expand"
                and not same(shape(alias), shape(step.parent))
                and _numel_differs(alias, step)
            ):
                return node, f"{node.name} writes through the expanded view {alias.name}"
    return None


def _numel_differs(alias: fx.Node, step: Step) -> bool:
    mine, theirs = tensor_val(alias), tensor_val(step.parent)
    if mine is None or theirs is None:
        return True
    a, b = mine.numel(), theirs.numel()
    return not (type(a) is int and type(b) is int and a == b)


def _unsupported_write(node: fx.Node) -> str | None:
    if hidden_writes(node):
        return "updates running statistics"
    if node.target is aten.detach_.default:
        return None
    assert isinstance(node.target, torch._ops.OpOverload)
    if torch.Tag.inplace_view in node.target.tags:
        return "changes the shape or memory of its argument"
    if len(written(node)) != 1:
        return "writes to several arguments"
    if torch.Tag.nondeterministic_seeded in node.target.tags and is_random(normalized_args(node)):
        return "draws random numbers in place"
    if node.target is aten.copy_.default:
        return None
    form = functional_form(node.target)
    if form is None:
        return "has no functional form"
    if "out" in signature(node.target).mutated:
        out = written(node)[0]
        mode = fake_mode_of(out)
        args, kwargs = _without_out(node)
        if mode is None or not same(tuple(compute_val(form, args, kwargs, mode).shape), shape(out)):
            return "may resize its output"
    return None


def _without_out(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return node.args, {k: v for k, v in node.kwargs.items() if k != "out"}


def functional_form(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload that computes what an in-place or out= overload writes; None when there is none."""
    name = base_name(target)
    wanted = [a for a in signature(target).names if a != "out"]
    if name.startswith("__i") and name.endswith("__"):
        name = f"__{name[3:]}"
    packet = (
        getattr(aten, name.removesuffix("_") if not name.endswith("__") else name, None) if name else None
    )
    mine = signature(target)
    if packet is None or len(mine.mutated) != 1 or mine.types[mine.mutated[0]] != "Tensor":
        return None
    for overload in packet.overloads():
        candidate: torch._ops.OpOverload = getattr(packet, overload)
        sig = signature(candidate)
        same_types = all(sig.types.get(n) == mine.types[n] for n in wanted)
        if list(sig.names) == wanted and same_types and not sig.mutated and sig.returns == 1:
            return candidate
    return None


class _Rewriter:
    """One run over a graph in order, with the newest value of every alias of the functional classes."""

    def __init__(
        self,
        graph: fx.Graph,
        aliases: Aliases,
        functional: dict[fx.Node, StorageClass],
        result: Functionalized,
    ) -> None:
        self.graph, self.aliases, self.functional, self.result = graph, aliases, functional, result
        self.version = dict.fromkeys(functional, 0)
        self.latest: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.target_of = {w: written(w)[0] for group in functional.values() for w in group.writers}
        self.relaid: set[fx.Node] = set()
        """Nodes whose traced shape, strides or dtype are no longer what they were."""

    def run(self) -> None:
        end = output_node(self.graph)
        for node in list(self.graph.nodes):
            if node is end:
                break
            self._feed(node)
            if node in self.target_of:
                self._write(node)
            leader = self.aliases.leader(node)
            if leader in self.functional and node not in self.latest:
                self.latest[node] = (node, self.version[leader])
        self._write_back(end)
        for node in reversed(list(self.target_of)):
            self.graph.erase_node(node)
        dead_code(self.graph)

    def _current(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The newest value of a node, made by repeating its view steps where its memory was written since."""
        leader = self.aliases.leader(node)
        if leader not in self.functional:
            return node
        value, version = self.latest[node]
        if version != self.version[leader]:
            step = self.aliases.steps[node]
            value = self._view(node, step, self._current(step.parent, before), before)
            self.latest[node] = (value, self.version[leader])
        return value

    def _view(self, node: fx.Node, step: Step, parent: fx.Node, before: fx.Node) -> fx.Node:
        """Repeat one view step on a newer parent."""
        if step.kind in _GATHER:
            return insert_like(self.graph, before, _GATHER[step.kind], (parent, *step.data), node)
        if step.kind == "same" and base_name(node.target) not in ("detach", "detach_"):
            return parent
        target = aten.detach.default if step.kind == "same" else _movable(node.target)
        return insert_like(self.graph, before, target, (parent, *node.args[1:]), node, node.kwargs)

    def _feed(self, node: fx.Node) -> None:
        """Let a node read the newest values, and trace it again when their layout is another."""
        relaid = False

        def newest(old: fx.Node) -> fx.Node:
            nonlocal relaid
            new = self._current(old, node)
            relaid = relaid or new in self.relaid or (new is not old and _layout(new) != _layout(old))
            return new

        args, kwargs = map_arg(node.args, newest), map_arg(node.kwargs, newest)
        node.args, node.kwargs = args, kwargs
        if relaid and node.op == "call_function" and not written(node):
            self._trace_again(node)

    def _trace_again(self, node: fx.Node) -> None:
        mode = fake_mode_of(node)
        overload = isinstance(node.target, torch._ops.OpOverload)
        if mode is None or (overload and any(tag in node.target.tags for tag in _UNSTABLE_TAGS)):  # type: ignore[union-attr]
            return
        before = _layout(node)
        node.target = _movable(node.target)
        try:
            node.meta["val"] = compute_val(node.target, node.args, node.kwargs, mode)
        except (RuntimeError, ValueError) as error:
            raise VerifyError(
                f"{node.name} ({node.target}) has no value on the functional form of its input: {error}",
                remedy="clone the tensor before it is written in place",
            ) from error
        if _layout(node) != before:
            self.relaid.add(node)

    def _write(self, node: fx.Node) -> None:
        """Turn one writing call into the value it leaves behind, and that into a new root value."""
        alias = self.target_of[node]
        leader = self.aliases.leader(alias)
        if node.target is aten.detach_.default:
            value = insert_like(self.graph, node, aten.detach.default, node.args, node)
        else:
            value = self._written_value(node, alias)
            self._store(alias, value, node)
            self.result.rewritten += 1
        self.latest[node] = (value, self.version[leader])

    def _written_value(self, node: fx.Node, alias: fx.Node) -> fx.Node:
        """What the written alias holds after the call: its shape and dtype, in memory of its own."""
        assert isinstance(node.target, torch._ops.OpOverload)
        old = alias.meta["val"]
        if node.target is aten.copy_.default:
            return self._copied(node, alias, old)
        form = functional_form(node.target)
        assert form is not None, f"{node.target} was accepted without a functional form"
        args, kwargs = _without_out(node)
        value = insert_like(self.graph, node, form, args, node, kwargs)
        if value.meta["val"].dtype != old.dtype:
            value = insert_like(self.graph, node, aten.to.dtype, (value, old.dtype), node)
        return value

    def _copied(self, node: fx.Node, alias: fx.Node, old: torch.Tensor) -> fx.Node:
        value = node.args[1]
        if not isinstance(value, fx.Node):
            like = self._current(alias, node)
            return insert_like(self.graph, node, aten.full_like.default, (like, value), node)
        new = value.meta["val"]
        if tuple(new.shape) != tuple(old.shape):
            value = insert_like(
                self.graph, node, aten.expand.default, (value, self._sizes(alias, node)), node
            )
        if new.device != old.device:
            return insert_like(self.graph, node, aten.to.device, (value, old.device, old.dtype), node)
        if new.dtype != old.dtype:
            return insert_like(self.graph, node, aten.to.dtype, (value, old.dtype), node)
        return insert_like(self.graph, node, aten.clone.default, (value,), node)

    def _sizes(self, node: fx.Node, before: fx.Node) -> list[Any]:
        """The sizes of a value as arguments: ints, and `sym_size` nodes where dynamic."""
        value = self._current(node, before)
        sizes: Sequence[Any] = node.meta["val"].shape
        return [
            s if type(s) is int else insert_like(self.graph, before, aten.sym_size.int, (value, i), node)
            for i, s in enumerate(sizes)
        ]

    def _store(self, alias: fx.Node, value: fx.Node, before: fx.Node) -> None:
        """Carry a new value of one alias up its view steps to a new root; all other aliases become stale."""
        fresh = {alias: value}
        for _, step in self.aliases.path(alias):
            value = self._scatter(step, value, before)
            fresh[step.parent] = value
        leader = self.aliases.leader(alias)
        self.version[leader] += 1
        self.latest.update({n: (v, self.version[leader]) for n, v in fresh.items()})
        if _layout(value) != _layout(self.functional[leader].root):
            self.relaid.add(value)

    def _scatter(self, step: Step, value: fx.Node, before: fx.Node) -> fx.Node:
        """The parent's new value when the value at one view step below it changed."""
        if step.kind in _SCATTER:
            target = _SCATTER[step.kind]
            base = self._current(step.parent, before)
            if is_op(base, target) and same(list(base.args[2:]), list(step.data)):
                base = base.args[0]  # type: ignore[assignment]
            return insert_like(self.graph, before, target, (base, value, *step.data), before)
        if step.kind == "permute":
            inverse = [step.data.index(i) for i in range(len(step.data))]
            return insert_like(self.graph, before, aten.permute.default, (value, inverse), before)
        if step.kind == "unsqueeze":
            return insert_like(self.graph, before, aten.squeeze.dim, (value, *step.data), before)
        if step.kind in ("reshape", "expand"):
            sizes = self._sizes(step.parent, before)
            return insert_like(self.graph, before, aten.reshape.default, (value, sizes), before)
        return value

    def _write_back(self, end: fx.Node) -> None:
        """Write final values to their inputs, then let the outputs read what they shared before."""
        returned = {n for n in all_inputs(end.args) if self.aliases.leader(n) in self.functional}
        for leader, group in self.functional.items():
            root = group.root
            final, version = self.latest[root]
            outputs = [n for n in returned if self.aliases.leader(n) is leader]
            if final is root or version == 0:
                continue
            if root.op in ("placeholder", "get_attr"):
                self.result.mutated[root.name] = final
                final = insert_like(self.graph, end, aten.copy_.default, (root, final), root)
            elif len(outputs) < 2:
                continue
            self.version[leader] += 1
            self.latest[root] = (final, self.version[leader])
        end.args = map_arg(end.args, lambda n: self._current(n, end))


def _movable(target: Any) -> Any:
    """The form of a view op that also accepts values whose strides do not allow a view."""
    return aten.reshape.default if target in (aten.view.default, aten._unsafe_view.default) else target


def _layout(node: fx.Node) -> Any:
    """Shape, strides and dtype of a value as text, which compares symbolic sizes by their expression."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [
        (str(v.dtype), str(tuple(v.shape)), str(v.stride())) if isinstance(v, torch.Tensor) else None
        for v in values
    ]
