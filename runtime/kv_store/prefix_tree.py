"""What is kept of prompts: a tree of token runs with their pages, replaced by what recomputing would cost.

The replacement is the prefix-aware GDSF of RAGCache, arXiv:2404.12457.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tilewright.runtime.kv_store.errors import KVStoreError

Pages = tuple[int, ...]
"""The page of every layer that holds one run of `page` tokens."""
Cost = Callable[[int, int], float]
"""(tokens cached, tokens new) -> what it costs to compute the new ones behind the cached."""


@dataclass(frozen=True)
class CostTable:
    """Costs measured at a grid: cost[i][j] of new[j] tokens behind cached[i]; between them bilinear, outside
    as at the border cells' planes go on."""

    cached: tuple[int, ...]
    new: tuple[int, ...]
    cost: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name, axis in (("cached", self.cached), ("new", self.new)):
            if len(axis) < 2 or any(a >= b for a, b in zip(axis, axis[1:], strict=False)):
                raise KVStoreError(f"{name} = {axis}: expected two numbers or more, ascending")
        if [len(row) for row in self.cost] != [len(self.new)] * len(self.cached):
            raise KVStoreError(f"cost: expected {len(self.cached)} rows of {len(self.new)} numbers")

    def __call__(self, cached: int, new: int) -> float:
        """The cost of `new` tokens behind `cached`."""
        i, a = self._cell(self.cached, cached)
        j, b = self._cell(self.new, new)
        rows = ((1 - b) * row[j] + b * row[j + 1] for row in self.cost[i : i + 2])
        return (1 - a) * next(rows) + a * next(rows)

    @staticmethod
    def _cell(axis: tuple[int, ...], at: int) -> tuple[int, float]:
        i = min(max(bisect.bisect_right(axis, at) - 1, 0), len(axis) - 2)
        return i, (at - axis[i]) / (axis[i + 1] - axis[i])


@dataclass(eq=False)
class Node:
    """A run of tokens behind those of its parents, with its pages."""

    tokens: tuple[int, ...]
    pages: list[Pages]
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    """By the tokens of their first page."""
    leases: list[Lease] = field(default_factory=list)
    frequency: int = 0
    """Requests that touched it."""
    cost: float = 0.0
    """Of a token, when it was computed."""
    priority: float = 0.0
    touched: int = 0
    """When it was touched last, in requests."""


@dataclass(eq=False)
class Lease:
    """The nodes that a request reads: they stay until `PrefixTree.release`."""

    nodes: list[Node]

    @property
    def pages(self) -> list[Pages]:
        """From the first token on."""
        return [page for node in self.nodes for page in node.pages]


class PrefixTree:
    """Runs of whole pages by the tokens that lead to them, at most `capacity` tokens.

    priority = clock + frequency x cost of a token; the leaf of least priority goes first (of equal ones that
    touched longest ago) and the clock becomes its priority, so that what was popular once gives way. Nodes
    under a lease, and those above others, stay.
    """

    def __init__(self, page: int, capacity: int, cost: Cost, drop: Callable[[Sequence[Pages]], None]) -> None:
        """drop: called with the pages of a node that was given up. KVStoreError for a capacity below a
        page."""
        if capacity < page:
            raise KVStoreError(f"capacity = {capacity}: expected a page of {page} tokens or more")
        self.page, self.capacity, self.clock = page, capacity, 0.0
        self._cost, self._drop = cost, drop
        self._root = Node((), [], None)
        self._tokens = self._requests = 0

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self._tokens

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents first."""
        todo = list(self._root.children.values())
        while todo:
            node = todo.pop(0)
            yield node
            todo += node.children.values()

    def match(self, tokens: Sequence[int]) -> Lease:
        """The longest run of whole pages that `tokens` begin with, counted as a request and leased."""
        self._requests += 1
        node, at, path = self._root, 0, []
        while found := node.children.get(tuple(tokens[at : at + self.page])):
            node = self._cut(found, tokens[at:])
            at += len(node.tokens)
            path.append(node)
        lease = Lease(path)
        for node in path:
            node.leases.append(lease)
            node.frequency += 1
            self._touch(node)
        return lease

    def add(self, lease: Lease, tokens: Sequence[int], pages: Sequence[Pages]) -> bool:
        """Keep what was computed behind the leased tokens, whole pages, and lease it too.

        False where it cannot be kept: leases hold too much of the capacity, or another request was first.
        """
        if not pages or len(tokens) != len(pages) * self.page:
            raise KVStoreError(f"{len(pages)} pages of {self.page} tokens for {len(tokens)} tokens")
        parent = lease.nodes[-1] if lease.nodes else self._root
        first = tuple(tokens[: self.page])
        if first in parent.children or not self._make_room(len(tokens)):
            return False
        cached = sum(len(node.tokens) for node in lease.nodes)
        node = Node(tuple(tokens), list(pages), parent, leases=[lease], frequency=1)
        node.cost = self._cost(cached, len(tokens)) / len(tokens)
        self._touch(node)
        parent.children[first] = node
        lease.nodes.append(node)
        self._tokens += len(tokens)
        return True

    def release(self, lease: Lease) -> None:
        """The request is over. Twice is fine."""
        for node in lease.nodes:
            node.leases.remove(lease)
        lease.nodes = []

    def clear(self) -> None:
        """Give up everything; KVStoreError while something is leased."""
        if any(node.leases for node in self.nodes()):
            raise KVStoreError("the tree cannot be cleared: a request reads it")
        for node in list(self.nodes()):
            self._drop(node.pages)
        self._root.children.clear()
        self._tokens = 0

    def _touch(self, node: Node) -> None:
        node.priority = self.clock + node.frequency * node.cost
        node.touched = self._requests

    def _cut(self, node: Node, tokens: Sequence[int]) -> Node:
        """The part of a node that `tokens` begin with, whole pages, cut off from the rest of it."""
        size = self.page
        while node.tokens[size : size + self.page] == tuple(tokens[size : size + self.page]) != ():
            size += self.page
        if size >= len(node.tokens):
            return node
        count = size // self.page
        rest = Node(node.tokens[size:], node.pages[count:], node, node.children, list(node.leases))
        rest.frequency, rest.cost = node.frequency, node.cost
        rest.priority, rest.touched = node.priority, node.touched
        for child in rest.children.values():
            child.parent = rest
        for lease in node.leases:
            lease.nodes.insert(lease.nodes.index(node) + 1, rest)
        node.tokens, node.pages = node.tokens[:size], node.pages[:count]
        node.children = {rest.tokens[: self.page]: rest}
        return node

    def _make_room(self, tokens: int) -> bool:
        """Evict until `tokens` more fit; False, and nothing evicted, where they cannot."""
        held = sum(len(node.tokens) for node in self.nodes() if node.leases)
        if tokens > self.capacity - held:
            return False
        while self._tokens + tokens > self.capacity:
            leaves = (node for node in self.nodes() if not node.children and not node.leases)
            self._evict(min(leaves, key=lambda node: (node.priority, node.touched)))
        return True

    def _evict(self, node: Node) -> None:
        assert node.parent is not None
        self.clock = max(self.clock, node.priority)
        del node.parent.children[node.tokens[: self.page]]
        self._tokens -= len(node.tokens)
        self._drop(node.pages)
