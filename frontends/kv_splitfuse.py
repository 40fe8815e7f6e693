"""Many prompts through one model in forwards of a bounded number of tokens: chunks of prompts beside decodes.

paper: arXiv:2401.08671 (DeepSpeed-FastGen, Dynamic SplitFuse). Every forward first takes one token of each
sequence that is decoding, then chunks of prompts, oldest first, until its budget is spent. Memory of a
forward and the time between two tokens of a sequence stay bounded however long the prompts are, and the
tokens are those of every prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.kv_cache import PagedCache, kv_cache
from tilewright.frontends.kv_layer import PagedLayer, run, write
from tilewright.runtime.kv_store.pool import PagePool
from tilewright.runtime.kv_store.view import LayerView


@dataclass(eq=False)
class Request:
    """A prompt and what follows it."""

    number: int
    tokens: list[int]
    """The prompt, then the tokens made."""
    prompt: int
    """Tokens of the prompt."""
    limit: int
    """Tokens to make."""
    held: int = 0
    """Tokens whose keys are stored."""
    served: int = 0
    """The step that took tokens of it last."""

    @property
    def decoding(self) -> bool:
        """Whether only its newest token is left to compute."""
        return len(self.tokens) > self.prompt


Segments = list[tuple[Request, int]]
"""Requests with the number of their next tokens that a forward takes."""


def next_batch(requests: Sequence[Request], budget: int) -> Segments:
    """What the next forward takes, at most `budget` tokens: a token of every decoding request, those that
    waited longest first, then chunks of prompts in the order of arrival."""
    decoding = sorted((r for r in requests if r.decoding), key=lambda r: (r.served, r.number))
    found: Segments = [(r, 1) for r in decoding[:budget]]
    left = budget - len(found)
    for request in sorted((r for r in requests if not r.decoding), key=lambda r: r.number):
        count = min(left, request.prompt - request.held)
        if count:
            found.append((request, count))
        left -= count
    return found


@dataclass
class _Forward:
    """What all layers need of the forward in progress."""

    segments: Segments = field(default_factory=list)

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(request, its places along the token axis) in order."""
        at = 0
        for request, count in self.segments:
            yield request.number, slice(at, at + count)
            at += count


class FusedLayer(PagedLayer):
    """Keys [1, Hkv, T, D] whose T tokens are those of several sequences, side by side."""

    is_croppable = False

    def __init__(self, index: int, page: int, check: Callable[[], None], forward: _Forward) -> None:
        super().__init__(index, page, check)
        self._forward = forward
        self._views: dict[int, LayerView] = {}
        self._pool: PagePool | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new rows, each with its sequence; returns them, marked for the attention function."""
        self._check()
        if self._pool is None:
            self._pool = PagePool(
                key_states.shape[1], key_states.shape[3], value_states.shape[3], page=self.page,
                dtype=key_states.dtype, device=key_states.device,
            )  # fmt: skip
            self.is_initialized = True
        for number, span in self._forward.spans():
            if number not in self._views:
                self._views[number] = LayerView(self._pool, 1, write)
            self._views[number].append(key_states[:, :, span], value_states[:, :, span])
        new = key_states.view_as(key_states)
        new.tilewright_layer = self  # type: ignore[attr-defined]
        return new, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
        """Attention [1, H, T, E]: each token over its own sequence; single tokens together."""
        assert self._pool is not None
        pages = (self._pool.k_pages, self._pool.v_pages)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        single: list[tuple[int, Tensor, Tensor]] = []
        for number, span in self._forward.spans():
            table, length = self._views[number].tables()
            if span.stop - span.start == 1:
                single.append((span.start, table, length))
            else:
                some = q[:, :, span]
                out[:, :, span] = run("paged_attention", some, *pages, table, length, None, None, scale)[0]
        if single:
            places = [at for at, _, _ in single]
            tables = q.new_full((len(single), max(t.shape[1] for _, t, _ in single)), -1, dtype=torch.int32)
            for row, (_, table, _) in enumerate(single):
                tables[row, : table.shape[1]] = table[0]
            lengths = torch.cat([length for _, _, length in single])
            rows = q[0, :, places].transpose(0, 1)[:, :, None]
            found = run("paged_attention", rows, *pages, tables, lengths, None, None, scale)[0]
            out[0, :, places] = found[:, :, 0].transpose(0, 1)
        return out

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return max((view.lengths[0] for view in self._views.values()), default=0)

    def over(self, number: int) -> None:
        """Give the pages of a sequence back."""
        self._views.pop(number).free()

    @property
    def pages_used(self) -> int:
        """Pages held by all sequences."""
        return 0 if self._pool is None else self._pool.used

    def reset(self) -> None:
        """Forget everything and give the pages back."""
        for number in list(self._views):
            self.over(number)
        self._pool, self.is_initialized = None, False


class SplitFuse:
    """Greedy generation for requests that come at any time; every `step` is one forward of the model."""

    def __init__(self, model: Any, budget: int = 256, page: int = 16) -> None:
        """budget: most tokens of a forward. OptionError below 1, and where `kv_cache` refuses the model."""
        if budget < 1:
            raise OptionError(f"budget = {budget}: expected 1 token or more")
        self.budget, self._model = budget, model
        self._forward = _Forward()
        self._cache: PagedCache = kv_cache(model, "", page)
        self._cache.layers = [
            FusedLayer(layer.index, layer.page, layer._check, self._forward) for layer in self._cache.layers
        ]
        ends = model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._open: list[Request] = []
        self._count = self._steps = 0

    def submit(self, prompt: Sequence[int], limit: int) -> int:
        """Queue a prompt, to be followed by at most `limit` tokens; the number of the request."""
        if not prompt or limit < 1:
            raise OptionError(
                f"a prompt of {len(prompt)} tokens, limit = {limit}: expected 1 or more of both"
            )
        self._count += 1
        self._open.append(Request(self._count, list(prompt), len(prompt), limit))
        return self._count

    @property
    def waiting(self) -> int:
        """Requests that are not over."""
        return len(self._open)

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """One forward: the new token of every request that got one."""
        segments = next_batch(self._open, self.budget)
        if not segments:
            return {}
        self._steps += 1
        self._forward.segments = segments
        tokens: list[int] = []
        places: list[int] = []
        lasts: list[tuple[Request, int]] = []
        for request, count in segments:
            tokens += request.tokens[request.held : request.held + count]
            places += range(request.held, request.held + count)
            request.held, request.served = request.held + count, self._steps
            if request.held == len(request.tokens):
                lasts.append((request, len(tokens) - 1))
        device = self._model.device
        logits = self._model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([places], device=device),
            **cache_arguments(self._model, self._cache),
            # One row at least: a model has no way to be asked for none.
            logits_to_keep=torch.tensor([at for _, at in lasts] or [0], device=device),
        ).logits[0]
        made: dict[int, int] = {}
        for (request, _), row in zip(lasts, logits, strict=False):
            made[request.number] = token = int(row.argmax())
            request.tokens.append(token)
            if token in self._ends or len(request.tokens) - request.prompt == request.limit:
                self._open.remove(request)
                for layer in self._cache.layers:
                    layer.over(request.number)
        return made

    def run(self, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        """The tokens that follow each prompt."""
        numbers = [self.submit(prompt, limit) for prompt in prompts]
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        while self._open:
            for number, token in self.step().items():
                if number in answers:
                    answers[number].append(token)
        return [answers[number] for number in numbers]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that are held."""
        layers = self._cache.layers
        return sum(layer.pages_used * layer._pool.page_bytes for layer in layers if layer._pool is not None)

    def close(self) -> None:
        """Give all pages back, and the model its former attention."""
        self._open.clear()
        self._cache.close()

    def __enter__(self) -> SplitFuse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
