"""What a zoo entry is, and the helpers that build one: seeded weights, seeded inputs, expected counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

FAMILIES = ("decoder", "state-space", "encoder", "encoder-decoder", "vision", "diffusion")
COUNTED = ("attention", "linear", "rms_norm", "layer_norm", "rope", "gated_mlp", "embedding")
"""Semantic ops whose number is known from a configuration."""

BATCH, SEQ, VOCAB = 5, 7, 97
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 48, 6, 2, 8, 80
"""Sizes of the text models. No two axes agree (query heads come in groups of 3): a swapped axis shows."""


@dataclass(frozen=True)
class ZooEntry:
    """One architecture at a tiny size.

    `expected` counts the semantic ops of one call that a perfect recogniser finds. It follows from the
    configuration: layers, cross-attention, gated or plain MLP; rope counts rotated tensors, so a layer that
    rotates q and k counts 2. A linear layer counts whenever a weight matrix meets an activation, however the
    model spells it (`nn.Linear`, GPT-2's `Conv1D`); batched expert matmuls are not linear layers.
    x * sigmoid(1.702 x) is an activation, not a gated MLP.
    """

    name: str
    family: str
    """One of `FAMILIES`."""
    build: Callable[[], nn.Module]
    """The module with seeded random weights, float32, in eval mode."""
    inputs: Callable[[], Inputs]
    """Seeded arguments of one call."""
    expected: Mapping[str, int]
    """Semantic op -> number, for every op of `COUNTED`."""
    layers: int
    """Repeated blocks."""
    gathers: bool = False
    """It gathers tokens by a mask: one graph only where sizes that depend on data may stand in it."""

    def capturing(self) -> AbstractContextManager[None]:
        """What a compiled call of the model runs in."""
        patched: AbstractContextManager[None] = torch._dynamo.config.patch(
            capture_dynamic_output_shape_ops=self.gathers
        )
        return patched

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"{self.name}: family {self.family!r} is not one of {FAMILIES}")
        if tuple(self.expected) != COUNTED:
            raise ValueError(f"{self.name}: expected names {tuple(self.expected)}, it must name {COUNTED}")


def counts(*parts: tuple[int, Mapping[str, int]]) -> dict[str, int]:
    """Sum of (times, ops) parts over every op of `COUNTED`: `counts((layers, block), (1, head))`."""
    total: Counter[str] = Counter()
    for times, ops in parts:
        unknown = set(ops) - set(COUNTED)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are not counted ops; they are {COUNTED}")
        for op, number in ops.items():
            total[op] += times * number
    return {op: total[op] for op in COUNTED}


def seeded(seed: int) -> torch.Generator:
    """A CPU generator of that seed."""
    return torch.Generator().manual_seed(seed)


def tokens(*shape: int, vocab: int = VOCAB, seed: int = 1) -> Tensor:
    """Token ids in [3, vocab): no model's padding, start or end token."""
    return torch.randint(3, vocab, shape, generator=seeded(seed))


def noise(*shape: int, seed: int = 2) -> Tensor:
    """Standard normal float32."""
    return torch.randn(shape, generator=seeded(seed))


def right_padding(batch: int = BATCH, seq: int = SEQ) -> Tensor:
    """int64 mask [batch, seq] of 1 and 0: row i is short by i tokens, never empty."""
    lengths = (seq - torch.arange(batch)).clamp(min=1)
    return (torch.arange(seq) < lengths[:, None]).long()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a seeded value that makes a wrong rewrite visible; returns the model in eval mode.

    Library initialisations (0.02 weights, zero biases, unit norms) leave softmax flat and hide a lost bias.
    Weights of linear, convolution and embedding layers become normal with gain 1.5 over their fan-in; vectors
    and everything else keep their value plus noise.
    """
    generator = seeded(seed)
    done: set[int] = set()
    for module in model.modules():
        weighty = isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__.startswith("Conv")
        for parameter in module.parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            draw = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if weighty and parameter.dim() > 1:
                fan_in = (
                    parameter.shape[0]
                    if type(module).__name__ == "Conv1D"
                    else math.prod(parameter.shape[1:])
                )
                parameter.copy_(draw * (1.0 if isinstance(module, nn.Embedding) else 1.5 / math.sqrt(fan_in)))
            else:
                parameter.add_(draw * (0.2 if parameter.dim() == 1 else 0.1))
    return model.eval()


def seeded_model(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` constructs, in float32 with seeded weights; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(make().float())


def from_config(model_class: str, config_class: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Builder of a transformers model by class names."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, config_class)(**settings)
        return seeded_model(lambda: getattr(transformers, model_class)(config))

    return build
