"""Where a graph is cut into repeated stretches, and where it must not be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.repeats import MIN_COUNT, cut, sink_writes

aten = torch.ops.aten


def _graph(f: Callable[..., object], *inputs: Tensor) -> fx.Graph:
    return make_fx(f, tracing_mode="fake")(*inputs).graph


def _block(x: Tensor, w: Tensor, factor: float = 2.0) -> Tensor:
    for _ in range(6):
        x = torch.sin(x * factor) + torch.cos(x)
    return x @ w


def _weights(count: int) -> list[Tensor]:
    return [torch.randn(4, 4) for _ in range(count)]


def _stack(x: Tensor, *weights: Tensor) -> Tensor:
    x = torch.exp(x)
    for w in weights:
        x = _block(x, w)
    return torch.tanh(x)


def test_blocks_become_instances_of_one_piece() -> None:
    pieces = cut(_graph(_stack, torch.randn(2, 4), *_weights(6)))
    owners = [p.instance_of for p in pieces]
    first = max(set(owners), key=owners.count)
    assert owners.count(first) >= 5
    assert all(p.instance_of <= i for i, p in enumerate(pieces))
    instances = [p for p in pieces if p.instance_of == first]
    assert len({tuple(str(n.target) for n in p.nodes) for p in instances}) == 1
    assert all(len(p.inputs) == 2 and len(p.outputs) == 1 for p in instances)
    chained = [p.outputs[0] in q.inputs for p, q in zip(instances, instances[1:], strict=False)]
    assert all(chained)


def test_every_call_lies_in_one_piece_in_order() -> None:
    graph = _graph(_stack, torch.randn(2, 4), *_weights(6))
    together = [n for p in cut(graph) for n in p.nodes]
    assert together == [n for n in graph.nodes if n.op == "call_function"]


def test_a_block_with_another_constant_is_not_an_instance() -> None:
    def stack(x: Tensor, *weights: Tensor) -> Tensor:
        for i, w in enumerate(weights):
            x = _block(x, w, 3.0 if i == 6 else 2.0)
        return x

    pieces = cut(_graph(stack, torch.randn(2, 4), *_weights(7)))
    owners = [p.instance_of for p in pieces]
    assert max(owners.count(o) for o in owners) <= 6
    odd = next(p for p in pieces if any(n.target is aten.mul.Tensor and n.args[1] == 3.0 for n in p.nodes))
    assert owners.count(odd.instance_of) == 1


def test_a_block_with_another_shape_is_not_an_instance() -> None:
    def stack(x: Tensor, *weights: Tensor) -> Tensor:
        return _stack(_stack(x, *weights[:-1]), weights[-1])

    pieces = cut(_graph(stack, torch.randn(2, 4), *_weights(5), torch.randn(4, 8)))
    assert max(p.instance_of for p in pieces) == pieces[-1].instance_of == len(pieces) - 1


def test_too_few_or_too_small_repetitions_stay_whole() -> None:
    assert cut(_graph(_stack, torch.randn(2, 4), *_weights(MIN_COUNT - 1))) == []

    def small(x: Tensor) -> Tensor:
        for _ in range(10):
            x = torch.sin(x) + 1.0
        return x

    assert cut(_graph(small, torch.randn(3))) == []


def _stateful(x: Tensor, *rest: Tensor) -> Tensor:
    half = len(rest) // 2
    new = []
    for w, state in zip(rest[:half], rest[half:], strict=True):
        updated = state * 0.5 + x
        new.append(updated)
        x = _block(updated, w)
    for state, updated in zip(rest[half:], new, strict=True):
        state.copy_(updated)
    return x


def test_writes_of_state_move_to_their_block() -> None:
    states = [torch.randn(2, 4) for _ in range(5)]
    graph = _graph(_stateful, torch.randn(2, 4), *_weights(5), *states)
    sink_writes(graph)
    graph.lint()
    pieces = cut(graph)
    owners = [p.instance_of for p in pieces]
    block = max(set(owners), key=owners.count)
    for piece in (p for p in pieces if p.instance_of == block):
        assert sum(n.target is aten.copy_.default for n in piece.nodes) == 1


def test_the_old_value_is_read_before_the_write() -> None:
    def late(x: Tensor, state: Tensor) -> Tensor:
        new = state + x
        view = state.view(-1)
        y = torch.sin(new) * view.view(2, 4)
        state.copy_(new)
        return y

    graph = _graph(late, torch.randn(2, 4), torch.randn(2, 4))
    sink_writes(graph)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    write = next(i for i, n in enumerate(calls) if n.target is aten.copy_.default)
    reads = [i for i, n in enumerate(calls) if n.target in (aten.view.default, aten.mul.Tensor)]
    assert max(reads) < write


def test_a_view_of_state_never_crosses_a_cut() -> None:
    def leaking(x: Tensor, state: Tensor, *weights: Tensor) -> Tensor:
        view = state.view(2, 4)
        for w in weights:
            x = _block(x, w)
            state.copy_(state * 0.5)
            x = x + view
        return x

    assert cut(_graph(leaking, torch.randn(2, 4), torch.randn(8), *_weights(5))) == []


def test_written_state_may_be_returned() -> None:
    def returning(*given: Tensor) -> tuple[Tensor, ...]:
        x = _stateful(*given)
        return (x, *given[-5:])

    states = [torch.randn(2, 4) for _ in range(5)]
    graph = make_fx(returning, tracing_mode="fake")(torch.randn(2, 4), *_weights(5), *states).graph
    assert len(cut(graph)) >= 5


def test_a_write_to_anything_else_is_left_whole() -> None:
    def inplace(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = _block(x, w)
            x.add_(1.0)
        return x

    assert cut(_graph(inplace, torch.randn(2, 4), *_weights(5))) == []
