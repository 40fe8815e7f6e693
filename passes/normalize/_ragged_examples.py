"""Programs that `match-ragged-attention` must raise, and ones that it must leave alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import Example, Tensor, ops

_VIDEO, _TEXT = 6, 5


def _one(entry, given, form="", scale=0.3):
    """The attention of one batch entry as diffusers spells it; `form` names what is different about it."""
    q, k, v, text_q, text_k, text_v, mask = given
    at = torch.nonzero(mask[entry : entry + 1].flatten()).flatten()
    parts = []
    for whole, text in ((q, text_q), (k, text_k), (v, text_v)):
        picked = text[entry : entry + 1, :, at] if form != "queries" or whole is q else text[:1]
        pair = [whole[entry : entry + 1], picked]
        parts.append(torch.cat(pair[::-1] if form == "front" else pair, 2))
    out = ops.attention(*parts, None, scale, form == "causal")
    if form == "short":
        return out
    amount = (0, 0, 0, _VIDEO + _TEXT - out.shape[2])
    return torch.nn.functional.pad(out, amount, value=1.0 if form == "ones" else 0.0)


def ragged_examples() -> Iterator[Example]:
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]])

    def inputs(batch: int) -> tuple:
        return (*(Tensor(batch, 3, _VIDEO, 8),) * 3, *(Tensor(batch, 3, _TEXT, 8),) * 3, mask[:batch])

    def both(order=(0, 1), scales=(0.3, 0.3)):
        return lambda *x: torch.cat([_one(b, x, scale=s) for b, s in zip(order, scales, strict=True)])

    yield Example(both(), inputs(2))
    yield Example(lambda *x: _one(0, x), inputs(1))

    def turned(*x):
        first, second = (_one(b, x) for b in (0, 1))
        return torch.cat([second, first])

    def read_twice(*x):
        first, second = (_one(b, x) for b in (0, 1))
        return torch.cat([first, second]), first * 2.0, second * 3.0

    def viewed(*x):
        """Entries of another order of axes, viewed as heads: no entries of the tensor."""

        def one(entry):
            whole = (t[entry : entry + 1].reshape(1, 3, _VIDEO, 8) for t in x[:3])
            return _one(0, (*whole, *(t[entry : entry + 1] for t in x[3:])))

        return torch.cat([one(0), one(1)])

    flat = (*(Tensor(2, _VIDEO, 3, 8),) * 3, *inputs(2)[3:])
    yield Example(both((1, 0)), inputs(2), refusal="one after another")
    yield Example(turned, inputs(2), refusal="one after another")
    yield Example(read_twice, inputs(2), count=2)
    yield Example(viewed, flat, refusal="one after another")
    yield Example(both(scales=(0.3, 0.2)), inputs(2), refusal="in different ways")
    for form, refusal in {
        "queries": "by one mask",
        "front": "do not stand behind",
        "causal": "a mask of its own",
        "short": "not padded back",
        "ones": "padded with zeros",
    }.items():
        yield Example(lambda *x, form=form: _one(0, x, form), inputs(1), refusal=refusal)
