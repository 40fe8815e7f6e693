"""The one IR: an FX graph in normal form with its inputs described, its weights beside it and its facts."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tilewright.compiler.diagnostics import FactError
from tilewright.compiler.paging import give_back_freed, in_a_file, page_out


class InputKind(Enum):
    """What a placeholder is."""

    WEIGHT = "weight"
    """A parameter or buffer owned by the module: the same tensor on every call of one instance."""
    USER = "user"
    """An argument of the call."""
    SIZE = "size"
    """A symbolic integer."""


@dataclass
class InputSpec:
    """One placeholder: kind, where it comes from, and whether the program writes to it (declared state)."""

    name: str
    kind: InputKind
    source: str = ""
    """Dotted path of a weight (`model.layers.0.mlp.up_proj.weight`), or the argument's source expression."""
    mutated: bool = False


@dataclass
class Fact:
    """Something the graph alone does not hold. `origin` is `user`, `adapter` or `derived: <how>`."""

    name: str
    value: Any
    origin: str


class Facts:
    """Facts by name. A pass that needs an absent one refuses with `missing(name)`."""

    def __init__(self) -> None:
        self._facts: dict[str, Fact] = {}
        self._absent: dict[str, str] = {}

    def set(self, name: str, value: Any, origin: str) -> None:
        """Record a fact; one that the user gave is never overwritten by a derived one."""
        old = self._facts.get(name)
        if old is None or old.origin != "user" or origin == "user":
            self._facts[name] = Fact(name, value, origin)

    def get(self, name: str) -> Any:
        """The value of a fact; FactError naming it and how to supply it when absent."""
        if name not in self._facts:
            raise FactError(self.missing(name), remedy=f'pass options={{"facts": {{"{name}": ...}}}}')
        return self._facts[name].value

    def has(self, name: str) -> bool:
        return name in self._facts

    def absent(self, name: str, reason: str) -> None:
        """Remember why a fact could not be derived, for the message of the pass that needs it."""
        self._absent[name] = reason

    def missing(self, name: str) -> str:
        reason = self._absent.get(name)
        return f"fact {name!r} is absent: {reason}" if reason else f"fact {name!r} is absent"

    def __iter__(self) -> Any:
        return iter(self._facts.values())


@dataclass
class Derived:
    """A tensor computed from weights, held as a named buffer and checked on every call."""

    name: str
    sources: tuple[str, ...]
    """Names of the weight placeholders it is computed from."""
    compute: Callable[..., torch.Tensor]
    """compute(*source tensors) -> tensor; pure."""


class GraphRecord:
    """What a graph was at one moment: 50 times cheaper to take than a copy, which it makes when asked for."""

    def __init__(self, graph: fx.Graph) -> None:
        self._rows = [
            (n, n.op, n.name, n.target, n.args, n.kwargs, dict(n.meta), getattr(n, "_dynamo_source", None))
            for n in graph.nodes
        ]

    def graph(self) -> fx.Graph:
        """A graph with the recorded nodes: same names, arguments, metadata and Dynamo sources."""
        copy = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node, op, name, target, args, kwargs, meta, source in self._rows:
            given: Any = fx.node.map_arg((args, kwargs), new.__getitem__)
            made = copy.create_node(op, target, given[0], given[1], name)
            if made.name != name:  # setting a name is dear
                made.name = name
            made.meta = dict(meta)
            if source is not None:
                made._dynamo_source = source  # type: ignore[attr-defined]
            new[node] = made
        return copy


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names, metadata and Dynamo sources."""
    return GraphRecord(graph).graph()


@dataclass
class Program:
    """A captured model. `module.graph` is flat: placeholders, calls of aten and tilewright ops, one
    output."""

    module: fx.GraphModule
    inputs: list[InputSpec]
    example_inputs: list[Any]
    """Real tensors (or ints) in placeholder order; weights are the module's own tensors, held once."""
    origin: str
    training: bool = False
    facts: Facts = field(default_factory=Facts)
    derived: list[Derived] = field(default_factory=list)
    graph_breaks: list[dict[str, str]] = field(default_factory=list)
    scratch: Path | None = None
    """A folder for nameless files that hold derived tensors; None: memory holds them."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def spec(self, node: fx.Node) -> InputSpec | None:
        """The input description of a placeholder node, None for any other node."""
        if node.op != "placeholder":
            return None
        return self._by_name().get(node.name)

    def is_weight(self, node: Any) -> bool:
        """True for a placeholder that holds a module-owned tensor which the program does not write to."""
        spec = self.spec(node) if isinstance(node, fx.Node) else None
        return spec is not None and spec.kind is InputKind.WEIGHT and not spec.mutated

    def derived_of(self, node: Any) -> Derived | None:
        """The derived buffer that a get_attr node reads, None for any other node."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        return next((d for d in self.derived if d.name == node.target), None)

    def is_constant(self, node: Any) -> bool:
        """True for a weight and for what was derived from weights: what a weight pass may edit."""
        return self.is_weight(node) or self.derived_of(node) is not None

    def path_of(self, node: fx.Node) -> str:
        """The dotted path of a weight, what a derived buffer was named after, else the node's name."""
        spec = self.spec(node)
        if spec is not None:
            return spec.source or node.name
        return str(node.meta.get("derived", node.name))

    def tensor_of(self, node: fx.Node) -> torch.Tensor:
        """The real tensor behind a weight placeholder or a derived buffer."""
        derived = self.derived_of(node)
        if derived is not None:
            return self._value_of(derived)
        for i, spec in enumerate(self.inputs):
            if spec.name == node.name:
                value = self.example_inputs[i]
                if isinstance(value, torch.Tensor):
                    return value
        raise KeyError(node.name)

    def clone(self) -> Program:
        """An independent copy of graph and descriptions; weights, buffers and facts are shared."""
        graph = copy_graph(self.graph)
        module = fx.GraphModule(self.module, graph)
        for name, value in self.module._buffers.items():
            if name not in module._buffers:
                module.register_buffer(name, value, persistent=False)
        specs = [replace(s) for s in self.inputs]
        return Program(
            module,
            specs,
            list(self.example_inputs),
            self.origin,
            self.training,
            self.facts,
            list(self.derived),
            scratch=self.scratch,
        )

    def _by_name(self) -> dict[str, InputSpec]:
        return {spec.name: spec for spec in self.inputs}

    def derive(
        self,
        name: str,
        sources: Sequence[fx.Node],
        compute: Callable[..., torch.Tensor],
        *,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """Register a buffer computed from weights and return the get_attr node that reads it.

        The node is inserted right after the placeholders. The executable re-computes the buffer whenever a
        source tensor is another object or has another version than at the last call. A source may itself be
        derived: the computations are chained in float64 and the last result is rounded once.

        like: the source whose shape and dtype the result has. Its value is then computed when `tensor_of`
        asks for it, or by `settle`: never, where another pass derives from it and nothing else reads it.
        """
        if self.training:
            raise ValueError(
                f"derived buffer {name!r}: weights are inputs in training and may not be derived from"
            )
        names, whole = self._from_weights(sources, compute)
        derived = Derived("", names, whole)
        value = None if like is None else self._blank(like)
        value = self._compute(derived) if value is None else value
        node = self.constant(value, sources[0], prefix="tw_derived_")
        if like is not None and value.is_meta:
            node.meta["val"] = torch.empty_like(like.meta["val"])
        node.meta["derived"] = name
        self.derived.append(replace(derived, name=str(node.target)))
        return node

    def constant(self, value: torch.Tensor, like: fx.Node, *, prefix: str = "tw_constant_") -> fx.Node:
        """Register a buffer and return the get_attr node that reads it, right after the placeholders.

        `like` is any node whose value lives in the program's fake tensor mode.
        """
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.get_attr(self.hold(prefix, value))
        mode = getattr(like.meta.get("val"), "fake_mode", None)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
        return node

    def settle(self) -> None:
        """Compute the derived buffers that nothing has asked for yet; only then may the module run."""
        for derived in self.derived:
            self._value_of(derived)

    def _value_of(self, derived: Derived) -> torch.Tensor:
        held = self.module.get_buffer(derived.name)
        if held.is_meta:
            held = self._compute(derived)
            self.module.register_buffer(derived.name, held, persistent=False)
        return held

    def _compute(self, derived: Derived) -> torch.Tensor:
        given = [self._input_named(n) for n in derived.sources]
        value = derived.compute(*given)
        if self.scratch is not None:
            value = in_a_file(value, self.scratch)
            page_out(value)
        for source in given:
            page_out(source)
        give_back_freed()  # what making one weight took, before the next takes as much again
        return value

    def _blank(self, like: fx.Node) -> torch.Tensor | None:
        """What stands for a value not computed yet: it has no memory. None where it cannot be described."""
        derived, meta = self.derived_of(like), like.meta.get("val")
        held = self.tensor_of(like) if derived is None else self.module.get_buffer(derived.name)
        known = getattr(meta, "fake_mode", None) is not None and held.layout == torch.strided
        return torch.empty_like(held, device="meta") if known and held.is_contiguous() else None

    def hold(self, prefix: str, value: torch.Tensor) -> str:
        """Register a buffer under a free name `prefix<number>`; returns the name."""
        number = sum(1 for name in self.module._buffers if name.startswith(prefix))
        while f"{prefix}{number}" in self.module._buffers:
            number += 1
        self.module.register_buffer(f"{prefix}{number}", value, persistent=False)
        return f"{prefix}{number}"

    def drop_unread(self) -> None:
        """Forget derived buffers that no node reads any more, and their nodes."""
        read: set[str] = set()
        for node in [n for n in self.graph.nodes if n.op == "get_attr"]:
            if node.users or self.derived_of(node) is None:
                read.add(str(node.target))
            else:
                self.graph.erase_node(node)
        for derived in [d for d in self.derived if d.name not in read]:
            self.derived.remove(derived)
            del self.module._buffers[derived.name]

    def _from_weights(
        self, sources: Sequence[fx.Node], compute: Callable[..., torch.Tensor]
    ) -> tuple[tuple[str, ...], Callable[..., torch.Tensor]]:
        """(names of the weights that sources go back to, computation from those weights)."""
        parts = [self.derived_of(s) for s in sources]
        names = tuple(
            n
            for s, part in zip(sources, parts, strict=True)
            for n in ((s.name,) if part is None else part.sources)
        )
        if all(part is None for part in parts):
            return names, compute
        narrow = next(self.module.get_buffer(part.name).dtype for part in parts if part)
        return names, partial(_chained, tuple(parts), compute, narrow)

    def _input_named(self, name: str) -> torch.Tensor:
        value = self.example_inputs[[spec.name for spec in self.inputs].index(name)]
        assert isinstance(value, torch.Tensor), f"{name} is a weight"
        return value


def _chained(
    parts: Sequence[Derived | None],
    compute: Callable[..., torch.Tensor],
    narrow: torch.dtype,
    *weights: torch.Tensor,
) -> torch.Tensor:
    """Compute a derived buffer whose sources are derived; what comes out in float64 is rounded to `narrow`.

    Weights that are float64 already (a program that runs in float64) give a float64 result.
    """
    left, given = list(weights), list[torch.Tensor]()
    for part in parts:
        if part is None:
            given.append(left.pop(0))
            continue
        taken, left = left[: len(part.sources)], left[len(part.sources) :]
        given.append(part.compute(*[_double(w) for w in taken]))
    result = compute(*given)
    is_double = any(w.dtype == torch.float64 for w in weights)
    return result if is_double or result.dtype != torch.float64 else result.to(narrow)


def _double(weight: torch.Tensor) -> torch.Tensor:
    return weight.double() if weight.is_floating_point() else weight


class DerivedCheck:
    """Keeps derived buffers true: compares identity and version of their sources on each call (a few tens of
    ns each)."""

    def __init__(self, program: Program) -> None:
        index = {spec.name: i for i, spec in enumerate(program.inputs)}
        self._module = program.module
        self._rows = [(d, tuple(index[s] for s in d.sources)) for d in program.derived]
        self._lock = threading.Lock()
        self._watched = sorted({i for _, where in self._rows for i in where})
        self._remember(program.example_inputs)

    def _remember(self, args: Sequence[Any]) -> None:
        known = [args[i] for i in self._watched]
        self._seen = known, list(map(_VERSION, known))

    @property
    def empty(self) -> bool:
        return not self._rows

    def __call__(self, args: Sequence[Any]) -> None:
        """Refresh the buffers whose sources changed since the last call."""
        known, versions = self._seen
        given = [args[i] for i in self._watched]
        now = list(map(_VERSION, given))  # whole lists: a decode step has hundreds and takes few ms
        if now == versions and all(map(operator.is_, given, known)):
            return
        rows = zip(self._watched, given, known, now, versions, strict=True)
        stale = {i for i, new, old, a, b in rows if new is not old or a != b}
        with self._lock, torch.no_grad():
            for derived, where in self._rows:
                if stale.intersection(where):
                    fresh = derived.compute(*[args[i] for i in where])
                    self._module.get_buffer(derived.name).copy_(fresh)
            self._remember(args)


_VERSION = operator.attrgetter("_version")
