"""The cache layers of shadow-kv: a prompt is factored once; each new token chooses chunks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_extents import ExtentLayer, merged
from tilewright.frontends.kv_layer import PagedLayer, run
from tilewright.frontends.kv_offload import OffloadedLayer, Placement
from tilewright.passes.memory import _shadow as shadows
from tilewright.passes.memory._paged_sites import first_of
from tilewright.passes.memory._shadow import Shadow, shifted
from tilewright.passes.memory.shadow_kv import ShadowKV
from tilewright.runtime.kv_store.tier_state import ExtentKey


def check_rotation(layers: list[PagedLayer], config: Any) -> None:
    """OptionError where a policy would turn keys or queries by another rotary embedding than the model's."""
    policies = [getattr(layer, "policy", None) for layer in layers]
    policy: Any = next((p for p in policies if getattr(p, "theta", 0)), None)
    if policy is None:
        return
    found = getattr(config, "rope_parameters", None) or {}
    theta, kind = found.get("rope_theta"), found.get("rope_type", "default")
    if kind != "default" or found.get("partial_rotary_factor", 1.0) != 1.0 or theta is None:
        raise OptionError(
            f"{policy.name}: expected a plain rotary embedding of whole heads; the model has {found}"
        )
    if theta != policy.theta:
        raise OptionError(f"{policy.name}: theta = {policy.theta:g}: expected {theta:g}, that of the model")


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
            keys = shifted(pool.k_pages, table, begin)
            self._shadow = self.policy.shadow(keys, prompt, partial(run, "rotate_rows"))
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


BLOCK = 256
"""Tokens of a prompt that are factored at a time: a multiple of every size of a chunk."""


class Outline(NamedTuple):
    """What memory holds of one prompt whose keys and values lie in tiers; C of its chunks may be chosen."""

    codes: Tensor
    """[C c, r]: keys of all heads before their rotary embedding, by the directions of `basis`."""
    basis: Tensor
    """[Hkv D, r]."""
    pace: Tensor
    """float32 [D / 2]: the radians of a position."""
    landmarks: Tensor
    """[1, Hkv, C, D]: the mean key of each chunk."""
    outliers: Tensor
    """bool [1, Hkv, C]: chunks that stay exact."""
    keys: Tensor
    """[Hkv, n c, D]: those of the outliers."""
    values: Tensor
    """[Hkv, n c, E]."""

    @property
    def memory_bytes(self) -> int:
        """Of the memory that stands behind all this."""
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self}.values())


class OffloadedShadowLayer(OffloadedLayer):
    """Keys and values in tiers, in memory what chooses chunks and rebuilds keys: tokens' values are read."""

    def __init__(
        self, index: int, page: int, check: Callable[[], None], placement: Placement, policy: ShadowKV
    ) -> None:
        super().__init__(index, page, check, placement, None)
        self.policy = policy
        self._outlines: list[Outline | None] = []
        self._prompt = 0

    @property
    def beside_bytes(self) -> int:
        """Bytes of what stands for the prompts."""
        return sum(outline.memory_bytes for outline in self._outlines if outline is not None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """As every layer; tokens that come together are a prompt, and so is all before them."""
        if q.shape[2] > 1:
            self._outlines = []
        return super().attend(q, k, v, first, scale)

    def decode(self, q: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Of each sequence everything while it fits the budget, else what the policy keeps."""
        rows = self.rows.rows
        begins = [0] * len(rows) if first is None else first.tolist()
        if not self._outlines:
            self._prompt = self.get_seq_length() - 1
            self._outlines = [self._outline(row, begin) for row, begin in zip(rows, begins, strict=True)]
        outs = []
        for i, (row, begin, outline) in enumerate(zip(rows, begins, self._outlines, strict=True)):
            mine = q[i : i + 1]
            then = self._coming(i)
            if outline is None:
                padding = None if first is None else first[i : i + 1]
                outs.append(row.attend(mine, padding, scale, then=then)[0])
            else:
                outs.append(self._over(mine, row, begin, outline, scale, then))
        return torch.cat(outs)

    def _outline(self, row: ExtentLayer, begin: int) -> Outline | None:
        """Of the prompt of a sequence whose tokens start at `begin`; None where all of it fits the budget."""
        policy, chunk = self.policy, self.policy.chunk
        prompt = max(self._prompt - begin, 0)
        count = max(prompt // chunk - policy.local_chunks, 0)
        if count <= policy.budget // chunk:
            return None
        heads = torch.arange(self.rows.layout.heads)[:, None]
        blocks = [torch.arange(at, min(at + BLOCK, prompt)) for at in range(0, prompt, BLOCK)]
        gram, means, like = torch.zeros(()), [], []
        pace, turn = shadows.pace_of(policy.theta, self.rows.layout.size), partial(run, "rotate_rows")
        for at in blocks:
            keys = row.gather(0, begin + at.expand(len(heads), -1))
            flat = shadows.unrotated(keys[None], pace, at, turn)[0]
            gram = gram + flat.mT @ flat
            whole = keys[:, : len(at) // chunk * chunk]
            means.append(whole.unflatten(1, (-1, chunk)).mean(2))
            like.append(shadows.likeness(whole, means[-1]))
        basis = shadows.directions(gram, policy.rank).contiguous()
        landmarks = torch.cat(means, 1)[None, :, :count].contiguous()
        far = torch.cat(like, 1)[None, :, :count]
        odd = shadows.outliers(far, torch.tensor([count]), policy.outlier_chunks)
        codes = torch.empty(count * chunk, basis.shape[1], dtype=self.rows.layout.dtype)
        for at in blocks:
            at = at[at < len(codes)]
            keys = row.gather(0, begin + at.expand(len(heads), -1))
            codes[at] = (shadows.unrotated(keys[None], pace, at, turn)[0] @ basis).to(codes.dtype)
        exact = begin + self._places(odd)
        return Outline(codes, basis, pace, landmarks, odd, row.gather(0, exact), row.gather(1, exact))

    def _places(self, chunks: Tensor) -> Tensor:
        """int64 [Hkv, m]: the tokens of chunks, bool [1, Hkv, C] with as many for every head."""
        found = chunks[0].nonzero()[:, 1]
        found = found.view(chunks.shape[1], len(found) // chunks.shape[1])
        return (found[..., None] * self.policy.chunk + torch.arange(self.policy.chunk)).flatten(1)

    def _over(
        self,
        q: Tensor,
        row: ExtentLayer,
        begin: int,
        outline: Outline,
        scale: float,
        then: Sequence[ExtentKey],
    ) -> Tensor:
        """Attention [1, H, 1, E] of one query: exact chunks, and chosen ones by keys of low rank."""
        policy, heads = self.policy, outline.landmarks.shape[1]
        wanted = policy.budget // policy.chunk
        picked = shadows.chosen(q, outline.landmarks, ~outline.outliers, wanted, scale)
        at = self._places(picked)
        near = outline.codes[at].to(outline.basis.dtype) @ outline.basis.unflatten(0, (heads, -1)).mT
        near = run("rotate_rows", near[None], at[None], outline.pace)[0].to(q.dtype)
        k = torch.cat([outline.keys, near], 1)[None]
        v = torch.cat([outline.values, row.gather(1, begin + at)], 1)[None]
        chosen = shadows.attended(q, k, v, torch.ones(1, heads, k.shape[2], dtype=torch.bool), scale)
        tail = torch.arange(begin + len(outline.codes), row.length, dtype=torch.int32)
        out, _ = merged([chosen, row.attend(q, None, scale, row.pick(tail), then)])
        return out.to(q.dtype)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back tokens; what is left of a prompt is factored anew."""
        super().crop(tokens_to_remove)
        if self.get_seq_length() < self._prompt:
            self._outlines = []

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._outlines, self._prompt = [], 0
