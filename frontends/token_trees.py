"""What drafts trees of tokens: a model that shares the target's cache or not, or retrieval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tilewright.frontends.kv_rows import RowModel
from tilewright.frontends.sampling import Sampling
from tilewright.runtime.retrieval import NgramStore
from tilewright.runtime.token_tree import ROOT, Answer, Place, Ranked, TokenTree, grow, grow_together


class TreeDrafter(Protocol):
    """Proposes trees for the rows of a batch. One instance serves one generation."""

    def propose(self, rows: Sequence[Sequence[int]], nodes: int, depths: Sequence[int]) -> list[TokenTree]:
        """Up to `nodes` tokens to follow rows[b], all tokens of the row so far, in paths of up to depths[b];
        an empty tree where that is 0."""


def feed_trees(
    model: RowModel, trees: Sequence[TokenTree], rows: Sequence[Sequence[int]], width: int
) -> Tensor:
    """Logits [B, W, V] behind the latest token of each row and behind each node of its tree.

    They are put behind everything in the cache. width: W, more than any tree has nodes, so that few shapes
    occur; what lies behind a tree is padding, which sees the row and is seen by nothing.
    """
    start = model.kv.length
    seen = model.kv.used[:, None].repeat(1, width, 1)
    seen[:, :, start] = True
    tokens, places = [], []
    for b, (tree, row) in enumerate(zip(trees, rows, strict=True)):
        depths = [0] * width
        for node in range(len(tree.tokens)):
            path = tree.path(node)
            depths[node + 1] = len(path)
            seen[b, node + 1, [start + 1 + n for n in path]] = True
        tokens.append([row[-1], *tree.tokens, *[row[-1]] * (width - 1 - len(tree.tokens))])
        places.append([len(row) - 1 + depth for depth in depths])
    return model.feed_seeing(tokens, places, seen)


class ModelTrees:
    """Grows trees by a model's probabilities; one call of it gives every row one node's children."""

    def __init__(self, model: RowModel, sampling: Sampling, branches: int, *, shared: bool) -> None:
        self._model, self._sampling, self._branches, self._shared = model, sampling, branches, shared

    def propose(self, rows: Sequence[Sequence[int]], nodes: int, depths: Sequence[int]) -> list[TokenTree]:
        kv, sampling = self._model.kv, self._sampling
        missing = [row[n:] if d else [] for row, n, d in zip(rows, kv.held, depths, strict=True)]
        widest = max(map(len, missing))
        kv.reserve((nodes + 1 if 2 < widest <= nodes else widest) + nodes)
        first = kv.length
        root = self._model.catch_up(missing, nodes + 1)
        start, used = kv.length, kv.used.clone()
        slots: list[dict[int, int]] = [{} for _ in rows]

        def answer(asked: Mapping[int, Place]) -> dict[int, Answer]:
            # All rows ask for their root at once and first.
            if all(node == ROOT for _, node in asked.values()):
                logits = torch.stack([root[b, max(len(m), 1) - 1] for b, m in enumerate(missing)])
            else:
                logits = self._step(rows, asked, slots, used)
            prefixes = [[*rows[b], *tree.words(node)] for b, (tree, node) in asked.items()]
            which = list(asked)
            if not sampling.draws:
                return dict(zip(which, sampling.ranked(prefixes, logits[which], self._branches), strict=True))
            found = [sampling.distribution(p, logits[b]) for p, b in zip(prefixes, which, strict=True)]
            return dict(zip(which, found, strict=True))

        growths = {
            b: grow(nodes, depth, self._branches, sample=sampling.draws, generator=sampling.generator)
            for b, depth in enumerate(depths)
            if depth
        }
        trees = grow_together(growths, answer)
        kv.take_back(first if self._shared else start, [0] * len(rows))
        return [trees.get(b, TokenTree()) for b in range(len(rows))]

    def _step(
        self,
        rows: Sequence[Sequence[int]],
        asked: Mapping[int, Place],
        slots: Sequence[dict[int, int]],
        used: Tensor,
    ) -> Tensor:
        """Logits [B, V] behind one node per row; rows that ask for none get padding.

        slots: of every node of a row that was fed; extended. used: bool [B, capacity], of the text.
        """
        tokens, places, seen = [[0] for _ in rows], [[0] for _ in rows], used[:, None].clone()
        for b, (tree, node) in asked.items():
            path = tree.path(node)
            slots[b][node] = self._model.kv.length
            seen[b, 0, [slots[b][n] for n in path]] = True
            tokens[b], places[b] = [tree.tokens[node]], [len(rows[b]) - 1 + len(path)]
        return self._model.feed_seeing(tokens, places, seen)[:, 0]


class RetrievalTrees:
    """Grows trees of everything that followed the same words before, the most frequent first."""

    def __init__(
        self,
        batch: int,
        datastore: NgramStore | None,
        branches: int,
        shortest: int,
        longest: int,
    ) -> None:
        self._own = [NgramStore([()], shortest=shortest, longest=longest) for _ in range(batch)]
        self._read, self._datastore = [0] * batch, datastore
        self._branches = branches

    def propose(self, rows: Sequence[Sequence[int]], nodes: int, depths: Sequence[int]) -> list[TokenTree]:
        return [
            self._tree(b, row, nodes, depth) if depth else TokenTree()
            for b, (row, depth) in enumerate(zip(rows, depths, strict=True))
        ]

    def _tree(self, b: int, row: Sequence[int], nodes: int, depth: int) -> TokenTree:
        own = self._own[b]
        own.extend(0, row[self._read[b] :])
        self._read[b] = len(row)
        stores = [own] if self._datastore is None else [own, self._datastore]
        found = max((store.continuations(row, depth) for store in stores), key=lambda f: f[0])[1]

        def answer(asked: Mapping[int, Place]) -> dict[int, Answer]:
            return {row: self._ranked(found, tree.words(node)) for row, (tree, node) in asked.items()}

        return grow_together({b: grow(nodes, depth, self._branches, sample=False)}, answer)[b]

    def _ranked(self, found: Sequence[Sequence[int]], words: list[int]) -> Ranked | None:
        """How often the most frequent tokens follow `words` in what was found, the latest of equally frequent
        ones first; None where nothing does."""
        behind = Counter(f[len(words)] for f in found if f[: len(words)] == words and len(f) > len(words))
        total = behind.total()
        return [(token, times / total) for token, times in behind.most_common(self._branches)] or None
