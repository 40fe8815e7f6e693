"""The obvious form of a program that runs on fewer channels, and examples of `prune-width-for-decode`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor as Value
from torch import fx

from tilewright.compiler import Example, Program, Tensor, ops
from tilewright.compiler.graph import insert_like
from tilewright.compiler.schema import arguments
from tilewright.compiler.width import Channels


def masked(program: Program, channels: Channels, kept: Value, factors: Mapping[fx.Node, float]) -> None:
    """Zeros in place of the channels that go, at full width."""
    graph, aten = program.graph, torch.ops.aten
    writers = [*channels.tables, *channels.writers]
    mask = torch.zeros(channels.width, dtype=writers[0].meta["val"].dtype)
    mask[kept] = 1.0
    held = program.constant(mask, writers[0])
    for writer in writers:
        zeroed = insert_like(graph, writer.next, aten.mul.Tensor, (writer, held), writer)
        _read_instead(writer, zeroed)
    if not channels.stream:  # an activation need not be zero at zero, nor a bias
        for reader in channels.readers:
            x = arguments(reader)["x"]
            reader.replace_input_with(x, insert_like(graph, reader, aten.mul.Tensor, (x, held), x))
    share = channels.width / kept.numel()
    for norm in channels.norms:
        given = arguments(norm)  # x sqrt(D / D') has over D channels the mean square that x has over D'
        scaled = insert_like(graph, norm, aten.mul.Tensor, (given["x"], share**0.5), given["x"])
        norm.replace_input_with(given["x"], scaled)
        back = factors.get(norm, 1.0) * share**-0.5
        result = insert_like(graph, norm.next, aten.mul.Tensor, (norm, back), norm)
        _read_instead(norm, result)


def _read_instead(old: fx.Node, new: fx.Node) -> None:
    """Let all that read a node read a function of it."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def width_examples() -> Iterator[tuple[dict, Example]]:
    """A decoder step of two layers with tied embedding, and what may not lose channels."""
    small = {"multiple": 4, "mlp_ratio": 0.5, "hidden_ratio": 0.25, "importance": "weight"}
    yield small, Example(_decoder, _INPUTS, count=3)
    yield {**small, "hidden_ratio": 0.0}, Example(_decoder, _INPUTS, count=2)
    yield {**small, "mlp_ratio": 0.0}, Example(_decoder, _INPUTS, count=1)
    yield {"importance": "weight"}, Example(_decoder, _INPUTS, refusal="all stay")
    many = (Tensor(2, 5, dtype=torch.int64), *_INPUTS[1:])
    yield small, Example(_decoder, many, refusal="prompts are read at full width")
    yield {**small, "mlp_ratio": 0.0}, Example(_centred, _INPUTS, refusal="subtracts the mean")
    yield {**small, "hidden_ratio": 0.0}, Example(_centred, _INPUTS, count=2)

    def leaky(x, up, down):
        inner = ops.linear(x, up).relu()
        return ops.linear(inner, down), inner

    inputs = (Tensor(2, 1, 12), Tensor(8, 12, weight=True), Tensor(12, 8, weight=True))
    yield small, Example(leaky, inputs, refusal="reads the hidden channels")


def _decoder(tokens, table, gain, *weights):
    """Two layers of an attention without a past and a gated MLP on 16 channels, 12 hidden ones."""
    x = ops.embedding(table, tokens)
    for wv, wo, wg, wu, wd in (weights[:5], weights[5:]):
        x = x + ops.linear(ops.linear(ops.rms_norm(x, gain, 1e-6), wv), wo)
        n = ops.rms_norm(x, None, 1e-6)
        x = x + ops.linear(ops.gated_mlp(ops.linear(n, wg), ops.linear(n, wu), "silu"), wd)
    return ops.linear(ops.rms_norm(x, gain, 1e-6), table)


def _centred(tokens, table, gain, *weights):
    """The same with norms that subtract the mean, and activations without a gate."""
    x = ops.embedding(table, tokens)
    for _, _, _, wu, wd in (weights[:5], weights[5:]):
        x = x + ops.linear(torch.sigmoid(ops.linear(ops.layer_norm(x, [16], None, None), wu)).relu(), wd)
    return ops.linear(ops.layer_norm(x, [16], None, None), table)


_LAYER = ((8, 16), (16, 8), (12, 16), (12, 16), (16, 12))
_INPUTS = (
    Tensor(2, 1, dtype=torch.int64),
    Tensor(6, 16, gain=0.5, weight=True),
    Tensor(16, weight=True),
    *(Tensor(*shape, gain=0.5, weight=True) for shape in (*_LAYER, *_LAYER)),
)
