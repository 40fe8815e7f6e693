"""The cache layer of shadow-kv: a prompt is factored once; each new token chooses chunks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.passes.memory._paged_sites import first_of
from tilewright.passes.memory._shadow import Shadow, shifted
from tilewright.passes.memory.shadow_kv import ShadowKV


def check_rotation(layers: list[PagedLayer], config: Any) -> None:
    """OptionError where shadow-kv would take back another rotary embedding than the model's."""
    policy = next((layer.policy for layer in layers if isinstance(layer, ShadowLayer)), None)
    if policy is None:
        return
    found = getattr(config, "rope_parameters", None) or {}
    theta, kind = found.get("rope_theta"), found.get("rope_type", "default")
    if kind != "default" or found.get("partial_rotary_factor", 1.0) != 1.0 or theta is None:
        raise OptionError(
            f"shadow-kv: expected a plain rotary embedding of whole heads; the model has {found}"
        )
    if theta != policy.theta:
        raise OptionError(f"shadow-kv: theta = {policy.theta:g}: expected {theta:g}, that of the model")


class ShadowLayer(PagedLayer):
    """Attends the last and outlier chunks of a prompt, those that fit the query, and what was generated."""

    def __init__(self, index: int, page: int, check: Callable[[], None], policy: ShadowKV) -> None:
        super().__init__(index, page, check)
        self.policy = policy
        self._shadow: Shadow | None = None
        self._prompt = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """As every layer; tokens that come together are a prompt, and so is all before them."""
        if q.shape[2] > 1:
            self._shadow = None
        return super().attend(q, k, v, first, scale)

    def decode(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Everything while it fits the budget, else what the policy keeps."""
        pool, (table, lengths) = self.view.pool, self.view.tables()
        begin = first_of(lengths, first)
        if self._shadow is None:
            self._prompt = self.get_seq_length() - 1
            # Padding may be all that there was.
            prompt = (lengths - 1 - begin).clamp(min=0)
            self._shadow = self.policy.shadow(shifted(pool.k_pages, table, begin), prompt)
        if bool(self.policy.fits(self._shadow).all()):
            return super().decode(q, first, scale)
        k, v = (shifted(pages, table, begin) for pages in (pool.k_pages, pool.v_pages))
        out: Tensor
        out, _ = self.policy.attention(q, k, v, self._shadow, lengths - begin, scale)
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Take back tokens; what is left of a prompt is factored anew."""
        super().crop(tokens_to_remove)
        if self.get_seq_length() < self._prompt:
            self._shadow = None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Sequence i goes on as sequence rows[i] was."""
        super().select_rows(rows)
        if self._shadow is not None:
            at = torch.tensor(list(rows), device=self._shadow.chunks.device)
            self._shadow = Shadow(*(x[at] for x in self._shadow))

    def reset(self) -> None:
        """Forget everything and give the pages back."""
        super().reset()
        self._shadow, self._prompt = None, 0
