"""Cache layers that follow a policy pass, and which pass they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tilewright.compiler import Pipeline
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_layer import PagedLayer, run
from tilewright.passes.memory.quest_kv import QuestKV
from tilewright.passes.memory.streaming_kv import StreamingKV


class StreamingLayer(PagedLayer):
    """Attends the first tokens and the newest; pages in between are given up."""

    is_croppable = False

    def __init__(self, index: int, page: int, check: Callable[[], None], policy: StreamingKV) -> None:
        super().__init__(index, page, check)
        self.policy = policy

    def decode(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Everything while it fits, then what the policy keeps."""
        view, policy = self.view, self.policy
        if max(view.lengths) <= policy.sinks + policy.window:
            return super().decode(q, first, scale)
        pool, (table, lengths) = view.pool, view.tables()
        positions = policy.positions(lengths, first, table.shape[1] * self.page)
        out: Tensor
        out, _ = run(
            "token_attention", q, pool.k_pages, pool.v_pages, table, lengths, positions, first, scale
        )
        starts = [0] * view.batch if first is None else first.tolist()
        for row, (length, start) in enumerate(zip(view.lengths, starts, strict=True)):
            view.drop(row, policy.given_up(length, start, self.page))
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Refused once tokens were given up."""
        if tokens_to_remove and self.get_seq_length() > self.policy.sinks + self.policy.window:
            raise OptionError(f"layer {self.index}: tokens that {self.policy.name} gave up cannot come back")
        super().crop(tokens_to_remove)


class QuestLayer(PagedLayer):
    """Attends the pages with the greatest bounds."""

    extremes = True

    def __init__(self, index: int, page: int, check: Callable[[], None], policy: QuestKV) -> None:
        super().__init__(index, page, check)
        self.policy = policy

    def decode(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Everything while it fits the budget, then the pages that the policy picks."""
        view = self.view
        if max(view.lengths) <= self.policy.budget:
            return super().decode(q, first, scale)
        pool, (table, lengths) = view.pool, view.tables()
        bounds = run("page_bounds", q, pool.low, pool.high, table, lengths, self.page, first, "max")
        picked = self.policy.picked(bounds, lengths, first)
        out: Tensor
        out, _ = run("paged_attention", q, pool.k_pages, pool.v_pages, table, lengths, first, picked, scale)
        return out


_LAYERS: dict[type, Callable[..., PagedLayer]] = {StreamingKV: StreamingLayer, QuestKV: QuestLayer}


def layers_for(pipeline: Any, count: int, page: int | None, check: Callable[[], None]) -> list[PagedLayer]:
    """`count` cache layers under a pipeline of no pass or one; page: None for the policy's own, else 16.

    OptionError for other passes, and for a page that is not the policy's.
    """
    passes = Pipeline.parse(pipeline).passes
    if not passes:
        return [PagedLayer(index, page or 16, check) for index in range(count)]
    if len(passes) > 1 or type(passes[0]) not in _LAYERS:
        names = ", ".join(sorted(cls.name for cls in _LAYERS))  # type: ignore[attr-defined]
        raise OptionError(
            f"pipeline = {', '.join(p.name for p in passes)}: a cache follows one pass at most, of {names}"
        )
    policy: Any = passes[0]
    own = getattr(policy, "page", page or 16)
    if page not in (None, own):
        raise OptionError(f"page = {page}: {policy.name} has page={own}", remedy="leave page out")
    return [
        PagedLayer(index, own, check)
        if index < policy.dense_layers
        else _LAYERS[type(policy)](index, own, check, policy)
        for index in range(count)
    ]
