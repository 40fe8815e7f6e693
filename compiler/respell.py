"""Other spellings of the same graph: what a matcher must see through and a verifier must accept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler.mutate import (
    COMMUTATIVE,
    Change,
    Mutant,
    arguments,
    edited,
    is_overload,
    node_values,
    schema_of,
    setter,
)

_ATEN = torch.ops.aten
Values = dict[fx.Node, Any]
Respelling = Callable[[fx.Node, Values], Iterator[Change]]
_RESPELLINGS: list[Respelling] = []


def respell(module: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[Mutant]:
    """Every one-step respelling of a flat graph: same function of the same inputs, up to rounding.

    inputs: real tensors of the shapes and dtypes to use; sizes that a spelling writes down are theirs.
    """
    values = node_values(module, inputs)
    for node in module.graph.nodes:
        if not is_overload(node):
            continue
        for respelling in _RESPELLINGS:
            for description, edit in respelling(node, values):
                yield Mutant(f"{description} at {node.name}", edited(module, node, edit))


def _respelling(function: Respelling) -> Respelling:
    _RESPELLINGS.append(function)
    return function


def _call(*calls: tuple[Any, ...]) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    """An edit that builds calls in order; in their arguments, `_RESULT[i]` is call i and `_SELF` the node."""

    def edit(graph: fx.Graph, node: fx.Node) -> fx.Node:
        built: list[fx.Node] = []

        def fill(value: Any) -> Any:
            if isinstance(value, _Result):
                return node if value.index is None else built[value.index]
            return [fill(item) for item in value] if isinstance(value, list) else value

        last = node
        for target, *args in calls:
            with graph.inserting_after(last):
                last = graph.call_function(target, tuple(fill(_copied(arg, node)) for arg in args))
            built.append(last)
        return last

    return edit


class _Result:
    """Stands for the node itself (None) or for an earlier call in `_call`."""

    def __init__(self, index: int | None) -> None:
        self.index = index


class _Input:
    """Stands for the argument at a place of the copied node."""

    def __init__(self, place: int) -> None:
        self.place = place


_SELF, _FIRST, _SECOND, _THIRD = _Result(None), _Result(0), _Result(1), _Result(2)
_X, _Y, _Z = _Input(0), _Input(1), _Input(2)


def _copied(value: Any, node: fx.Node) -> Any:
    if isinstance(value, _Input):
        return node.args[value.place]
    return [_copied(item, node) for item in value] if isinstance(value, list) else value


def _operand(node: fx.Node, values: Values, place: int = 0) -> Any:
    """The value of the operand at this place."""
    operand = node.args[place]
    return values[operand] if isinstance(operand, fx.Node) else operand


def _rank(node: fx.Node, values: Values) -> int:
    return int(_operand(node, values).dim())


def _ints(value: Any) -> list[int]:
    return [int(item) for item in value]


@_respelling
def _views(node: fx.Node, values: Values) -> Iterator[Change]:
    targets = {_ATEN.view.default: _ATEN.reshape.default, _ATEN.reshape.default: _ATEN.view.default}
    if node.target not in targets:
        return
    sizes = list(values[node].shape)
    if node.target == _ATEN.view.default:
        yield "view as reshape", _call((_ATEN.reshape.default, _X, sizes))
    elif _operand(node, values).is_contiguous():
        yield "reshape as view", _call((_ATEN.view.default, _X, sizes))
    else:
        yield (
            "reshape as contiguous view",
            _call((_ATEN.contiguous.default, _X), (_ATEN.view.default, _FIRST, sizes)),
        )
    if math.prod(sizes) > 0 and sizes:
        yield "size written as -1", _call((_ATEN.reshape.default, _X, [*sizes[:-1], -1]))
        yield "size of the batch written as -1", _call((_ATEN.reshape.default, _X, [-1, *sizes[1:]]))
    yield (
        "reshape through one axis",
        _call((_ATEN.reshape.default, _X, [-1]), (_ATEN.reshape.default, _FIRST, sizes)),
    )


@_respelling
def _transposes(node: fx.Node, values: Values) -> Iterator[Change]:
    if node.target == _ATEN.transpose.int:
        rank = _rank(node, values)
        one, other = (d % rank for d in _ints(node.args[1:3]))
        order = list(range(rank))
        order[one], order[other] = other, one
        yield "transpose as permute", _call((_ATEN.permute.default, _X, order))
        yield "transpose with swapped dims", _call((_ATEN.transpose.int, _X, other, one))
        yield "transpose with negative dims", _call((_ATEN.transpose.int, _X, one - rank, other - rank))
        yield "swapaxes", _call((_ATEN.swapaxes.default, _X, one, other))
    if node.target == _ATEN.t.default:
        yield "t as transpose", _call((_ATEN.transpose.int, _X, 0, 1))
        yield "t as permute", _call((_ATEN.permute.default, _X, [1, 0]))
    if node.target == _ATEN.permute.default:
        rank = _rank(node, values)
        order = [d % rank for d in _ints(node.args[1])]
        yield "permute with negative dims", _call((_ATEN.permute.default, _X, [d - rank for d in order]))
        moved = [d for d in range(rank) if order[d] != d]
        if len(moved) == 2:
            yield "permute as transpose", _call((_ATEN.transpose.int, _X, *moved))


@_respelling
def _dims(node: fx.Node, values: Values) -> Iterator[Change]:
    for place, name, value in arguments(node):
        if name == "dim" and type(value) is int and isinstance(node.args[0], fx.Node):
            rank = _rank(node, values) + (node.target == _ATEN.unsqueeze.default)
            yield "dim with the other sign", setter(place, value - rank if value >= 0 else value + rank)


@_respelling
def _scales(node: fx.Node, values: Values) -> Iterator[Change]:
    if len(node.args) < 2 or not isinstance(node.args[1], int | float) or isinstance(node.args[1], bool):
        return
    number = float(node.args[1])
    exact = number != 0.0 and math.isfinite(number) and math.frexp(abs(number))[0] == 0.5
    if node.target == _ATEN.mul.Tensor:
        if exact:
            yield "multiplication as division", _call((_ATEN.div.Tensor, _X, 1.0 / number))
        yield (
            "multiplication in two steps",
            _call((_ATEN.mul.Tensor, _X, number / 2), (_ATEN.mul.Tensor, _FIRST, 2)),
        )
    if node.target == _ATEN.div.Tensor and exact:
        yield "division as multiplication", _call((_ATEN.mul.Tensor, _X, 1.0 / number))


@_respelling
def _squares(node: fx.Node, values: Values) -> Iterator[Change]:
    if node.target == _ATEN.pow.Tensor_Scalar and node.args[1] == 2:
        yield "square as product", _call((_ATEN.mul.Tensor, _X, _X))
        yield "square as square", _call((_ATEN.square.default, _X))
    if node.target == _ATEN.mul.Tensor and node.args[0] is node.args[1]:
        yield "product as square", _call((_ATEN.pow.Tensor_Scalar, _X, 2))


@_respelling
def _argument_forms(node: fx.Node, values: Values) -> Iterator[Change]:
    schema = schema_of(node).arguments
    positional = [spec for spec in schema if not spec.kwarg_only]
    if len(node.args) > 1:
        index = len(node.args) - 1

        def to_keyword(graph: fx.Graph, copy: fx.Node) -> None:
            copy.kwargs = {schema[index].name: copy.args[index], **copy.kwargs}
            copy.args = copy.args[:index]

        yield "last argument by keyword", to_keyword
    given = len(node.args)
    if given < len(positional):
        spec = positional[given]
        plain = isinstance(spec.default_value, bool | int | float | str) or spec.default_value is None
        if spec.name in node.kwargs:

            def to_positional(graph: fx.Graph, copy: fx.Node) -> None:
                copy.args = (*copy.args, copy.kwargs[spec.name])
                copy.kwargs = {name: value for name, value in copy.kwargs.items() if name != spec.name}

            yield "keyword argument by position", to_positional
        elif spec.has_default_value() and plain and "memory_format" not in spec.name:

            def fill(graph: fx.Graph, copy: fx.Node) -> None:
                copy.args = (*copy.args, spec.default_value)

            yield "default written out", fill


@_respelling
def _operands(node: fx.Node, values: Values) -> Iterator[Change]:
    both = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    if not both or node.kwargs:
        return
    if schema_of(node).name in COMMUTATIVE and node.args[0] is not node.args[1]:
        yield "operands swapped", _call((node.target, _Y, _X))
    if node.target == _ATEN.sub.Tensor:
        yield (
            "subtraction as addition of the negative",
            _call((_ATEN.neg.default, _Y), (_ATEN.add.Tensor, _X, _FIRST)),
        )
        yield "subtraction as reverse subtraction", _call((_ATEN.rsub.Tensor, _Y, _X))
    if node.target == _ATEN.div.Tensor:
        yield "division by reciprocal", _call((_ATEN.reciprocal.default, _Y), (_ATEN.mul.Tensor, _X, _FIRST))


@_respelling
def _no_ops(node: fx.Node, values: Values) -> Iterator[Change]:
    value = values[node]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    yield "cast to its own dtype added", _call((_ATEN.to.dtype, _SELF, value.dtype))
    yield "clone added", _call((_ATEN.clone.default, _SELF))
    yield "contiguous added", _call((_ATEN.contiguous.default, _SELF))
    yield "alias added", _call((_ATEN.alias.default, _SELF))
    yield "detach added", _call((_ATEN.detach.default, _SELF))
    yield "multiplied by one", _call((_ATEN.mul.Tensor, _SELF, 1))
    yield "zero added", _call((_ATEN.add.Tensor, _SELF, 0))
    yield "dropout of inference added", _call((_ATEN.dropout.default, _SELF, 0.1, False))
    if value.dim() >= 2:
        yield (
            "transposed twice",
            _call((_ATEN.transpose.int, _SELF, 0, -1), (_ATEN.transpose.int, _FIRST, -1, 0)),
        )
    if value.dim() >= 1:
        yield "whole slice added", _call((_ATEN.slice.Tensor, _SELF, 0, 0, torch.iinfo(torch.int64).max))
        yield (
            "unsqueezed and squeezed",
            _call((_ATEN.unsqueeze.default, _SELF, 0), (_ATEN.squeeze.dim, _FIRST, 0)),
        )
        yield "reshaped to its own shape", _call((_ATEN.reshape.default, _SELF, list(value.shape)))
        if value.shape[-1] > 1:
            yield (
                "split and joined",
                _call(
                    (_ATEN.slice.Tensor, _SELF, -1, 0, 1),
                    (_ATEN.slice.Tensor, _SELF, -1, 1, value.shape[-1]),
                    (_ATEN.cat.default, [_FIRST, _SECOND], -1),
                ),
            )


@_respelling
def _slices(node: fx.Node, values: Values) -> Iterator[Change]:
    if node.target == _ATEN.slice.Tensor and len(node.args) == 4 and not node.kwargs:
        dim, start, end = node.args[1:]
        size = _operand(node, values).shape[dim]
        bounds = _ints((start or 0, size if end is None else end))
        first, last = (min(max(at + size if at < 0 else at, 0), size) for at in bounds)
        yield "slice with its end written out", _call((_ATEN.slice.Tensor, _X, dim, first, last))
        yield "slice with negative start", _call((_ATEN.slice.Tensor, _X, dim, first - size, last))
        yield "slice as narrow", _call((_ATEN.narrow.default, _X, dim, first, last - first))
    if node.target == _ATEN.unsqueeze.default:
        yield "unsqueeze as reshape", _call((_ATEN.reshape.default, _X, list(values[node].shape)))
    if node.target == _ATEN.expand.default:
        yield "expand with sizes written out", _call((_ATEN.expand.default, _X, list(values[node].shape)))


@_respelling
def _products(node: fx.Node, values: Values) -> Iterator[Change]:
    if node.target == _ATEN.linear.default:
        calls: list[tuple[Any, ...]] = [(_ATEN.t.default, _Y), (_ATEN.matmul.default, _X, _FIRST)]
        if len(node.args) > 2 and node.args[2] is not None:
            calls.append((_ATEN.add.Tensor, _SECOND, _Z))
        yield "linear as product", _call(*calls)
    if node.target == _ATEN.matmul.default and all(values[x].dim() >= 2 for x in node.all_input_nodes):
        yield (
            "product of transposes",
            _call(
                (_ATEN.transpose.int, _X, -1, -2),
                (_ATEN.transpose.int, _Y, -1, -2),
                (_ATEN.matmul.default, _SECOND, _FIRST),
                (_ATEN.transpose.int, _THIRD, -1, -2),
            ),
        )


@_respelling
def _functions(node: fx.Node, values: Values) -> Iterator[Change]:
    if node.target == _ATEN.softmax.int:
        dim = node.args[1]
        yield (
            "softmax spelled out",
            _call(
                (_ATEN.amax.default, _X, [dim], True),
                (_ATEN.sub.Tensor, _X, _FIRST),
                (_ATEN.exp.default, _SECOND),
                (_ATEN.sum.dim_IntList, _THIRD, [dim], True),
                (_ATEN.div.Tensor, _THIRD, _Result(3)),
            ),
        )
        yield "softmax with its dtype", _call((_ATEN.softmax.int, _X, dim, values[node].dtype))
    if node.target == _ATEN.rsqrt.default:
        yield (
            "rsqrt as reciprocal of sqrt",
            _call((_ATEN.sqrt.default, _X), (_ATEN.reciprocal.default, _FIRST)),
        )
        yield "rsqrt as power", _call((_ATEN.pow.Tensor_Scalar, _X, -0.5))
    if node.target == _ATEN.silu.default:
        yield "silu spelled out", _call((_ATEN.sigmoid.default, _X), (_ATEN.mul.Tensor, _X, _FIRST))
    if node.target == _ATEN.neg.default:
        yield "negative as product", _call((_ATEN.mul.Tensor, _X, -1))
    if node.target == _ATEN.mean.dim:
        dims = _ints(node.args[1])
        count = math.prod(_operand(node, values).shape[d] for d in dims)
        keepdim = bool(node.args[2]) if len(node.args) > 2 else False
        yield (
            "mean as sum over count",
            _call((_ATEN.sum.dim_IntList, _X, dims, keepdim), (_ATEN.div.Tensor, _FIRST, count)),
        )
