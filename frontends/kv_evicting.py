"""Cache layers that give tokens up for good: what is left of a sequence lies close together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_layer import PagedLayer, run
from tilewright.passes.memory._evictions import least, most
from tilewright.passes.memory.heavy_hitter_kv import HeavyHitterKV
from tilewright.passes.memory.keyformer_kv import KeyformerKV
from tilewright.passes.memory.snap_kv import SnapKV


class EvictingLayer(PagedLayer):
    """Holds other tokens for each key head, as many for all; the view counts what is held, in slots.

    A slot is where a token lies: its key keeps the position it was computed for. Padding lies in front. New
    tokens come behind everything, so that causality between slots is that between positions.
    """

    is_croppable = False

    def __init__(self, index: int, page: int, check: Callable[[], None]) -> None:
        super().__init__(index, page, check)
        self.forget()

    def forget(self) -> None:
        """As before the first token."""
        self._seen = self._final = 0
        self.positions = torch.empty(0, 0, 0, dtype=torch.int64)
        """int64 [B, Hkv, n]: which token each slot holds."""
        self.scores = torch.empty(0, 0, 0)
        """float32 [B, Hkv, n]: what the policy says of it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store the new rows behind everything; returns them."""
        found = super().update(key_states, value_states)
        batch, heads, tokens, _size = key_states.shape
        device = key_states.device
        new = torch.arange(self._seen, self._seen + tokens, device=device).repeat(batch, heads, 1)
        score = torch.zeros(batch, heads, tokens, device=device)
        fresh = not self._seen
        self.positions = new if fresh else torch.cat([self.positions, new], 2)
        self.scores = score if fresh else torch.cat([self.scores, score], 2)
        self._seen += tokens
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention of the new tokens over everything held; then the policy gives tokens up."""
        self._fresh = False
        pool, (table, lengths) = self.view.pool, self.view.tables()
        # Padding is left out by slot; every head of a sequence holds as much of it.
        begin = None if first is None else (self.positions[:, 0] < first[:, None]).sum(1)
        out, lse = run("paged_attention", q, pool.k_pages, pool.v_pages, table, lengths, begin, None, scale)
        self.settle(q, lse, first, begin, scale)
        attended: Tensor = out
        return attended

    def settle(
        self, q: Tensor, lse: Tensor, first: Tensor | None, begin: Tensor | None, scale: float
    ) -> None:
        """Give up what the policy no longer keeps, after the attention of q [B, H, T, D]; lse [B, H, T].

        first int64 [B]: where each sequence starts, in positions; begin: in slots."""
        raise NotImplementedError

    def rows(self) -> tuple[Tensor, Tensor]:
        """(keys [B, Hkv, n, D], values [B, Hkv, n, E]) by slot, copied."""
        pool, (table, _) = self.view.pool, self.view.tables()
        held = self.positions.shape[2]
        keys, values = (
            pages[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :held]
            for pages in (pool.k_pages, pool.v_pages)
        )
        return keys, values

    def hold(self, slots: Tensor) -> None:
        """Go on with the tokens in `slots` int64 [B, Hkv, m] alone, in that order; the memory of the
        others is given back."""
        keys, values = (x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[3])) for x in self.rows())
        self.positions, self.scores = self.positions.gather(2, slots), self.scores.gather(2, slots)
        self._begin_anew(keys, values)

    def overwrite(self, slots: Tensor) -> None:
        """The newest token takes the place of that in slots int64 [B, Hkv]."""
        view, pool, page = self.view, self.view.pool, self.page
        table, last = view.tables()[0].long(), self.positions.shape[2] - 1
        batch = torch.arange(view.batch, device=slots.device)[:, None]
        head = torch.arange(slots.shape[1], device=slots.device)[None]
        target, source = table.gather(1, slots // page), table[:, last // page, None]
        for pages in (pool.k_pages, pool.v_pages):
            pages[target, head, slots % page] = pages[source, head, last % page]
        for plane in (self.positions, self.scores):
            plane[batch, head, slots] = plane[:, :, last]
        self.positions, self.scores = self.positions[..., :last], self.scores[..., :last]
        view.crop([last] * view.batch)

    def _begin_anew(self, keys: Tensor, values: Tensor) -> None:
        """A new pool, as the old one is as large as its longest moment."""
        self.view.free()
        self.lazy_initialization(keys, values)
        self.view.append(keys, values)

    def get_seq_length(self) -> int:
        """Tokens seen, padding and those given up included."""
        return self._seen

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        super().reset()
        self.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -tokens_to_remove tokens; OptionError where the policy has used them."""
        if tokens_to_remove < 0 and self._seen + tokens_to_remove < self._final:
            raise OptionError(
                f"layer {self.index}: {-tokens_to_remove} tokens cannot be taken back: what was given up for "
                f"the {self._final} first would have to come back"
            )
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self._seen += tokens_to_remove
            held = self.positions.shape[2] + tokens_to_remove
            self.positions, self.scores = self.positions[..., :held], self.scores[..., :held]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Sequence i goes on as sequence rows[i] was. Rows are copied, as slots are overwritten in place."""
        if self._view is None:
            return
        index = torch.tensor(rows, device=self.positions.device)
        keys, values = (x[index] for x in self.rows())
        self.positions, self.scores = self.positions[index], self.scores[index]
        self._begin_anew(keys, values)


class HeavyHitterLayer(EvictingLayer):
    """Adds what every token is attended, and gives up those that got least."""

    def __init__(
        self, index: int, page: int, check: Callable[[], None], policy: HeavyHitterKV | KeyformerKV
    ) -> None:
        super().__init__(index, page, check)
        self.policy = policy

    def score(
        self, q: Tensor, lse: Tensor, first: Tensor | None, begin: Tensor | None, scale: float
    ) -> Tensor:
        """[B, Hkv, n]: what the tokens get from this attention; arguments as of `settle`."""
        mass: Tensor = run("attention_mass", q, self.rows()[0], lse, begin, scale)
        return mass

    def settle(
        self, q: Tensor, lse: Tensor, first: Tensor | None, begin: Tensor | None, scale: float
    ) -> None:
        """Add to the scores, then keep the budget."""
        self.scores = self.scores + self.score(q, lse, first, begin, scale)
        self._final, held = self._seen, self.positions.shape[2]
        budget = self.policy.budget
        if held <= budget:
            return
        seen = torch.full((q.shape[0],), self._seen, device=q.device)
        worth = self.policy.worth(self.scores, self.positions, seen, first)
        if held == budget + 1:
            self.overwrite(least(worth, self.positions))
        else:
            self.hold(most(worth, self.positions, budget))


class KeyformerLayer(HeavyHitterLayer):
    """Adds noised shares of attention instead."""

    policy: KeyformerKV

    def forget(self) -> None:
        """As before the first token."""
        super().forget()
        self._prompt = 0

    def score(
        self, q: Tensor, lse: Tensor, first: Tensor | None, begin: Tensor | None, scale: float
    ) -> Tensor:
        """[B, Hkv, n]: what the tokens get; the first call is the prompt."""
        self._prompt = self._prompt or self._seen
        seen, prompt = (torch.full((q.shape[0],), n, device=q.device) for n in (self._seen, self._prompt))
        held = torch.ones_like(self.positions, dtype=torch.bool)
        return self.policy.scored(
            self.index, q, self.rows()[0], self.positions, held, seen, first, prompt, scale
        )


class SnapLayer(EvictingLayer):
    """Compresses prompts; what is generated comes behind."""

    is_croppable = True

    def __init__(self, index: int, page: int, check: Callable[[], None], policy: SnapKV) -> None:
        super().__init__(index, page, check)
        self.policy = policy

    def settle(
        self, q: Tensor, lse: Tensor, first: Tensor | None, begin: Tensor | None, scale: float
    ) -> None:
        """Of a prompt that is longer than the budget, keep what its last queries attend."""
        window, heads = self.policy.window, self.positions.shape[1]
        if q.shape[2] < window or self.positions.shape[2] <= self.policy.budget:
            return
        group = q.shape[1] // heads
        keys, last = self.rows()[0].repeat_interleave(group, 1), q[:, :, -window:].contiguous()
        mass = run("attention_mass", last, keys, lse[:, :, -window:].contiguous(), begin, scale)
        by_position = mass.new_zeros(*mass.shape[:2], self._seen)
        by_position.scatter_(2, self.positions.repeat_interleave(group, 1), mass)
        seen = torch.full((q.shape[0],), self._seen, device=q.device)
        worth = self.policy.worth(by_position, heads, seen, first).gather(2, self.positions)
        self.hold(most(worth, self.positions, self.policy.budget))
        self._final = self._seen
