"""One layer of the paged cache: what a Hugging Face model sees of it, and how its attention is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from tilewright.compiler.diagnostics import OptionError
from tilewright.kernels.paged.call import callable_for
from tilewright.runtime.kv_store.pool import PagePool
from tilewright.runtime.kv_store.view import LayerView


def run(op: str, *args: Any) -> Any:
    """A paged op by its fastest callable."""
    return callable_for(op, args)(*args)


def write(*args: Any) -> None:
    """Append to a pool."""
    run("paged_append", *args)


NOT_HANDED = "layer {}: the model did not hand the cache's keys to its attention"


def check_inference(key_states: Tensor) -> None:
    """OptionError for keys that want a gradient."""
    if torch.is_grad_enabled() and key_states.requires_grad:
        raise OptionError("the paged cache is for inference", remedy="call under torch.no_grad()")


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer in pages; attention of one query costs what is held, not what could be.

    `update` stores new rows and returns them; the attention function then calls `attend`. A policy overrides
    `decode`.
    """

    is_sliding = False
    supports_early_init = False
    is_croppable = True
    extremes = False
    """Whether the pool keeps the least and greatest key of every page."""
    prefix: tuple[int, ...] = ()
    """Of each sequence, the tokens that the cache began with; empty where it began with none."""

    def __init__(self, index: int, page: int, check: Callable[[], None]) -> None:
        """check: raises where the model would not call our attention."""
        super().__init__()
        self.index, self.page = index, page
        self._check = check
        self._view: LayerView | None = None
        self._fresh = False
        """Rows were stored whose attention has not been computed."""

    @property
    def view(self) -> LayerView:
        """The sequences of this layer; OptionError before anything was stored."""
        if self._view is None:
            raise OptionError(f"layer {self.index} of the cache holds nothing yet")
        return self._view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pool for keys [B, Hkv, T, D] and values [B, Hkv, T, E]."""
        batch, heads, _, size = key_states.shape
        pool = PagePool(
            heads,
            size,
            value_states.shape[3],
            page=self.page,
            dtype=key_states.dtype,
            device=key_states.device,
            extremes=self.extremes,
        )
        self._view = LayerView(pool, batch, write)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new rows; returns them, marked as ours for the attention function."""
        self._check()
        if self._fresh:
            raise OptionError(
                NOT_HANDED.format(self.index),
                remedy="this model needs another cache",
            )
        check_inference(key_states)
        if self._view is None:
            self.lazy_initialization(key_states, value_states)
        self.store(key_states, value_states)
        self._fresh = True
        new = key_states.view_as(key_states)
        new.tilewright_layer = self  # type: ignore[attr-defined]
        return new, value_states

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        """Add the new rows."""
        self.view.append(key_states, value_states)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention [B, H, T, E] of the T newest tokens; k, v are their own rows."""
        self._fresh = False
        tokens = q.shape[2]
        if tokens == 1 and self.get_seq_length() > 1:
            return self.decode(q, first, scale)
        if first is None and max(self.view.lengths) == tokens:
            return functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        return self.dense(q, first, scale)

    def dense(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention over everything held."""
        pool, (table, lengths) = self.view.pool, self.view.tables()
        out: Tensor = run(
            "paged_attention", q, pool.k_pages, pool.v_pages, table, lengths, first, None, scale
        )[0]
        return out

    def decode(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention of one new token of every sequence."""
        return self.dense(q, first, scale)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return 0 if self._view is None else max(self._view.lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens after the next call, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything and give the pages back."""
        if self._view is not None:
            self._view.free()
        self._view, self._fresh, self.is_initialized = None, False, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -tokens_to_remove tokens, as if they had never come."""
        if tokens_to_remove > 0:
            raise OptionError(f"crop({tokens_to_remove}): expected 0 or less, the negative count of tokens")
        if tokens_to_remove and self._view is not None:
            self._view.crop([length + tokens_to_remove for length in self._view.lengths])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Sequence i goes on as sequence rows[i] was; pages are shared until written."""
        if self._view is not None:
            old, self._view = self._view, self._view.fork(rows)
            old.free()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`select_rows`, as beam search calls it."""
        self.select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """`select_rows`, as contrastive search calls it."""
        self.select_rows(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side."""
        if self._view is not None:
            self.select_rows([row for row in range(self._view.batch) for _ in range(repeats)])
