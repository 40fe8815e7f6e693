"""Examples of the passes over repeated blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import Example, Tensor, ops


def drop_examples() -> Iterator[tuple[dict, Example]]:
    """A stack of gated residual layers, and one whose inner values are returned."""

    def stack(x, *weights):
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            x = x + ops.linear(torch.tanh(ops.linear(x, up)), down)
        return ops.linear(torch.sin(x), weights[0])

    weights = [Tensor(7, 5, weight=True), Tensor(5, 7, weight=True)] * 5
    yield {"layers": "1+2", "max_share": 1.0}, Example(stack, (Tensor(3, 5), *weights), count=2)
    yield {"layers": "3", "max_share": 1.0}, Example(stack, (Tensor(3, 5), *weights))

    def leaky(x, *weights):
        inner = []
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            inner.append(torch.tanh(ops.linear(x, up)))
            x = x + ops.linear(inner[-1], down)
        return ops.linear(torch.sin(x), weights[0]), *inner

    shut = Example(leaky, (Tensor(3, 5), *weights), refusal="may not be bypassed")
    yield {"layers": "1", "max_share": 1.0}, shut
    yield (
        {"layers": "1", "part": "attention"},
        Example(stack, (Tensor(3, 5), *weights), refusal="no step that is attention alone"),
    )


def reuse_examples() -> Iterator[tuple[dict, Example]]:
    """The same stack with a gate around some of it, and layers whose inner values are returned."""

    def stack(x, *weights):
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            x = x + ops.linear(torch.tanh(ops.linear(x, up)), down)
        return ops.linear(torch.sin(x), weights[0])

    weights = [Tensor(7, 5, weight=True), Tensor(5, 7, weight=True)] * 5
    given = (Tensor(3, 5), *weights)
    yield {}, Example(stack, given)
    yield {"metric": "first-block", "head": 1, "tail": 1}, Example(stack, given)
    yield {"metric": "modulated"}, Example(stack, given)
    yield {"head": 3, "tail": 2}, Example(stack, given, refusal="leave no block")

    def leaky(x, *weights):
        inner = []
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            inner.append(torch.tanh(ops.linear(x, up)))
            x = x + ops.linear(inner[-1], down)
        return ops.linear(torch.sin(x), weights[0]), *inner

    yield {}, Example(leaky, given, refusal="may not be left out")
