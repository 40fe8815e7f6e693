"""How a token is picked from logits: greedily or by drawing, behind any logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.runtime.acceptance import accept_greedy, accept_sampled, draw
from tilewright.runtime.token_tree import Ranked, TokenTree, accept_tree_greedy, accept_tree_sampled


class Sampling:
    """One way of picking tokens, the same for draft and target."""

    def __init__(self, processors: Any = None, *, sample: bool, generator: torch.Generator | None) -> None:
        """processors: a LogitsProcessorList of transformers; each verified position sees its own prefix."""
        self._processors = processors if processors else None
        self._sample, self._generator = sample, generator

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; otherwise the likeliest is taken."""
        return self._sample

    @property
    def generator(self) -> torch.Generator | None:
        """Of the draws."""
        return self._generator

    @classmethod
    def of(cls, temperature: float, top_k: int, top_p: float, seed: int | None) -> Sampling:
        """Greedy at temperature 0; otherwise by transformers' own warpers, in its order."""
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        if temperature < 0.0 or top_k < 0 or not 0.0 < top_p <= 1.0:
            raise OptionError(
                f"temperature = {temperature}, top_k = {top_k}, top_p = {top_p}: expected 0 or more, "
                "0 or more, and more than 0 up to 1"
            )
        if temperature == 0.0:
            return cls(sample=False, generator=None)
        warpers: Any = LogitsProcessorList()
        if temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k=top_k))
        if top_p < 1.0:
            warpers.append(TopPLogitsWarper(top_p=top_p))
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return cls(warpers, sample=True, generator=generator)

    def _scores(self, prefix: Sequence[int], logits: Tensor) -> Tensor:
        """Logits [V] behind the processors, which see the whole prefix."""
        if self._processors is None:
            return logits
        ids = torch.tensor([list(prefix)], device=logits.device)
        scores: Tensor = self._processors(ids, logits.float()[None])[0]
        return scores

    def propose(self, prefix: Sequence[int], logits: Tensor) -> tuple[int, Tensor | None]:
        """(token, the distribution it was drawn from); None for a greedy choice. logits: [V]."""
        scores = self._scores(prefix, logits)
        if not self._sample:
            return int(scores.argmax()), None
        distribution = scores.double().softmax(-1).cpu()
        return draw(distribution, self._generator), distribution

    def accept(
        self, prefix: Sequence[int], drafted: Sequence[int], drafts: Tensor | None, logits: Tensor
    ) -> list[int]:
        """The tokens to commit behind `prefix`, 1 to n + 1; logits [n + 1, V] of the target, the first row
        its answer to the prefix."""
        if not self._sample and self._processors is None:
            return accept_greedy(drafted, logits.argmax(-1).tolist())
        scores = torch.stack([self._scores([*prefix, *drafted[:i]], row) for i, row in enumerate(logits)])
        if not self._sample:
            return accept_greedy(drafted, scores.argmax(-1).tolist())
        return accept_sampled(drafted, drafts, scores.double().softmax(-1).cpu(), self._generator)

    def distribution(self, prefix: Sequence[int], logits: Tensor) -> Tensor:
        """[V], float64, that the token behind `prefix` is drawn from. logits: [V]."""
        return self._scores(prefix, logits).double().softmax(-1).cpu()

    def ranked(self, prefixes: Sequence[Sequence[int]], logits: Tensor, count: int) -> list[Ranked]:
        """The `count` likeliest tokens behind each prefix; logits [B, V]."""
        scores = logits
        if self._processors is not None:
            scores = torch.stack([self._scores(p, row) for p, row in zip(prefixes, logits, strict=True)])
        values, tokens = scores.topk(min(count, scores.shape[-1]))
        shares = (values - scores.logsumexp(-1, keepdim=True)).exp()
        return [list(zip(t, s, strict=True)) for t, s in zip(tokens.tolist(), shares.tolist(), strict=True)]

    def accept_tree(self, prefix: Sequence[int], tree: TokenTree, logits: Tensor) -> tuple[list[int], int]:
        """(the nodes to keep, the token behind them); logits [n + 1, V] of the target: behind `prefix`, then
        behind each node."""
        if not self._sample and self._processors is None:
            return accept_tree_greedy(tree, logits.argmax(-1).tolist())
        words = [[], *[tree.words(node) for node in range(len(tree.tokens))]]
        scores = [self._scores([*prefix, *w], row) for w, row in zip(words, logits, strict=True)]
        stacked = torch.stack(scores)
        if not self._sample:
            return accept_tree_greedy(tree, stacked.argmax(-1).tolist())
        return accept_tree_sampled(tree, stacked.double().softmax(-1).cpu(), self._generator)
