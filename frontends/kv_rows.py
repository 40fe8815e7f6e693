"""A Hugging Face model over a static cache whose rows may be of different lengths and may take tokens back.

A slot of the cache that a row does not need (a rejected draft, padding) is a hole: the row's mask leaves it
out and its positions go on without it. A batch thus keeps one layout while its rows accept different counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.generation import CACHE_STEP


class KVRows:
    """Which slots of one static cache each row of a batch uses."""

    def __init__(self, config: Any, batch: int, room: int) -> None:
        """room: slots per row that are needed at most, holes included; rounded up to `CACHE_STEP`."""
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        self.capacity = -(-room // CACHE_STEP) * CACHE_STEP
        self.cache: Any = StaticCache(config=config, max_cache_len=self.capacity)
        for number, layer in enumerate(self.cache.layers):
            if type(layer) is not StaticLayer:
                raise OptionError(
                    f"layer {number} keeps its state in a {type(layer).__name__}, which cannot take back "
                    "rejected tokens",
                    remedy="speculation needs models whose layers all attend to everything before",
                )
        self.batch = batch
        self.used = torch.zeros(batch, self.capacity, dtype=torch.bool)
        self.clear()

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
        """Slots in use by any row; new tokens go behind them."""
        self.held = [0] * self.batch
        """Tokens of each row."""
        self.used.zero_()

    def reserve(self, slots: int) -> None:
        """Make sure that `slots` more fit, by closing the holes where they would not.

        OptionError when the rows are too long even so.
        """
        if self.length + slots > self.capacity:
            self._close_holes()
        if self.length + slots > self.capacity:
            raise OptionError(f"{self.length} + {slots} tokens do not fit a cache of {self.capacity}")

    def take_back(self, start: int, counts: Sequence[int]) -> None:
        """Of the slots from `start` on, row b keeps the first counts[b]."""
        before = self.used[:, start : self.length].sum(1).tolist()
        self.used[:, start : self.length] = False
        for row, count in enumerate(counts):
            self.used[row, start : start + count] = True
            self.held[row] += count - before[row]
        self.length = start + max(counts, default=0)

    def keep(self, start: int, chosen: Sequence[Sequence[int]]) -> None:
        """Of row b's slots from `start` on, only start + chosen[b][i] stay, moved to start + i."""
        self.take_back(start, [len(c) for c in chosen])
        if all(list(c) == list(range(len(c))) for c in chosen):
            return
        order = torch.zeros(self.batch, self.length - start, dtype=torch.long)
        for row, places in enumerate(chosen):
            order[row, : len(places)] = torch.tensor(places, dtype=torch.long)
        self._move(start, start + order)

    def _move(self, start: int, order: Tensor) -> None:
        """Slot start + i of row b becomes what slot order[b, i] is; order: int64 [B, N]."""
        stop = start + order.shape[1]
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values):
                places = order[:, None, :, None].to(tensor.device)
                tensor[:, :, start:stop] = tensor.gather(
                    2, places.expand(-1, tensor.shape[1], -1, tensor.shape[3])
                )

    def _close_holes(self) -> None:
        longest = max(self.held)
        self._move(0, torch.argsort(~self.used, dim=1, stable=True)[:, :longest])
        self.used = torch.arange(self.capacity)[None] < torch.tensor(self.held)[:, None]
        self.length = longest


class RowModel:
    """A model that is fed tokens row by row."""

    def __init__(
        self,
        whole: Callable[..., Any],
        step: Callable[..., Any],
        kv: KVRows,
        device: torch.device,
        cache: str,
    ) -> None:
        """whole: the model as it is, for prompts of any length. step: the same or a compiled one, for few
        tokens at a time. cache: what both call their cache."""
        self._given: dict[str, Any] = {cache: kv.cache, "use_cache": True}
        self.kv = kv
        self._whole, self._step, self._device = whole, step, device

    def feed(self, rows: Sequence[Sequence[int]], width: int = 0, *, prompt: bool = False) -> Tensor:
        """Logits [B, W, V]; row b's answer to its token i is at [b, i], what lies behind is padding.

        width: W at least, so that few shapes occur. prompt: run the model as it is.
        """
        kv = self.kv
        width = max(width, max(len(row) for row in rows))
        if kv.length + width > kv.capacity:
            raise OptionError(f"{kv.length} + {width} tokens do not fit a cache of {kv.capacity}")
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        positions = torch.tensor(kv.held)[:, None] + torch.arange(width)
        given = dict(self._given)
        if kv.batch > 1:  # padding may see itself: it comes behind everything that counts
            mask = kv.used.clone()
            mask[:, kv.length : kv.length + width] = True
            given["attention_mask"] = mask.long().to(self._device)
        for layer in kv.cache.layers:
            layer.cumulative_length.fill_(kv.length)
        with torch.no_grad():
            logits: Tensor = (self._whole if prompt else self._step)(
                input_ids=tokens.to(self._device),
                position_ids=positions.to(self._device),
                **given,
            ).logits
        start = kv.length
        kv.length += width
        kv.used[:, start : kv.length] = True
        kv.held = [n + width for n in kv.held]
        kv.take_back(start, [len(row) for row in rows])
        return logits

    def catch_up(self, rows: Sequence[Sequence[int]], few: int) -> Tensor:
        """As `feed`, of whatever the cache has not seen yet. Compiled code runs it where it is 1, 2 or up to
        `few` tokens wide, and knows only these three shapes."""
        widest = max(len(row) for row in rows)
        compiled = self._step is not self._whole and widest <= few
        return self.feed(rows, few if compiled and widest > 2 else 0, prompt=not compiled)

    def feed_seeing(
        self, tokens: Sequence[Sequence[int]], places: Sequence[Sequence[int]], seen: Tensor
    ) -> Tensor:
        """Logits [B, W, V] of W tokens of every row, put behind everything in the cache.

        places: their positions in the text, [B][W]. seen: bool [B, W, capacity], the slots that each may
        attend to, besides its own.
        """
        kv = self.kv
        start, width = kv.length, len(tokens[0])
        if start + width > kv.capacity:
            raise OptionError(f"{start} + {width} tokens do not fit a cache of {kv.capacity}")
        seen = seen.clone()
        seen[:, torch.arange(width), start + torch.arange(width)] = True
        dtype = kv.cache.layers[0].keys.dtype
        mask = torch.zeros(kv.batch, 1, width, kv.capacity, dtype=dtype)
        mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)
        for layer in kv.cache.layers:
            layer.cumulative_length.fill_(start)
        with torch.no_grad():
            logits: Tensor = self._step(
                input_ids=torch.tensor(tokens, device=self._device),
                position_ids=torch.tensor(places, device=self._device),
                attention_mask=mask.to(self._device),
                **self._given,
            ).logits
        kv.length += width
        kv.used[:, start : kv.length] = True
        kv.held = [n + width for n in kv.held]
        return logits
