"""One choice of tokens for the layers that follow: what `lessismore-kv` keeps between layers of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_layer import PagedLayer, run
from tilewright.passes.memory._early_choice import Ranking, in_turn, raw_logits
from tilewright.passes.memory.lessismore_kv import LessIsMoreKV


class SharedChoice:
    """The latest choice of a cache of `count` layers."""

    def __init__(self, policy: LessIsMoreKV, count: int) -> None:
        self.policy, self.layers = policy, policy.choosing(count)
        if self.layers[-1] >= count:
            raise OptionError(
                f"lessismore-kv: select_layers = {list(self.layers)}: the model has layers 0 to {count - 1}"
            )
        self._positions: Tensor | None = None
        self._length = -1

    def fits(self, length: int) -> bool:
        """Whether every token is within the budget."""
        return length <= self.policy.budget

    def choose(self, logits: Tensor, lengths: Tensor, first: Tensor | None) -> None:
        """Choose from raw logits [B, H, S] for the layers that follow, in this step."""
        self._positions = self.policy.positions(logits, lengths, first)
        self._length = logits.shape[2]

    def ranking(self, length: int, begin: int) -> Ranking:
        """What ranks the tokens of one sequence, `begin` its first."""
        sinks, newest, ranked = self.policy.shares()
        return Ranking(ranked, begin + sinks, length - newest)

    def choose_ranked(self, rankings: list[Ranking], lengths: Tensor, first: Tensor | None) -> None:
        """Choose for the layers that follow, in this step, from what was ranked of each sequence."""
        orders = [ranking.order() for ranking in rankings]
        most, size = max(order.shape[1] for order in orders), int(lengths.max())
        order = torch.stack([functional.pad(order, (0, most - order.shape[1])) for order in orders])
        held = torch.tensor([order.shape[1] for order in orders])
        valid = (torch.arange(most) < held[:, None])[:, None].expand_as(order)
        chosen = in_turn(order, valid, size, self.policy.shares()[2])
        self._positions = self.policy.with_edges(chosen, size, lengths, first)
        self._length = size

    def of(self, layer: int, length: int) -> Tensor | None:
        """int32 [B, 1, m]: what `layer` attends at this length; None: everything.

        OptionError where no layer before it chose in this step.
        """
        if layer < self.layers[0]:
            return None
        if self._length != length:
            raise OptionError(f"layer {layer}: no layer before it chose tokens in this step")
        return self._positions

    def reuses(self, layer: int, length: int) -> bool:
        """Whether `layer` attends what a layer before it chose."""
        return not self.fits(length) and layer > self.layers[0] and layer not in self.layers


class LessIsMoreLayer(PagedLayer):
    """Chooses tokens for the layers that follow, or attends those that were chosen."""

    def __init__(self, index: int, page: int, check: Callable[[], None], choice: SharedChoice) -> None:
        super().__init__(index, page, check)
        self.choice = choice

    def decode(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Everything while it fits the budget, and where tokens are chosen."""
        view, choice = self.view, self.choice
        if choice.fits(max(view.lengths)):
            return super().decode(q, first, scale)
        pool, (table, lengths) = view.pool, view.tables()
        size = max(view.lengths)
        if self.index in choice.layers:
            choice.choose(raw_logits(q, pool.k_pages, table)[:, :, :size], lengths, first)
            return super().decode(q, first, scale)
        positions = choice.of(self.index, size)
        if positions is None:
            return super().decode(q, first, scale)
        out: Tensor
        out, _ = run(
            "token_attention", q, pool.k_pages, pool.v_pages, table, lengths, positions, first, scale
        )
        return out
