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

    def joined(image, text, head, *weights):
        pairs = list(zip(weights[::2], weights[1::2], strict=True))
        for up, down in pairs[:3]:
            both = torch.tanh(ops.linear(torch.cat((text, image), 1), up))
            text, image = text + ops.linear(both[:, :2], down), image + ops.linear(both[:, 2:], down)
        x = torch.cat((text, image), 1)
        for up, down in pairs[3:]:
            x = x + ops.linear(torch.tanh(ops.linear(x, up)), down)
        return ops.linear(torch.sin(x), head)

    streams = (Tensor(2, 3, 5), Tensor(2, 2, 5), *given[1:], *weights[:4])
    refusal = "are coupled streams: tokens leave one stream, behind the last coupled layer"
    yield {"exits": "2", "prompt": True}, Example(joined, streams, refusal=refusal)
    yield {"exits": "5", "threshold": 0.97, "prompt": True}, Example(joined, streams)

    def leaky(x, head, *weights):
        inner = []
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            inner.append(torch.tanh(ops.linear(x, up)))
            x = x + ops.linear(inner[-1], down)
        return ops.linear(torch.sin(x), head), *inner

    yield {"exits": "2"}, Example(leaky, given, refusal="may not be left out")
