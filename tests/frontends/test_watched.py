"""A model without guards on torch's own modules is compiled again where one of them changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tilewright.frontends.speculate import speculate
from tilewright.frontends.watched import Watched


class Block(nn.Module):
    """Two linear layers, and a factor of its own that guards watch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)
        self.drop = nn.Dropout(0.5)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.drop(self.act(self.first(x)))) * self.factor
        return hidden


def _block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block().eval()


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _agree(watched: Watched, block: Block, x: Tensor) -> None:
    torch.testing.assert_close(watched(x), block(x), rtol=1e-5, atol=1e-6)


CHANGES: dict[str, Callable[[Block], Any]] = {
    "another layer": lambda b: setattr(b, "first", nn.Linear(16, 24)),
    "another function": lambda b: setattr(b, "act", nn.ReLU()),
    "no bias": lambda b: setattr(b.second, "bias", None),
    "another parameter": lambda b: setattr(b.first, "weight", nn.Parameter(torch.ones(24, 16))),
    "other data": lambda b: setattr(b.first.weight, "data", torch.ones(24, 16).t().contiguous().t()),
    "a hook": lambda b: b.first.register_forward_hook(lambda m, args, out: out + 1),
    "an attribute": lambda b: setattr(b.drop, "p", 0.0),
    "a forward of its own": lambda b: setattr(b.act, "forward", torch.tanh),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_by_a_look(change: Callable[[Block], Any]) -> None:
    torch._dynamo.reset()
    block, x = _block(), torch.randn(3, 16)
    watched = Watched(block, {"pipeline": "exact", "lower": "eager"}, 8)
    _agree(watched, block, x)
    before = _graphs()
    watched.look()
    _agree(watched, block, x)
    assert _graphs() == before
    change(block)
    watched.look()
    _agree(watched, block, x)
    assert _graphs() == before + 1


@torch.no_grad()
def test_what_needs_no_look() -> None:
    torch._dynamo.reset()
    block, other, x = _block(), _block(1), torch.randn(3, 16)
    watched = Watched(block, {"pipeline": "cpu-int4", "lower": "eager"}, 8)
    first = watched(x)
    block.first.weight.mul_(-1.0)  # in place: derived weights are compared by version
    second = watched(x)
    assert (first - second).abs().max() > 0.01
    block.factor = 3.0  # of the model's own module: guarded
    torch.testing.assert_close(watched(x), second * 3.0)
    ordinary = torch.compile(other, backend="tilewright", options={"pipeline": "exact", "lower": "eager"})
    torch.testing.assert_close(ordinary(x), other(x), rtol=1e-5, atol=1e-6)  # it has programs of its own


@torch.no_grad()
def test_a_speculator_looks_before_every_generation() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    fast = speculate(model, "cpu-int4", pipeline="exact")
    prompt = [[3, 1, 4, 1, 5]]
    for change in (lambda: None, lambda: setattr(model, "lm_head", nn.Linear(32, 61, bias=False))):
        change()
        want = model.generate(torch.tensor(prompt), max_new_tokens=8, do_sample=False)
        assert fast.generate(prompt, 8) == want.tolist()
