"""What drafts tokens for `speculate`: another model, a lossy pipeline of the same model, or retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tilewright.frontends.kv_rows import RowModel
from tilewright.frontends.sampling import Sampling
from tilewright.runtime.retrieval import NgramStore


@dataclass
class Draft:
    """Tokens proposed for one row."""

    tokens: list[int] = field(default_factory=list)
    distributions: Tensor | None = None
    """[n, V] that the tokens were drawn from; None when they are a certain choice."""


class Drafter(Protocol):
    """Proposes tokens for rows of a batch. One instance serves one generation."""

    def propose(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Draft]:
        """Up to counts[b] tokens to follow rows[b], all tokens of the row so far; 0 for a finished row."""

    def commit(self, accepted: Sequence[int]) -> None:
        """How many of the tokens just proposed were kept, per row."""


class ModelDrafter:
    """Drafts with a model.

    shared: it writes into the target's cache, behind what is verified, and reads what the target wrote: the
    target's call then overwrites it. Otherwise it keeps a cache of its own and catches up by itself.
    """

    def __init__(self, model: RowModel, sampling: Sampling, *, shared: bool) -> None:
        self._model, self._sampling, self._shared = model, sampling, shared
        self._start = 0

    def propose(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Draft]:
        kv = self._model.kv
        most = max(counts)
        held = list(kv.held)
        missing = [list(row[n:]) if count else [] for row, n, count in zip(rows, held, counts, strict=True)]
        widest = max(len(m) for m in missing)
        kv.reserve(max(widest, 2) + most)
        start = kv.length
        # One token is missing, or two where all drafts were kept: two is then the only other shape.
        logits = self._model.feed(missing, min(widest, 2), prompt=widest > 2)
        self._start = start if self._shared else kv.length
        latest = [logits[b, max(len(m), 1) - 1] for b, m in enumerate(missing)]
        drafts = [Draft() for _ in rows]
        drawn: list[list[Tensor]] = [[] for _ in rows]
        for i in range(most):
            for b, count in enumerate(counts):
                if i < count:
                    token, distribution = self._sampling.propose([*rows[b], *drafts[b].tokens], latest[b])
                    drafts[b].tokens.append(token)
                    if distribution is not None:
                        drawn[b].append(distribution)
            if i + 1 < most:
                step = [d.tokens[i : i + 1] if i + 1 < c else [] for d, c in zip(drafts, counts, strict=True)]
                latest = list(self._model.feed(step, 1)[:, 0])
        for draft, distributions in zip(drafts, drawn, strict=True):
            draft.distributions = torch.stack(distributions) if distributions else None
        if self._shared:
            kv.take_back(start, [0] * len(rows))
        else:
            self._fed = [max(0, c - 1) for c in counts]
        return drafts

    def commit(self, accepted: Sequence[int]) -> None:
        if not self._shared:
            kept = [min(a, n) for a, n in zip(accepted, self._fed, strict=True)]
            self._model.kv.take_back(self._start, kept)


class RetrievalDrafter:
    """Drafts what followed the same words before: in the row itself, or in a datastore of other texts."""

    def __init__(self, batch: int, datastore: NgramStore | None, shortest: int, longest: int) -> None:
        self._own = [NgramStore([()], shortest=shortest, longest=longest) for _ in range(batch)]
        self._read = [0] * batch
        self._datastore = datastore

    def propose(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Draft]:
        drafts = []
        for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
            self._own[b].extend(0, row[self._read[b] :])
            self._read[b] = len(row)
            size, tokens = self._own[b].propose(row, count) if count else (0, [])
            if self._datastore is not None and count:
                other, found = self._datastore.propose(row, count)
                tokens = found if other > size else tokens
            drafts.append(Draft(tokens))
        return drafts

    def commit(self, accepted: Sequence[int]) -> None:
        """Nothing to take back."""
