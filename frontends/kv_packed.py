"""Cache layers that keep keys and values as codes of 8 or 4 bits: `quantize-kv` in a paged cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.hadamard import transform
from tilewright.compiler.ops.packed import packed_width
from tilewright.frontends.kv_layer import PagedLayer, run
from tilewright.passes.quantize.quantize_kv import QuantizeKV
from tilewright.runtime.kv_store.pool import PagePool
from tilewright.runtime.kv_store.view import LayerView


class PackedLayer(PagedLayer):
    """Rounds rows as they are stored; every attention, the prompt's too, reads the codes.

    With `rotate` the pages hold rotated rows: queries are rotated, and results are rotated back.
    """

    def __init__(self, index: int, page: int, check: Callable[[], None], policy: QuantizeKV) -> None:
        super().__init__(index, page, check)
        self.policy = policy

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pool for keys [B, Hkv, T, D] and values [B, Hkv, T, E]; OptionError for sizes that the
        policy does not divide."""
        batch, heads, _, size = key_states.shape
        value = value_states.shape[3]
        pool = PagePool(
            heads,
            size,
            value,
            page=self.page,
            dtype=torch.float32 if self.policy.rotate else key_states.dtype,
            device=key_states.device,
            packed=(self._width(size), self._width(value)),
        )
        self._view = LayerView(pool, batch, self._write)
        self.is_initialized = True

    def _width(self, size: int) -> int:
        policy = self.policy
        if policy.rotate and (size < 2 or size & (size - 1)):
            raise OptionError(f"quantize-kv: heads have {size} channels; rotate needs a power of two")
        try:
            return packed_width(size, policy.bits, policy.group)
        except ValueError as error:
            raise OptionError(f"quantize-kv: {error}") from None

    def _write(
        self, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, k: Tensor, v: Tensor, *_: None
    ) -> None:
        run("packed_append", k_pages, v_pages, table, starts, k, v, self.policy.bits, self.policy.group)

    def store(self, key_states: Tensor, value_states: Tensor) -> None:
        """Round the new rows and add them."""
        self.view.append(self._turned(key_states, False), self._turned(value_states, False))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention [B, H, T, E] of the T newest tokens over what is stored of them and of those before."""
        self._fresh = False
        return self.dense(q, first, scale)

    def dense(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention over everything held."""
        pool, (table, lengths) = self.view.pool, self.view.tables()
        bits, group = self.policy.bits, self.policy.group
        rows = self._turned(q, False)
        out: Tensor
        out, _ = run(
            "packed_attention", rows, pool.k_pages, pool.v_pages, table, lengths, bits, group, first, scale
        )
        return self._turned(out, True).to(q.dtype)

    def _turned(self, x: Tensor, back: bool) -> Tensor:
        """x [..., D] behind the Hadamard transform in float32, or back; as it is without `rotate`."""
        return transform(x.float(), x.shape[-1], None, None, back) if self.policy.rotate else x
