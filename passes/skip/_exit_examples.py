"""Examples of `early-exit`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import Example, Tensor, ops


def exit_examples() -> Iterator[tuple[dict, Example]]:
    """A stack of gated residual layers, one call of one token each, and what may not leave."""

    def stack(x, head, *weights):
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            x = x + ops.linear(torch.tanh(ops.linear(x, up)), down)
        return ops.linear(torch.sin(x), head)

    weights = [Tensor(7, 5, weight=True), Tensor(5, 7, weight=True)] * 5
    given = (Tensor(6, 1, 5), Tensor(9, 5, weight=True), *weights)
    yield {"exits": "2+4", "threshold": 0.97}, Example(stack, given, count=2)
    yield {"exits": "1+3", "measure": "confidence", "threshold": 0.3}, Example(stack, given, count=2)
    yield {"exits": "3", "measure": "entropy", "threshold": 0.5}, Example(stack, given)
    many = (Tensor(2, 3, 5), *given[1:])
    yield {"exits": "2", "threshold": 0.97, "prompt": True}, Example(stack, many)
    yield {"exits": "2"}, Example(stack, many, refusal="3 tokens in a call")
    flat = (Tensor(3, 5), *given[1:])
    yield {"exits": "2"}, Example(stack, flat, refusal="expected [batch, tokens, channels]")

    def summed(x, head, *weights):
        return stack(x, head, *weights).sum((0, 1))

    yield (
        {"exits": "2", "measure": "entropy"},
        Example(summed, given, refusal="no row of logits for each token"),
    )

    def leaky(x, head, *weights):
        inner = []
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            inner.append(torch.tanh(ops.linear(x, up)))
            x = x + ops.linear(inner[-1], down)
        return ops.linear(torch.sin(x), head), *inner

    yield {"exits": "2"}, Example(leaky, given, refusal="may not be left out")
