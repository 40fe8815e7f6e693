"""Greedy generation over a static cache, with any callable that stands for the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilewright.frontends.cache_argument import cache_arguments

CACHE_STEP = 256
"""Caches have a multiple of this many slots, so that runs of other lengths find their kernels compiled."""


@dataclass(frozen=True)
class Generated:
    """Tokens int64 [1, prompt + new] and how long they took."""

    tokens: torch.Tensor
    new_tokens: int
    first_token_seconds: float
    """Prefill and the first compiled step."""
    tokens_per_second: float
    """Of the tokens after the second."""


def generate(module: nn.Module, forward: Callable[..., Any], tokens: torch.Tensor, count: int) -> Generated:
    """Greedy decoding: prefill runs the module itself once, every further token runs `forward`.

    module: a Hugging Face causal language model. tokens: int64 [1, S]. Stops early at an end-of-text token.
    """
    from transformers import StaticCache

    config: Any = module.config
    length = tokens.shape[1]
    room = -(-(length + count) // CACHE_STEP) * CACHE_STEP
    given = cache_arguments(module, StaticCache(config=config, max_cache_len=room))
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    stop = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    started = time.perf_counter()
    times = []
    with torch.no_grad():
        logits = module(input_ids=tokens, **given).logits
        for i in range(count):
            latest = logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, latest), 1)
            times.append(time.perf_counter())
            if i == count - 1 or int(latest) in stop:
                break
            position = torch.tensor([[length + i]])
            logits = forward(input_ids=latest.clone(), position_ids=position, **given).logits
    steady = times[2:] if len(times) > 3 else times
    rate = (len(steady) - 1) / (steady[-1] - steady[0]) if len(steady) > 1 else 0.0
    first = times[1] - started if len(times) > 1 else times[0] - started
    return Generated(tokens, len(times), first, rate)
