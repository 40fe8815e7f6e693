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
Growth = Generator[Place, Tensor | None, "TokenTree"]
"""A tree that grows as its questions are answered: with [V], float64, what the draft expects behind the node;
None where it knows nothing."""


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
    # (-estimated acceptance, order of entry, node, what is left of its distribution, children so far)
    heap: list[tuple[float, int, int, Tensor | None, int]] = [(-1.0, 0, ROOT, None, 0)]
    order = 0
    while heap and len(tree.tokens) < nodes:
        value, _, node, left, count = heapq.heappop(heap)
        if left is None:
            left = yield tree, node
            if left is None:
                continue
        token = draw(left, generator) if sample else int(left.argmax())
        chance = float(left[token] / left.sum()) if sample else float(left[token])
        child = tree.add(token, node, left / left.sum() if sample else None)
        rest = left.clone()
        rest[token] = 0.0
        if len(tree.path(child)) < depth:
            order += 1
            heapq.heappush(heap, (value * chance, order, child, None, 0))
        if count + 1 < branches and float(rest.sum()) > 0.0:
            order += 1
            # A draw: what it is worth when all before were refused. A choice: the next child's own share.
            again = value * (1.0 - chance) if sample else value * float(rest.max())
            heapq.heappush(heap, (again, order, node, rest, count + 1))
    return tree


def grow_together(
    growths: Mapping[int, Growth], answer: Callable[[dict[int, Place]], Mapping[int, Tensor | None]]
) -> dict[int, TokenTree]:
    """The trees of several rows, each row asking for one node at a time.

    answer(row -> what it asks for): an answer per row, so that one call of a model serves all rows.
    """
    growing, grown = dict(growths), dict[int, TokenTree]()
    answers: Mapping[int, Tensor | None] = dict.fromkeys(growing)
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
