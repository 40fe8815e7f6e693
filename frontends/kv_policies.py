"""Cache layers that follow a policy pass, and which pass they belong to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler import Pipeline
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.quantizers import IDENTITY_BITS
from tilewright.frontends.kv_choice import LessIsMoreLayer, SharedChoice
from tilewright.frontends.kv_evicting import HeavyHitterLayer, KeyformerLayer, SnapLayer
from tilewright.frontends.kv_layer import PagedLayer, run
from tilewright.frontends.kv_offload import OffloadedLayer, Placement
from tilewright.frontends.kv_packed import PackedLayer
from tilewright.frontends.kv_relay import RelayLayer
from tilewright.frontends.kv_shadow import OffloadedShadowLayer, ShadowLayer
from tilewright.frontends.kv_spec_cache import SpecCacheLayer, SpecTier
from tilewright.passes.memory.heavy_hitter_kv import HeavyHitterKV
from tilewright.passes.memory.keyformer_kv import KeyformerKV
from tilewright.passes.memory.lessismore_kv import LessIsMoreKV
from tilewright.passes.memory.offload_kv import OffloadKV
from tilewright.passes.memory.quest_kv import QuestKV
from tilewright.passes.memory.relay_attention import RelayAttention
from tilewright.passes.memory.shadow_kv import ShadowKV
from tilewright.passes.memory.snap_kv import SnapKV
from tilewright.passes.memory.spec_cache_kv import SpecCacheKV
from tilewright.passes.memory.streaming_kv import StreamingKV
from tilewright.passes.quantize.quantize_kv import QuantizeKV


class StreamingLayer(PagedLayer):
    """Attends the first tokens and the newest; pages in between are given up."""

    is_croppable = False

    def __init__(self, index: int, page: int, check: Callable[[], None], policy: StreamingKV) -> None:
        super().__init__(index, page, check)
        self.policy = policy
        self._chose = False
        """Whether a token has attended less than everything."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """A prompt, in chunks too, attends everything; tokens that come together behind one for which the
        policy chose attend as if they came one by one."""
        tokens = q.shape[2]
        if tokens == 1 or not self._chose:
            return super().attend(q, k, v, first, scale)
        self._fresh = False
        each = [self._chosen(q[:, :, i : i + 1], tokens - 1 - i, first, scale) for i in range(tokens)]
        self._give_up(first)
        return torch.cat(each, 2)

    def decode(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Everything while it fits, then what the policy keeps."""
        if max(self.view.lengths) <= self.policy.sinks + self.policy.window:
            return super().decode(q, first, scale)
        self._chose = True
        out = self._chosen(q, 0, first, scale)
        self._give_up(first)
        return out

    def _chosen(self, q: Tensor, later: int, first: Tensor | None, scale: float) -> Tensor:
        """Attention [B, H, 1, E] of the token that is the newest but `later`."""
        pool, (table, lengths) = self.view.pool, self.view.tables()
        pages, calls = (pool.k_pages, pool.v_pages, table), ("token_attention", "rotate_rows")
        out: Tensor
        out, _ = self.policy.attend(
            q, *pages, lengths - later, first, scale, *[partial(run, op) for op in calls]
        )
        return out

    def _give_up(self, first: Tensor | None) -> None:
        view, policy = self.view, self.policy
        starts = [0] * view.batch if first is None else first.tolist()
        for row, (length, start) in enumerate(zip(view.lengths, starts, strict=True)):
            view.drop(row, policy.given_up(length, start, self.page))

    def reset(self) -> None:
        """Forget everything and give the pages back."""
        super().reset()
        self._chose = False

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
        planes, count = (q, pool.low, pool.high, table, lengths, self.page), self.policy.budget // self.page
        picked = run("pick_pages", *planes, count, first, self.policy.sink_page)
        out: Tensor
        out, _ = run("paged_attention", q, pool.k_pages, pool.v_pages, table, lengths, first, picked, scale)
        return out


_LAYERS: dict[type, Callable[..., PagedLayer]] = {
    StreamingKV: StreamingLayer,
    QuestKV: QuestLayer,
    LessIsMoreKV: LessIsMoreLayer,
    HeavyHitterKV: HeavyHitterLayer,
    KeyformerKV: KeyformerLayer,
    SnapKV: SnapLayer,
    ShadowKV: ShadowLayer,
    RelayAttention: RelayLayer,
    QuantizeKV: PackedLayer,
    SpecCacheKV: SpecCacheLayer,
}


def policies_of(pipeline: Any) -> tuple[Any, OffloadKV | None]:
    """(the pass that decides what is kept or attended, the one that places it) of a pipeline; None: absent.

    OptionError for other passes, for two of a kind, and for a pair that does not go together.
    """
    passes = Pipeline.parse(pipeline).passes
    placing = [p for p in passes if isinstance(p, OffloadKV)]
    choosing = [p for p in passes if type(p) in _LAYERS]
    if len(placing) > 1 or len(choosing) > 1 or len(placing) + len(choosing) < len(passes):
        names = ", ".join(sorted(cls.name for cls in _LAYERS))  # type: ignore[attr-defined]
        raise OptionError(
            f"pipeline = {', '.join(p.name for p in passes)}: a cache follows one pass at most, of {names}, "
            "and offload-kv"
        )
    if placing and choosing and isinstance(choosing[0], QuantizeKV | SpecCacheKV):
        raise OptionError(
            f"pipeline = {', '.join(p.name for p in passes)}: offload-kv moves rows as the model makes them, "
            "not codes",
            remedy="one of the two",
        )
    if placing and choosing and not isinstance(choosing[0], LessIsMoreKV | ShadowKV):
        raise OptionError(
            f"pipeline = {', '.join(p.name for p in passes)}: {choosing[0].name} decides at every layer, "
            "too late to read from a slow tier",
            remedy="offload-kv alone, with lessismore-kv or with shadow-kv",
        )
    return (choosing[0] if choosing else None), (placing[0] if placing else None)


def layers_for(
    pipeline: Any, count: int, page: int | None, check: Callable[[], None]
) -> tuple[list[PagedLayer], Placement | SpecTier | None]:
    """(`count` cache layers, the tiers behind them if any); page: None for the policy's own, else 16.

    OptionError for a page that is not the policy's, and as `policies_of`.
    """
    policy, placing = policies_of(pipeline)
    own = getattr(policy, "page", page or 16)
    if page not in (None, own):
        raise OptionError(f"page = {page}: {policy.name} has page={own}", remedy="leave page out")
    choice = SharedChoice(policy, count) if isinstance(policy, LessIsMoreKV) else None
    if placing is not None:
        placement = Placement(placing)
        exact = policy.dense_layers if isinstance(policy, ShadowKV) else count
        return [
            OffloadedLayer(i, own, check, placement, choice)
            if i < exact
            else OffloadedShadowLayer(i, own, check, placement, policy)
            for i in range(count)
        ], placement
    if policy is None or getattr(policy, "bits", 0) == IDENTITY_BITS:
        return [PagedLayer(index, own, check) for index in range(count)], None
    if isinstance(policy, SpecCacheKV):
        tier = SpecTier(policy)
        return [SpecCacheLayer(index, own, check, tier) for index in range(count)], tier
    if choice is not None:
        return [LessIsMoreLayer(index, own, check, choice) for index in range(count)], None
    return [
        PagedLayer(index, own, check)
        if index < getattr(policy, "dense_layers", 0)
        else _LAYERS[type(policy)](index, own, check, policy)
        for index in range(count)
    ], None
