"""Near misses: every one-step change of a flat graph that still runs. A rule refuses them or stays right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from tilewright.compiler.ops.mlp import ACTIVATIONS

Edit = Callable[[fx.Graph, fx.Node], fx.Node | None]
"""Changes a copied graph at one node; a returned node takes over the uses of the given one."""
Change = tuple[str, Edit]
KINDS = ("dim", "permutation", "number", "flag", "word", "size", "order", "op", "cast", "drop")

CASTS = (torch.float16, torch.bfloat16, torch.float64)
COMMUTATIVE = frozenset({"aten::add", "aten::mul", "aten::maximum", "aten::minimum", "aten::eq", "aten::ne"})
_DIMS = frozenset({"dim", "dim0", "dim1", "dims", "start_dim", "end_dim", "axis"})
_SIBLINGS = (
    ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default"),
    ("add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar"),
    ("sum.dim_IntList", "mean.dim", "amax.default"),
    ("sqrt.default", "rsqrt.default", "reciprocal.default"),
    ("silu.default", "gelu.default", "sigmoid.default", "tanh.default", "relu.default"),
    ("sin.default", "cos.default"),
    ("exp.default", "sigmoid.default", "relu.default"),
    ("softmax.int", "log_softmax.int"),
    ("tril.default", "triu.default"),
)
_WORDS = (("none", "tanh"), ("scale_first", "scale_last"), ACTIVATIONS)


class Mutant(NamedTuple):
    """One changed graph."""

    description: str
    """`kind: what changed at which node`; see `KINDS`."""
    module: fx.GraphModule

    @property
    def kind(self) -> str:
        return self.description.split(":", 1)[0]


def mutants(
    module: fx.GraphModule, inputs: Sequence[Any], kinds: Collection[str] = KINDS
) -> Iterator[Mutant]:
    """Every one-step mutant of these kinds of a flat graph that runs on `inputs` (real tensors, not changed).

    module holds calls of overloads (aten, tilewright) and operator.getitem only. A mutant shares parameters
    with the original. Some mutants mean the same as the original: callers decide by evaluation.
    """
    values = node_values(module, inputs)
    for node in module.graph.nodes:
        if not is_overload(node):
            continue
        for description, edit in _changes(node, values):
            if description.split(":", 1)[0] not in kinds:
                continue
            mutant = edited(module, node, edit)
            if runs(mutant, inputs):
                yield Mutant(f"{description} at {node.name}", mutant)


def is_overload(node: fx.Node) -> bool:
    """True for a call of a torch operator overload."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def schema_of(node: fx.Node) -> Any:
    """The torch schema of an overload call."""
    return node.target._schema  # type: ignore[union-attr]


def node_values(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """The value of every node on these inputs."""
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Recorder(module, garbage_collect_values=False).run(*copies(inputs))
    return values


def edited(module: fx.GraphModule, node: fx.Node, edit: Edit) -> fx.GraphModule:
    """A copy of the module with one edit at the copy of `node`."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copied))
    target, old = copied[node], set(graph.nodes)
    with graph.inserting_after(target):
        replacement = edit(graph, target)
    if replacement is not None and replacement is not target:
        target.replace_all_uses_with(replacement, delete_user_cb=lambda user: user in old)
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def runs(module: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """True if the graph evaluates on the inputs; a shape or dtype error of torch means it does not."""
    try:
        with torch.no_grad():
            module.forward(*copies(inputs))  # calling the module would print the traceback of a failure
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        return False
    return True


def copies(inputs: Sequence[Any]) -> list[Any]:
    """Inputs with tensors cloned."""
    return [value.clone() if isinstance(value, Tensor) else value for value in inputs]


def arguments(node: fx.Node) -> Iterator[tuple[int | str, str, Any]]:
    """(place, schema name, value) of every given argument; place is a position in args or a key of kwargs."""
    schema = schema_of(node).arguments
    for index, value in enumerate(node.args):
        yield index, schema[index].name, value
    for name, value in node.kwargs.items():
        yield name, name, value


def setter(place: int | str, value: Any) -> Edit:
    """An edit that sets one argument of the node."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        if isinstance(place, int):
            node.args = (*node.args[:place], value, *node.args[place + 1 :])
        else:
            node.kwargs = {**node.kwargs, place: value}

    return edit


def _changes(node: fx.Node, values: dict[fx.Node, Any]) -> Iterator[Change]:
    rank = next((values[n].dim() for n in node.all_input_nodes if isinstance(values[n], Tensor)), 0)
    for place, name, value in arguments(node):
        if isinstance(value, fx.Node) or value is None:
            continue
        for label, changed in _constants(name, value, rank):
            yield f"{label}: {name} {value} -> {changed}", setter(place, changed)
    yield from _missing(node)
    yield from _operand_orders(node)
    yield from _operators(node)
    yield from _casts(node, values)
    yield from _drops(node, values)


def _constants(name: str, value: Any, rank: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield "flag", not value
    elif isinstance(value, float):
        yield from (("number", changed) for changed in _other_floats(value))
    elif isinstance(value, int):
        if name in _DIMS:
            yield from (("dim", d) for d in range(rank + 1) if d not in (value, value + rank))
        else:
            yield from (("number", changed) for changed in (value + 1, value - 1, -value) if changed != value)
    elif isinstance(value, str):
        words = next((words for words in _WORDS if value in words), ())
        yield from (("word", word) for word in words if word != value)
    elif isinstance(value, torch.dtype):
        yield from (("cast", dtype) for dtype in CASTS if dtype != value and value.is_floating_point)
    elif isinstance(value, list | tuple) and all(type(item) is int for item in value):
        yield from _lists(name, list(value), rank)


def _other_floats(value: float) -> Iterator[float]:
    if value == 0.0:
        yield from (1.0, 0.25)
    elif math.isfinite(value):
        yield from (value * 2, value * 1.01, -value)


def _lists(name: str, value: list[int], rank: int) -> Iterator[tuple[str, list[int]]]:
    label = "permutation" if name == "dims" else "dim" if name in _DIMS else "size"
    for one, other in itertools.combinations(range(len(value)), 2):
        if value[one] != value[other] and (label != "dim" or len(value) > 1):
            swapped = list(value)
            swapped[one], swapped[other] = swapped[other], swapped[one]
            yield label, swapped
    if label == "dim":
        taken = {d % rank for d in value} if rank else set()
        yield from (("dim", [*value[:-1], d]) for d in range(rank) if d not in taken)


def _missing(node: fx.Node) -> Iterator[Change]:
    """Arguments left at a default: flags set, absent scales given."""
    given = {name for _, name, _ in arguments(node)}
    for spec in schema_of(node).arguments:
        if spec.name in given or not spec.has_default_value():
            continue
        default = spec.default_value
        if isinstance(default, bool | float):
            changed = list(_constants(spec.name, default, 0))
        else:
            changed = [("number", 0.3)] if str(spec.type) == "Optional[float]" else []
        for label, value in changed:
            yield f"{label}: {spec.name} {default} -> {value}", setter(spec.name, value)


def _operand_orders(node: fx.Node) -> Iterator[Change]:
    places = [(place, value) for place, _, value in arguments(node) if isinstance(value, fx.Node)]
    if schema_of(node).name in COMMUTATIVE:
        places = []
    for (one, left), (other, right) in itertools.combinations(places, 2):
        if left is not right:

            def swap(graph: fx.Graph, copy: fx.Node, one: Any = one, other: Any = other) -> None:
                first, second = (copy.args[p] if isinstance(p, int) else copy.kwargs[p] for p in (one, other))
                setter(one, second)(graph, copy)
                setter(other, first)(graph, copy)

            yield f"order: operands {one} and {other} swapped", swap
    for place, _, value in arguments(node):
        if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(v, fx.Node) for v in value):

            def reverse(graph: fx.Graph, copy: fx.Node, place: Any = place) -> None:
                items = copy.args[place] if isinstance(place, int) else copy.kwargs[place]
                setter(place, list(reversed(items)))(graph, copy)  # type: ignore[arg-type]

            yield f"order: list operand {place} reversed", reverse


def _operators(node: fx.Node) -> Iterator[Change]:
    name = str(node.target).removeprefix("aten.")
    for family in _SIBLINGS:
        for sibling in family if name in family else ():
            if sibling != name:
                packet, overload = sibling.split(".")
                target = getattr(getattr(torch.ops.aten, packet), overload)

                def replace(graph: fx.Graph, copy: fx.Node, target: Any = target) -> None:
                    copy.target = target

                yield f"op: {name} -> {sibling}", replace


def _casts(node: fx.Node, values: dict[fx.Node, Any]) -> Iterator[Change]:
    value = values[node]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    for dtype in CASTS:
        if dtype != value.dtype:

            def cast(graph: fx.Graph, copy: fx.Node, dtype: torch.dtype = dtype) -> fx.Node:
                rounded = graph.call_function(torch.ops.aten.to.dtype, (copy, dtype))
                with graph.inserting_after(rounded):
                    return graph.call_function(torch.ops.aten.to.dtype, (rounded, value.dtype))

            yield f"cast: result through {dtype}", cast


def _drops(node: fx.Node, values: dict[fx.Node, Any]) -> Iterator[Change]:
    """The node replaced by each of its inputs of the same shape and dtype."""
    value = values[node]
    for index, source in enumerate(node.all_input_nodes):
        kept = values[source]
        if not isinstance(value, Tensor) or not isinstance(kept, Tensor):
            continue
        if kept.shape == value.shape and kept.dtype == value.dtype:

            def drop(graph: fx.Graph, copy: fx.Node, index: int = index) -> fx.Node:
                return copy.all_input_nodes[index]

            yield f"drop: replaced by input {index}", drop
