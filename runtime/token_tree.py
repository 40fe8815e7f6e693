"""Trees of drafted tokens: how they grow and which path the target keeps (DySpec, arXiv:2410.11744)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewright.runtime.acceptance import SpeculationError, draw

ROOT = -1
"""Parent of the first tokens: the latest token of the text itself."""
Place = tuple["TokenTree", int]
"""A tree and the node of it whose distribution is asked for."""
Ranked = Sequence[tuple[int, float]]
"""The likeliest tokens, the best first, each with its probability; at least one."""
Answer = Tensor | Ranked | None
"""What the draft expects behind a node: [V], float64, or the best tokens of it, which is enough where nothing
is drawn; None where it knows nothing."""
Growth = Generator[Place, Answer, "TokenTree"]
"""A tree that grows as its questions are answered."""


@dataclass
class TokenTree:
    """Nodes in the order they were added: a node comes behind its parent and its elder siblings."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    drawn_from: list[Tensor | None] = field(default_factory=list)
    """[V] that a node was drawn from, its elder siblings left out; None for a certain choice."""

    def add(self, token: int, parent: int, drawn_from: Tensor | None) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.drawn_from.append(drawn_from)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """Nodes from a first one to `node`; none for the root."""
        found = []
        while node != ROOT:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def words(self, node: int) -> list[int]:
        """The tokens of `path(node)`."""
        return [self.tokens[n] for n in self.path(node)]

    def children(self, node: int) -> list[int]:
        return [n for n, parent in enumerate(self.parents) if parent == node]


def grow(
    nodes: int, depth: int, branches: int, *, sample: bool, generator: torch.Generator | None = None
) -> Growth:
    """A tree of up to `nodes` tokens, added where the product of probabilities along the path is greatest.

    It asks once for each node that gets children, for the root first. depth: tokens of a path at most.
    branches: children of a node at most. sample: children are drawn without putting back; otherwise the
    likeliest come first.
    """
    if min(nodes, depth, branches) < 1:
        raise SpeculationError(f"nodes = {nodes}, depth = {depth}, branches = {branches}: expected 1 or more")
    tree = TokenTree()
    # (-estimated acceptance, order of entry, node, what its children's estimates are shares of, what is left
    # of its distribution, children so far)
    heap: list[tuple[float, int, int, float, Answer, int]] = [(-1.0, 0, ROOT, 1.0, None, 0)]
    order = 0
    while heap and len(tree.tokens) < nodes:
        _, _, node, value, left, count = heapq.heappop(heap)
        if left is None:
            left = yield tree, node
            if left is None:
                continue
            if isinstance(left, Tensor) and not sample:
                left = ranked(left, branches)
        rest: Answer
        drawn_from: Tensor | None
        if isinstance(left, Tensor):
            token, drawn_from, rest = _drawn(left, generator)
            chance = float(drawn_from[token])
            # What a further draw is worth when all before were refused.
            whole = again = value * (1.0 - chance) if bool(rest.any()) else 0.0
        else:
            (token, chance), rest, drawn_from, whole = left[0], left[1:], None, value
            again = value * left[1][1] if rest else 0.0
        child = tree.add(token, node, drawn_from)
        if len(tree.path(child)) < depth:
            order += 1
            heapq.heappush(heap, (-value * chance, order, child, value * chance, None, 0))
        if count + 1 < branches and again > 0.0:
            order += 1
            heapq.heappush(heap, (-again, order, node, whole, rest, count + 1))
    return tree


def _drawn(left: Tensor, generator: torch.Generator | None) -> tuple[int, Tensor, Tensor]:
    """(a token, the distribution it was drawn from, what is left without it)."""
    token, rest = draw(left, generator), left.clone()
    rest[token] = 0.0
    return token, left / left.sum(), rest


def ranked(distribution: Tensor, count: int) -> Ranked:
    """The `count` likeliest tokens of [V], without those of probability 0."""
    shares, tokens = distribution.topk(min(count, len(distribution)))
    pairs = zip(tokens.tolist(), shares.tolist(), strict=True)
    return [(token, share) for token, share in pairs if share > 0.0]


def grow_together(
    growths: Mapping[int, Growth], answer: Callable[[dict[int, Place]], Mapping[int, Answer]]
) -> dict[int, TokenTree]:
    """The trees of several rows, each row asking for one node at a time.

    answer(row -> what it asks for): an answer per row, so that one call of a model serves all rows.
    """
    growing, grown = dict(growths), dict[int, TokenTree]()
    answers: Mapping[int, Answer] = dict.fromkeys(growing)
    while growing:
        asked = dict[int, Place]()
        for row, growth in list(growing.items()):
            try:
                asked[row] = growth.send(answers[row])
            except StopIteration as end:
                grown[row] = end.value
                del growing[row]
        if asked:
            answers = answer(asked)
    return grown


def accept_tree_greedy(tree: TokenTree, choices: Sequence[int]) -> tuple[list[int], int]:
    """(nodes that the target would have chosen itself, from the first on; its token behind them).

    choices: the target's choice behind the root, then behind each node.
    """
    if len(choices) != len(tree.tokens) + 1:
        raise SpeculationError(f"{len(choices)} choices for {len(tree.tokens)} nodes: expected one more")
    kept, node = list[int](), ROOT
    while True:
        found = [c for c in tree.children(node) if tree.tokens[c] == choices[node + 1]]
        if not found:
            return kept, choices[node + 1]
        node = found[0]
        kept.append(node)


def accept_tree_sampled(
    tree: TokenTree, targets: Tensor, generator: torch.Generator | None = None
) -> tuple[list[int], int]:
    """As `accept_tree_greedy` for sampling; targets: [n + 1, V], the target's distributions.

    Siblings are tried in the order they were drawn, each against what the refused ones left of the target's
    distribution: max(p - q, 0), scaled to sum 1.
    """
    if len(targets) != len(tree.tokens) + 1:
        raise SpeculationError(
            f"{len(targets)} distributions for {len(tree.tokens)} nodes: expected one more"
        )
    kept, node = list[int](), ROOT
    while True:
        p, chosen = targets[node + 1].double(), None
        for child in tree.children(node):
            token, given = tree.tokens[child], tree.drawn_from[child]
            q = torch.zeros_like(p)
            if given is None:
                q[token] = 1.0
            else:
                q += given.to(p)
            if float(torch.rand((), generator=generator, dtype=torch.float64) * q[token]) < float(p[token]):
                chosen = child
                break
            rest = (p - q).clamp(min=0.0)
            # p = q up to rounding leaves nothing over: then p itself is what is left.
            p = rest / rest.sum() if float(rest.sum()) > 0 else p
        if chosen is None:
            return kept, draw(p, generator)
        node = chosen
        kept.append(node)
