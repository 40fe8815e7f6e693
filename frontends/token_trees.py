"""What drafts trees of tokens for one row: a model that shares the target's cache or not, or retrieval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tilewright.frontends.kv_rows import RowModel
from tilewright.frontends.sampling import Sampling
from tilewright.runtime.retrieval import NgramStore
from tilewright.runtime.token_tree import ROOT, TokenTree, grow


class TreeDrafter(Protocol):
    """Proposes trees for the only row of a batch. One instance serves one generation."""

    def propose(self, row: Sequence[int], nodes: int, depth: int) -> TokenTree:
        """Up to `nodes` tokens to follow `row`, all tokens so far, in paths of up to `depth`."""


def feed_tree(model: RowModel, start: int, tree: TokenTree, row: Sequence[int], width: int = 0) -> Tensor:
    """Logits [n + 1, V] behind the latest token of `row`, which goes to slot `start`, and behind each node.

    width: feed as many tokens at least, so that few shapes occur; the others see the root and go nowhere.
    """
    tokens = [row[-1], *tree.tokens]
    seen = torch.zeros(max(width, len(tokens)), model.kv.capacity, dtype=torch.bool)
    seen[:, : start + 1] = True
    depths = [0] * len(seen)
    for node in range(len(tree.tokens)):
        path = tree.path(node)
        depths[node + 1] = len(path)
        seen[node + 1, [start + 1 + n for n in path]] = True
    tokens += [row[-1]] * (len(seen) - len(tokens))
    places = [len(row) - 1 + d for d in depths]
    return model.feed_seeing(tokens, places, seen)[: len(tree.tokens) + 1]


class ModelTrees:
    """Grows trees by a model's probabilities; one call of it per node that gets children."""

    def __init__(self, model: RowModel, sampling: Sampling, branches: int, *, shared: bool) -> None:
        self._model, self._sampling, self._branches, self._shared = model, sampling, branches, shared

    def propose(self, row: Sequence[int], nodes: int, depth: int) -> TokenTree:
        kv = self._model.kv
        first = kv.length
        missing = row[kv.held[0] :]
        root = self._model.feed([missing], prompt=len(missing) > 2)[0, len(missing) - 1]
        start = kv.length
        slots: dict[int, int] = {}

        def distribution(tree: TokenTree, node: int) -> Tensor:
            if node == ROOT:
                return self._sampling.distribution(row, root)
            path = tree.path(node)
            seen = torch.zeros(1, kv.capacity, dtype=torch.bool)
            slots[node] = kv.length
            seen[0, :start] = True
            seen[0, [slots[n] for n in path]] = True
            place = len(row) - 1 + len(path)
            logits = self._model.feed_seeing([tree.tokens[node]], [place], seen)[0]
            return self._sampling.distribution([*row, *tree.words(node)], logits)

        sampling = self._sampling
        tree = grow(
            distribution, nodes, depth, self._branches, sample=sampling.draws, generator=sampling.generator
        )
        kv.take_back(first if self._shared else start, [0])
        return tree


class RetrievalTrees:
    """Grows trees of everything that followed the same words before, the most frequent first."""

    def __init__(
        self, datastore: NgramStore | None, branches: int, vocabulary: int, shortest: int, longest: int
    ) -> None:
        self._own = NgramStore([()], shortest=shortest, longest=longest)
        self._read, self._datastore = 0, datastore
        self._branches, self._vocabulary = branches, vocabulary

    def propose(self, row: Sequence[int], nodes: int, depth: int) -> TokenTree:
        self._own.extend(0, row[self._read :])
        self._read = len(row)
        stores = [self._own] if self._datastore is None else [self._own, self._datastore]
        found = max((store.continuations(row, depth) for store in stores), key=lambda f: f[0])[1]

        def distribution(tree: TokenTree, node: int) -> Tensor | None:
            words = tree.words(node)
            behind = Counter(f[len(words)] for f in found if f[: len(words)] == words and len(f) > len(words))
            if not behind:
                return None
            shares = torch.zeros(self._vocabulary, dtype=torch.float64)
            for token, times in behind.items():
                shares[token] = times
            return shares / shares.sum()

        return grow(distribution, nodes, depth, self._branches, sample=False)
