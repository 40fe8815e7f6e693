"""A cache of constant size: `heavy-hitter-kv` with a score that does not count on what was given up.

paper: arXiv:2403.09054 (Keyformer). The score is a softmax of logits with Gumbel noise, the flatter the
longer the text; noise enters the score alone. The paper keeps 60 % of the prompt, 30 % of them the
newest; here both are numbers of tokens, so that sequences of a batch do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, graph_pass, ops
from tilewright.passes.memory import _evictions as evictions
from tilewright.passes.memory._gumbel import gumbel, noised_mass
from tilewright.passes.memory._paged_sites import first_of


@graph_pass(
    "keyformer-kv",
    stage=Stage.MEMORY,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2403.09054",
    owns=("attention.cache_policy",),
)
class KeyformerKV(GraphPass):
    """Keep `budget` tokens of each key head: the newest `recent`, and those of the greatest noised score.

    rewrite:
        paged_attention(q, pool, table, lengths), ... of later tokens over the same pool
     -> paged_attention(q, pool, table, lengths), token_attention(..., tokens kept), ...

    A token's score is the sum of softmax((logits + noise) / tau) over all queries so far. tau is tau_start
    for the prompt and rises with every token that is generated. As the policy of `tilewright.kv_cache` it
    frees the memory of what is given up.
    """

    budget: int = 1024
    """Tokens kept of each key head."""
    recent: int = 307
    """Newest tokens that stay, whatever their score."""
    tau_start: float = 1.0
    """Temperature of the prompt."""
    tau_end: float = 2.0
    """Temperature after `max_new_tokens`."""
    max_new_tokens: int = 256
    """Tokens over which the temperature rises."""
    noise: float = 1.0
    """Factor of the noise; 0 with temperatures of 1 is `heavy-hitter-kv`."""
    seed: int = 0
    """Of the noise."""
    dense_layers: int = 2
    """First layers that keep everything."""

    def validate(self) -> None:
        if self.recent < 1:
            raise self.option_error("recent", "expected 1 token or more")
        if self.budget < self.recent:
            raise self.option_error("budget", f"expected recent = {self.recent} tokens or more")
        for name in ("tau_start", "tau_end"):
            if not 0.0 < getattr(self, name) <= 100.0:
                raise self.option_error(name, "expected more than 0, at most 100")
        if self.max_new_tokens < 1:
            raise self.option_error("max_new_tokens", "expected 1 token or more")
        if not 0.0 <= self.noise <= 100.0:
            raise self.option_error("noise", "expected 0 to 100")
        if not 0 <= self.seed < 1 << 32:
            raise self.option_error("seed", "expected 0 to 4294967295")
        if self.dense_layers < 0:
            raise self.option_error("dense_layers", "expected 0 layers or more")

    def tau(self, lengths: Tensor, tokens: int, prompt: Tensor) -> Tensor:
        """float32 [B, T]: the temperature of the newest tokens of sequences whose prompts are so long."""
        place = lengths[:, None] - tokens + torch.arange(tokens, device=lengths.device)
        done = (place + 1 - prompt[:, None]).clamp(0, self.max_new_tokens) / self.max_new_tokens
        return self.tau_start + done * (self.tau_end - self.tau_start)

    def scored(self, layer, q, keys, positions, held, lengths, first, prompt, scale) -> Tensor:
        """What tokens get from the newest: `noised_mass`."""
        heat, noise = self.tau(lengths, q.shape[2], prompt), (self.noise, self.seed, layer)
        begin = first_of(lengths, first)
        mass: Tensor = noised_mass(q, keys, positions, held, lengths, begin, scale, noise, heat)
        return mass

    def worth(self, scores: Tensor, positions: Tensor, lengths: Tensor, first: Tensor | None) -> Tensor:
        """By what tokens stay, of sequences of so many tokens: [B, Hkv, n]."""
        return evictions.worth(scores, positions, first, lengths - self.recent)

    def apply(self, program: Program, log: PassLog) -> None:
        evictions.rewrite_steps(program, log, self._step, self.dense_layers)

    def _step(
        self, layer, q, k_pages, v_pages, table, lengths, first, scale, kept=None, scores=None, prompt=None
    ):
        out, lse = evictions.attend_kept(q, k_pages, v_pages, table, lengths, first, scale, kept)
        keys, prompt = evictions.keys_of(k_pages, table), lengths if prompt is None else prompt
        if kept is None:
            kept = torch.ones(keys.shape[:3], dtype=torch.bool, device=q.device)
        at = evictions.places(table, k_pages).expand(keys.shape[:3])
        new = self.scored(layer, q, keys, at, kept, lengths, first, prompt, scale)
        scores = new if scores is None else scores + new
        worth = self.worth(scores, at, lengths, first)
        return out, lse, evictions.keep(worth, kept, lengths, self.budget), scores, prompt

    def reference(self, program: Program) -> None:
        """Masked attention over all keys; scores from its log-probabilities, to which noise is added."""
        evictions.rewrite_steps(program, None, self._masked, self.dense_layers)

    def _masked(
        self, layer, q, k_pages, v_pages, table, lengths, first, scale, kept=None, scores=None, prompt=None
    ):
        given = (q, k_pages, v_pages, table, lengths, first, scale, kept)
        out, lse, shares, held = evictions.masked_step(*given)
        at, prompt = evictions.places(table, k_pages), lengths if prompt is None else prompt
        begin, tokens, heads = first_of(lengths, first)[:, None], q.shape[2], q.shape[1]
        place = lengths[:, None] - tokens + torch.arange(tokens, device=q.device)
        zeta = gumbel(self.seed, layer, heads, place - begin, (at - begin)[:, None].expand(-1, heads, -1))
        heat = self.tau(lengths, tokens, prompt)[:, None, None, :, None]
        tilted = ((shares.log() + self.noise * zeta.view_as(shares)) / heat).softmax(-1).nan_to_num(0.0)
        scores = tilted.sum((2, 3)) + (0.0 if scores is None else scores)
        stay = evictions.better(scores, held, at >= lengths[:, None] - self.recent, self.budget)
        return out, lse, stay | (at >= lengths[:, None, None]), scores, prompt

    def exact_limit(self) -> KeyformerKV:
        return replace(self, budget=1 << 40)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        few = {"budget": 9, "recent": 4, "dense_layers": 0}
        grown = evictions.grown(11)
        hot = {**few, "tau_start": 0.5, "tau_end": 4.0, "max_new_tokens": 2, "seed": 3}
        yield hot, Example(evictions.decode_steps((8, 1, 1, 1)), grown, count=4)
        yield {**few, "noise": 0.0}, Example(evictions.decode_steps((8, 2, 1)), grown[:5], count=3)
        yield few, Example(ops.paged_attention, grown, refusal="no other attention")
        yield {}, Example(evictions.decode_steps((8, 3)), grown, refusal="layer 0 is one of the first 2")
        picked = torch.zeros(2, 1, 1, dtype=torch.int32)
        yield few, Example(ops.paged_attention, (*grown, picked), refusal="chosen before")
