"""A cache layer whose sequences share pages: what they share is attended once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_layer import PagedLayer, run, write
from tilewright.passes.memory.relay_attention import RelayAttention, attend_together
from tilewright.runtime.kv_store.pool import PagePool
from tilewright.runtime.kv_store.sharing import SharedRun, shared_runs
from tilewright.runtime.kv_store.view import LayerView


@dataclass(frozen=True)
class _Parts:
    """How the pages at places below `stop`, full and no longer written, are attended."""

    stop: int
    runs: tuple[tuple[SharedRun, Tensor], ...]
    """Shared pages with their table, int32 [1, m]."""
    rest: Tensor | None
    """int32 [B, stop], the pages in no run, -1 elsewhere; None where there are none."""


class RelayLayer(PagedLayer):
    """Sequences that share pages attend to them together; may begin with pages that others hold."""

    def __init__(
        self, index: int, page: int, check: Callable[[], None], policy: RelayAttention | None
    ) -> None:
        """policy None: every sequence attends for itself."""
        super().__init__(index, page, check)
        self.policy = policy
        self._parts: tuple[int, _Parts | None] | None = None

    def attach(self, pool: PagePool, pages: Sequence[Sequence[int]]) -> None:
        """Begin with full pages of `pool` for each sequence, the tokens at their first positions."""
        self._view = LayerView(pool, len(pages), write)
        self._view.adopt(pages)
        if any(pages):
            self.prefix = tuple(len(row) * self.page for row in pages)
        self.is_initialized, self._parts = True, None

    def dense(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention over everything held, what is shared by few reads."""
        if first is None and len(set(self.prefix)) > 1:
            raise OptionError(
                f"the cache began with {list(self.prefix)} tokens; attention_mask does not tell of the gaps",
                remedy="pass the attention_mask that came with the cache",
            )
        parts = self._planned(first, q.shape[2])
        if parts is None:
            return super().dense(q, first, scale)
        pool, (table, lengths) = self.view.pool, self.view.tables()
        pages, begin = (pool.k_pages, pool.v_pages), parts.stop * self.page
        out: Tensor
        lse: Tensor
        own = torch.full_like(lengths, begin) if first is None else first.clamp(min=begin)
        out, lse = run("paged_attention", q, *pages, table, lengths, own, None, scale)
        out = out.to(lse.dtype)
        if parts.rest is not None:
            behind = torch.full_like(lengths, begin + q.shape[2])
            padding = None if self.prefix else first
            part, total = run("paged_attention", q, *pages, parts.rest, behind, padding, None, scale)
            out, lse = ops.merge_attention(out, lse, part.to(lse.dtype), total)
        for shared, row in parts.runs:
            some = slice(None) if len(shared.rows) == len(q) else list(shared.rows)
            part, total = attend_together(q[some], *pages, row, scale, partial(run, "paged_attention"))
            out[some], lse[some] = ops.merge_attention(out[some], lse[some], part.to(lse.dtype), total)
        return out.to(q.dtype)

    def _planned(self, first: Tensor | None, tokens: int) -> _Parts | None:
        """The parts for `tokens` new ones; None where one attention does. Found once per way of sharing."""
        begin = 0 if first is None else int(first.max())
        if self._parts is None or self._parts[0] != begin:
            self._parts = begin, self._plan(begin, tokens)
        return self._parts[1]

    def _plan(self, begin: int, tokens: int) -> _Parts | None:
        view, policy, page = self.view, self.policy, self.page
        pages = [view.pages(row) for row in range(view.batch)]
        start = -(-begin // page)
        stop = max(start, (min(view.lengths) - tokens) // page)
        if self.prefix:  # what follows is behind padding, which a shared page could hold
            start, stop = 0, max(self.prefix) // page
        runs: list[SharedRun] = []
        if policy is not None:
            runs = shared_runs(pages, start, stop, policy.min_batch, -(-policy.min_prefix // page))
        if not runs and not (self.prefix and begin):
            return None
        if not self.prefix:
            stop = max(r.stop for r in runs)
        rest = torch.tensor([row[:stop] for row in pages], dtype=torch.int32)
        tables, device = [], view.pool.k_pages.device
        for r in runs:
            tables.append(rest[r.rows[0], r.start : r.stop][None].clone().to(device))
            rest[list(r.rows), r.start : r.stop] = -1
        left = rest.to(device) if bool((rest >= 0).any()) else None
        return _Parts(stop, tuple(zip(runs, tables, strict=True)), left)

    def reset(self) -> None:
        """Forget everything and give the pages back."""
        super().reset()
        self.prefix, self._parts = (), None

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back; OptionError for a part of what the cache began with where sequences differ."""
        left = self.get_seq_length() + tokens_to_remove
        if self.prefix and left < max(self.prefix):
            if len(set(self.prefix)) > 1:
                raise OptionError(
                    f"crop({tokens_to_remove}): the cache began with {list(self.prefix)} tokens, of which a "
                    "part cannot be taken back"
                )
            self.prefix = ()
        super().crop(tokens_to_remove)
        self._parts = None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Sequence i goes on as sequence rows[i] was; pages are shared until written."""
        super().select_rows(rows)
        if self.prefix:
            self.prefix = tuple(self.prefix[row] for row in rows)
        self._parts = None
