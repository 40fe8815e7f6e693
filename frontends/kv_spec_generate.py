"""Generation of two tokens a step, one of them a guess that tells which rows the next step needs.

paper: arXiv:2503.16163 (SpeCache). Step t takes [x_t, x'_t+1]: the answer to x_t is x_t+1; the guess x'_t+1
chooses the rows that are fetched for it meanwhile, and its answer is the next guess. What the guess wrote
into the cache is taken back, so that a wrong one makes the fetched rows less useful and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cache_argument import cache_arguments, cache_in
from tilewright.frontends.kv_cache import PagedCache
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.frontends.kv_spec_cache import SpecCacheLayer, SpecTier

TAKEN = {
    "attention_mask", "cache", "past_key_values", "position_ids", "logits_to_keep", "use_cache", "synced_gpus"
}  # fmt: skip
"""What generate() hands over."""


class GuessedText:
    """Sequences of one batch and their padding, as the model is told of them."""

    def __init__(self, model: Any, cache: PagedCache, mask: Tensor) -> None:
        """mask: int64 [B, S] of the prompts."""
        self.model, self.cache, self.mask = model, cache, mask
        self.layers = [layer for layer in cache.layers if isinstance(layer, SpecCacheLayer)]
        self.counts = mask.sum(1)
        tier = cache.placement
        self._again = isinstance(tier, SpecTier) and tier.policy.on_wrong == "again"
        self.meant: Tensor | None = None
        """int64 [B]: the guess of the step before, of the token to come; None before the first."""
        self._guess: Tensor | None = None

    def prompt(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] behind the prompts int64 [B, S]."""
        return self._answers(tokens, self.mask, _places(self.mask), 1)[:, 0]

    def follow(self, token: Tensor) -> Tensor:
        """Logits [B, V] behind a token int64 [B] of every sequence, and a guess beside it."""
        guess = self._guess
        wrong = self._again and self.meant is not None and not torch.equal(self.meant, token)
        if guess is None or wrong:  # the token itself chooses rows for this step, and makes a guess
            guess = self.step(token)[:, 0].argmax(-1)
        answers = self.step(token, guess)
        self.meant, self._guess = guess, answers[:, 1].argmax(-1)
        return answers[:, 0]

    def step(self, *tokens: Tensor) -> Tensor:
        """Logits [B, T, V] behind T tokens int64 [B], the last a guess, which is taken back."""
        new = torch.stack(tokens, 1)
        mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        places = self.counts[:, None] + torch.arange(len(tokens), device=new.device)
        for layer in self.layers:
            layer.guessing = True
        try:
            logits = self._answers(new, mask, places, len(tokens))
        finally:
            for layer in self.layers:
                layer.guessing = False
        self.cache.crop(-1)
        self.mask = mask[:, :-1]
        self.counts = self.counts + len(tokens) - 1
        return logits

    def _answers(self, tokens: Tensor, mask: Tensor, places: Tensor, count: int) -> Tensor:
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=places,
            logits_to_keep=count,
            **cache_arguments(self.model, self.cache),
        ).logits
        return logits


@torch.no_grad()
def generate_with_guesses(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **given: Any,
) -> Tensor:
    """What `model.generate(ids, past_key_values=cache, custom_generate=generate_with_guesses)` calls.

    The cache is an empty one of `tilewright.kv_cache(model, "spec-cache-kv{...}")`. Processors, sampling,
    stopping criteria and left padding are those of generate(); it keeps a `streamer=` from custom functions.
    Returns int64 [B, S + new], padded behind the end. OptionError for beams and other ways to generate, for
    what a forward would be given besides tokens and their mask, for another cache, for one that holds tokens,
    and for a prompt of padding.
    """
    cache = _cache(given)
    _check(generation_config, given)
    mask = given.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.long()
    if not bool(mask.any(1).all()):
        raise OptionError("attention_mask has a row of 0s: expected a token or more in every prompt")
    places = given.get("position_ids")
    if places is not None and bool(((places - _places(mask)) * mask).any()):
        raise OptionError("position_ids do not count the tokens of a row: expected 0, 1, ... or none")
    pad = generation_config.pad_token_id or 0
    ids, over = input_ids, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def taken(logits: Tensor) -> Tensor:
        """int64 [B]: the tokens that follow, of logits [B, V]; padding behind an end."""
        scores = logits_processor(ids, logits.float())
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            token = scores.argmax(-1)
        return token.masked_fill(over, pad)

    text = GuessedText(model, cache, mask)
    logits = text.prompt(input_ids)
    while True:
        token = taken(logits)
        ids = torch.cat([ids, token[:, None]], 1)
        over = over | stopping_criteria(ids, None)
        if bool(over.all()):
            return ids
        logits = text.follow(token)


def _places(mask: Tensor) -> Tensor:
    """int64 [B, S]: positions of the tokens of mask [B, S]; 0 for padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _check(config: Any, given: dict[str, Any]) -> None:
    """OptionError for what would change the result and cannot."""
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or config.return_dict_in_generate:
        raise OptionError(
            f"spec-cache-kv gives one sequence per row, greedy or sampled, as tokens: no {mode.value} with "
            f"return_dict_in_generate = {config.return_dict_in_generate}"
        )
    if config.prefill_chunk_size:
        raise OptionError(
            f"prefill_chunk_size = {config.prefill_chunk_size}: spec-cache-kv takes a prompt at once"
        )
    others = sorted(name for name, value in given.items() if name not in TAKEN and value is not None)
    if others:
        raise OptionError(
            f"spec-cache-kv generates from input_ids and attention_mask; {others} came with them"
        )


def _cache(given: dict[str, Any]) -> PagedCache:
    cache = cache_in(given)
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    # Of 16 bits it has plain layers.
    if not isinstance(cache, PagedCache) or not kinds <= {SpecCacheLayer, PagedLayer}:
        raise OptionError(
            f"past_key_values is a {type(cache).__name__} of {', '.join(sorted(k.__name__ for k in kinds))}: "
            "expected a cache of spec-cache-kv",
            remedy="past_key_values=tilewright.kv_cache(model, 'spec-cache-kv')",
        )
    if cache.get_seq_length():
        raise OptionError(f"the cache holds {cache.get_seq_length()} tokens: expected an empty one")
    return cache
