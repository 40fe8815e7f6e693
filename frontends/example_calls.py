"""Seeded example arguments for the kinds of model that are loaded by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.loaded_model import Call, Examples

_ROOM = 64
"""Free positions a decode example leaves in its static cache."""


def _tokens(vocabulary: int, length: int) -> Tensor:
    """int64 [1, length], seeded, without the first three ids (padding, start, end in most vocabularies)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (1, length), generator=generator)


def causal_lm_examples(module: nn.Module) -> Examples:
    """`prefill` (default 64 tokens, no cache) and `decode` (one token after 64 in a static cache)."""
    config: Any = module.config

    def bounded(length: int | None) -> int:
        chosen, most = length or 64, int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
        if chosen >= most:
            raise OptionError(f"example length is {chosen}", remedy=f"the model has {most} positions")
        return chosen

    def prefill(length: int | None) -> Call:
        return (), {"input_ids": _tokens(config.vocab_size, bounded(length)), "use_cache": False}

    def decode(length: int | None) -> Call:
        from transformers import StaticCache

        tokens = _tokens(config.vocab_size, bounded(length) + 1)
        cache = StaticCache(config=config, max_cache_len=tokens.shape[1] + _ROOM)
        with torch.no_grad():
            module(input_ids=tokens[:, :-1], **cache_arguments(module, cache))
        position = torch.tensor([[tokens.shape[1] - 1]])
        last = tokens[:, -1:].contiguous()
        return (), {"input_ids": last, "position_ids": position, **cache_arguments(module, cache)}

    return {"prefill": prefill, "decode": decode}


def encoder_examples(module: nn.Module) -> Examples:
    """`call`: token ids only (default 32)."""
    config: Any = module.config
    return {"call": lambda length: ((), {"input_ids": _tokens(config.vocab_size, length or 32)})}


def wan_examples(module: nn.Module) -> Examples:
    """`denoise`: latents [1, C, length (6), 32, 32], a timestep, 12 text tokens; 6 x 16 x 16 video tokens."""
    config: Any = module.config

    def denoise(length: int | None) -> Call:
        generator = torch.Generator().manual_seed(2)
        latents = torch.randn(1, config.in_channels, length or 6, 32, 32, generator=generator)
        text = torch.randn(1, 12, config.text_dim, generator=generator)
        timestep = torch.tensor([500])
        named = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text}
        return (), {**named, "return_dict": False}

    return {"denoise": denoise}
