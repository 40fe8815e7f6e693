"""Which values of a flat graph share memory, and by which view steps: the facts behind functionalisation."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tilewright.compiler.graph import (
    PURE_FUNCTIONS,
    all_inputs,
    compute_val,
    fake_mode_of,
    normalized_args,
    rank,
    shape,
    signature,
)

aten = torch.ops.aten

IDENTITY = frozenset(
    {"detach", "detach_", "alias", "lift_fresh", "lift", "contiguous", "to", "type_as", "dropout", "dropout_"}
    | {"feature_dropout", "alpha_dropout", "positive", "resolve_conj", "resolve_neg"}
)
RESHAPE = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as", "reshape_as"}
    | {"_reshape_alias", "ravel"}
)
PERMUTE = frozenset(
    {"permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
)
PARTS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split"})
UNSAFE_PARTS = frozenset({"unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"})
OTHER = frozenset({"slice", "narrow", "select", "unsqueeze", "expand", "expand_as", "diagonal", "unbind"})
SURE = (PERMUTE | RESHAPE | PARTS | OTHER | {"detach", "detach_", "alias", "lift_fresh", "positive"}) - {
    "reshape",
    "flatten",
    "reshape_as",
    "_unsafe_view",
    "ravel",
}
"""Ops whose result shares memory with their first argument whatever its strides."""
FRESH = frozenset(
    {"linear", "matmul", "scaled_dot_product_attention", "layer_norm", "rms_norm", "group_norm", "embedding"}
    | {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "softmax", "log_softmax", "silu"}
    | {"gelu", "outer", "cross_entropy_loss", "stack", "cat", "pad", "one_hot", "where", "square", "rsub"}
    | {"batch_norm", "instance_norm"}
)
"""Composite ops that never return their argument; composites not listed here are looked at by storage."""
HIDDEN_WRITES = frozenset({"batch_norm", "instance_norm", "native_batch_norm"})
"""Ops that update running statistics although their schema does not say so."""


@functools.cache
def base_name(target: Any) -> str:
    """`slice` for `aten.slice.Tensor`; empty for what is not an aten overload."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target._schema.name.split("::")[1])
    return ""


def hidden_writes(node: fx.Node) -> list[fx.Node]:
    """Arguments that a call writes to although its schema hides it."""
    if base_name(node.target) not in HIDDEN_WRITES:
        return []
    given = normalized_args(node)
    if given.get("training", given.get("use_input_stats")) is False:
        return []
    return [given[n] for n in ("running_mean", "running_var") if isinstance(given.get(n), fx.Node)]


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory a call writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    sig = signature(node.target)
    if not sig.mutated:
        return hidden_writes(node)
    given = normalized_args(node)
    return all_inputs([given.get(n) for n in sig.mutated])


@dataclass(frozen=True)
class Step:
    """One view step from a parent value to the value of a node.

    `kind` is `same`, `reshape`, `permute`, `unsqueeze`, `expand`, `slice`, `select`, `diagonal`, `parts` (a
    list of slices or selections, whose members are `getitem` nodes) or `opaque` (shares memory somehow).
    """

    kind: str
    parent: fx.Node
    data: tuple[Any, ...] = ()
    """permute: positive dims; slice: dim, start, end, step; select and diagonal: the op's own arguments."""


@dataclass
class StorageClass:
    """All nodes that may share one memory."""

    root: fx.Node
    members: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    reasons: list[tuple[fx.Node, str]] = field(default_factory=list)
    """Why this class cannot be made functional; empty when it can."""


class Aliases:
    """Storage classes of a graph. `steps[node]` says how a node views its parent; absent for fresh values."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = list(graph.nodes)
        self._leader: dict[fx.Node, fx.Node] = {n: n for n in nodes}
        shared = _shared_inputs(nodes)
        found = {n: steps for n in nodes if (steps := possible_steps(n))}
        self._join(found, shared)
        touched = {self.leader(w) for n in nodes for w in written(n)}
        for node in [n for n in found if self.leader(n) in touched and not is_certain(n)]:
            found[node] = [s for s in found[node] if shares_memory(node, s.parent)]
        self._leader = {n: n for n in nodes}
        self._join(found, shared)
        self.steps = {n: steps[0] for n, steps in found.items() if steps}
        self.classes = self._collect(nodes)
        for a, b in shared:
            self.of(a).reasons.append((b, f"inputs {a.name} and {b.name} share memory"))
        for node, steps in found.items():
            if len(steps) > 1:
                self.of(node).reasons.append((node, f"{node.name} may share memory with several values"))

    def leader(self, node: fx.Node) -> fx.Node:
        """The representative of a node's storage class."""
        while self._leader[node] is not node:
            self._leader[node] = self._leader[self._leader[node]]
            node = self._leader[node]
        return node

    def _join(self, found: dict[fx.Node, list[Step]], shared: list[tuple[fx.Node, fx.Node]]) -> None:
        pairs = shared + [(s.parent, n) for n, steps in found.items() for s in steps]
        for a, b in pairs:
            a, b = self.leader(a), self.leader(b)
            if a is not b:
                self._leader[b] = a

    def _collect(self, nodes: list[fx.Node]) -> dict[fx.Node, StorageClass]:
        classes: dict[fx.Node, StorageClass] = {}
        for node in nodes:
            classes.setdefault(self.leader(node), StorageClass(node)).members.append(node)
        for node in nodes:
            for target in dict.fromkeys(self.leader(w) for w in written(node)):
                classes[target].writers.append(node)
        return classes

    def of(self, node: fx.Node) -> StorageClass:
        """The storage class of a node."""
        return self.classes[self.leader(node)]

    def path(self, node: fx.Node) -> Iterator[tuple[fx.Node, Step]]:
        """The view steps from a node up to the root of its class."""
        while node in self.steps:
            yield node, self.steps[node]
            node = self.steps[node].parent


def storage_key(value: Any) -> int | None:
    """Identity of the memory behind a traced tensor; None for what is not one tensor."""
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _shared_inputs(nodes: list[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of inputs that are one memory: traced values with one storage, or one attribute read twice."""
    seen: dict[Any, fx.Node] = {}
    pairs = []
    for node in nodes:
        key: Any = None
        if node.op == "placeholder":
            key = storage_key(node.meta.get("val"))
        elif node.op == "get_attr":
            key = str(node.target)
        if key is not None and seen.setdefault(key, node) is not node:
            pairs.append((seen[key], node))
    return pairs


def shares_memory(node: fx.Node, parent: fx.Node) -> bool:
    """Whether a node's value is memory of its parent's, by the storages of the traced values.

    Different storages prove nothing when the values were loaded from a file, so the op is then run again on
    the parent's traced value. A call that cannot be run counts as sharing.
    """
    keys = {storage_key(v) for v in _flat(node.meta.get("val"))}
    mine = storage_key(parent.meta.get("val"))
    mode = fake_mode_of(parent)
    if mine is None or mode is None or mine in keys:
        return True
    try:
        again = compute_val(node.target, node.args, node.kwargs, mode)
    except RuntimeError:
        return True
    return mine in {storage_key(v) for v in _flat(again)}


def _flat(value: Any) -> list[Any]:
    return [v for item in value for v in _flat(item)] if isinstance(value, list | tuple) else [value]


def is_certain(node: fx.Node) -> bool:
    """True when a node that may alias does so whatever the strides."""
    name = base_name(node.target)
    if name == "view" and node.target is not aten.view.default:
        return True
    return name in SURE or node.target is operator.getitem or bool(written(node))


def possible_steps(node: fx.Node) -> list[Step]:
    """How a node may view the memory of its inputs; empty for fresh values."""
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    tensors = [n for n in dict.fromkeys(all_inputs((node.args, node.kwargs))) if _holds_tensor(n)]
    if not tensors:
        return []
    if node.target is operator.getitem:
        return _item_step(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return [] if node.target in PURE_FUNCTIONS else [Step("opaque", n) for n in tensors]
    sig = signature(node.target)
    if sig.mutated:
        return [Step("same", n) for n in written(node)] if sig.returns else []
    name = base_name(node.target)
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and _holds_tensor(first):
        step = _named_step(node, name, first)
        if step is not None:
            return [step]
    if sig.aliased:
        given = normalized_args(node)
        return [Step("opaque", n) for n in all_inputs([given[a] for a in sig.aliased])]
    return [Step("opaque", n) for n in tensors] if _is_unknown_composite(node.target, name) else []


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is None or any(isinstance(v, torch.Tensor) for v in _flat(value))


def _is_unknown_composite(target: torch._ops.OpOverload, name: str) -> bool:
    """Composite ops may return an argument although no schema says so (`type_as`, `einsum`, `meshgrid`)."""
    if name in FRESH or target.namespace != "aten":
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(_full_name(target), "CompositeImplicitAutograd")


@functools.cache
def _full_name(target: torch._ops.OpOverload) -> str:
    schema = target._schema
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


def _named_step(node: fx.Node, name: str, first: fx.Node) -> Step | None:
    if name in IDENTITY:
        return Step("same", first)
    if node.target is aten.view.dtype:
        return Step("opaque", first)
    if name in RESHAPE:
        return Step("reshape", first)
    if name in PARTS | UNSAFE_PARTS or name == "unbind":
        return Step("parts", first)
    if name in PERMUTE:
        order = permutation(node)
        return Step("opaque", first) if order is None else Step("permute", first, order)
    given = normalized_args(node) if name in OTHER else {}
    if node.target is aten.slice.Tensor:
        return Step("slice", first, (given["dim"], given["start"], given["end"], given["step"]))
    if node.target is aten.narrow.default and type(given["start"]) is int and type(given["length"]) is int:
        start = given["start"]
        end = start + given["length"]
        return Step("slice", first, (given["dim"], start, None if start < 0 and end == 0 else end, 1))
    if node.target is aten.select.int:
        return Step("select", first, (given["dim"], given["index"]))
    if node.target is aten.diagonal.default:
        return Step("diagonal", first, (given["offset"], given["dim1"], given["dim2"]))
    if name == "unsqueeze":
        return Step("unsqueeze", first, (given["dim"],))
    if name in ("expand", "expand_as"):
        return Step("expand", first)
    return Step("opaque", first) if name in OTHER else None


def _item_step(node: fx.Node) -> list[Step]:
    """The step of `parts[i]`: a slice for the pieces of a split, a selection for those of an unbind."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return [Step("opaque", n) for n in all_inputs(node.args)]
    name = base_name(source.target)
    if (
        source.op == "call_function"
        and name in PARTS | UNSAFE_PARTS | {"unbind"}
        and isinstance(source.args[0], fx.Node)
    ):
        dim = normalized_args(source).get("dim", 0)
        if name == "unbind":
            return [Step("select", source.args[0], (dim, index))]
        pieces = [shape(piece) for piece in source.meta.get("val") or ()]
        sizes = [piece[dim] for piece in pieces if piece is not None]
        if len(sizes) > index and all(type(s) is int for s in sizes):
            return [Step("slice", source.args[0], (dim, sum(sizes[:index]), sum(sizes[: index + 1]), 1))]
    return [Step("opaque", source)]


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """The positive dimension order of any op that only reorders dimensions; None when the rank is unknown."""
    n = rank(node.args[0])
    name = base_name(node.target)
    if n is None or name not in PERMUTE:
        return None
    if n == 0:
        return ()
    given = normalized_args(node)
    order = list(range(n))
    if name == "permute":
        return tuple(d % n for d in given["dims"])
    if name in ("t", "numpy_T", "mT"):
        return tuple(order[:-2] + order[-2:][::-1]) if name != "numpy_T" else tuple(reversed(order))
    if name in ("movedim", "moveaxis"):
        ends = (given["source"], given["destination"])
        source, target = ([d] if isinstance(d, int) else list(d) for d in ends)
        moved = {t % n: s % n for s, t in zip(source, target, strict=True)}
        rest = iter(d for d in order if d not in moved.values())
        return tuple(moved[d] if d in moved else next(rest) for d in order)
    a, b = (d % n for d in list(given.values())[1:3])
    order[a], order[b] = order[b], order[a]
    return tuple(order)
