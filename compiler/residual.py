"""Residual streams: chains of additions `x + f(x)` on one value that runs through a model.

Found on the data flow alone. An addition is residual when one of its terms, seen through casts, is an
ancestor of another term with a heavy op in between. Two residual additions are linked when the first reaches
the second's skip term through light ops only, which allows a norm after the addition (BERT).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from tilewright.compiler.dataflow import Flow, op_name, passes_through, see_through, shape_key, tensor_of


@dataclass
class Chain:
    """One residual stream: `points[i]` is its value before addition i, `points[-1]` that after the last."""

    adds: list[fx.Node]
    points: list[fx.Node] = field(default_factory=list)

    @property
    def steps(self) -> range:
        return range(len(self.adds))

    def core(self, flow: Flow, start: int, stop: int) -> int:
        """Mask of all between points start and stop that depends on the stream, exit included."""
        return flow.below(self.points[start]) & flow.upto(self.points[stop])


def find_chains(flow: Flow) -> list[Chain]:
    """The maximal residual streams of at least two additions, longest first."""
    skips = _residual_adds(flow)
    order = sorted(skips, key=flow.index.__getitem__)
    before = {add: _previous(flow, add, skips[add], order) for add in order}
    length: dict[fx.Node, int] = {}
    for add in order:
        previous = before[add]
        length[add] = 1 + (length[previous] if previous is not None else 0)
    chains: list[Chain] = []
    taken: set[fx.Node] = set()
    for add in sorted(order, key=lambda n: (-length[n], flow.index[n])):
        adds: list[fx.Node] = []
        current: fx.Node | None = add
        while current is not None and current not in taken:
            adds.append(current)
            taken.add(current)
            current = before[current]
        if len(adds) >= 2:
            chains.append(_with_points(flow, Chain(adds[::-1]), skips))
    return sorted(chains, key=lambda c: -len(c.adds))


def _terms(add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both terms of an unscaled floating-point addition of two values of the result's shape."""
    out = tensor_of(add)
    if (
        op_name(add) not in ("add", "add_")
        or out is None
        or len(add.args) < 2
        or add.kwargs.get("alpha", 1) != 1
    ):
        return None
    a, b = add.args[:2]
    left, right = tensor_of(a), tensor_of(b)
    if left is None or right is None or not out.is_floating_point() or out.dim() < 2:
        return None
    if not shape_key(left) == shape_key(right) == shape_key(out):
        return None
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return a, b


def _residual_adds(flow: Flow) -> dict[fx.Node, fx.Node]:
    """Outermost addition of each sum that is residual -> its skip term behind casts."""
    inner: set[fx.Node] = set()
    sums: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(flow.nodes):
        if node not in inner and flow.live >> flow.index[node] & 1 and _terms(node) is not None:
            sums[node] = _flatten(flow, node, inner)
    skips: dict[fx.Node, fx.Node] = {}
    for node, terms in sums.items():
        roots = sorted((see_through(term) for term in terms), key=flow.index.__getitem__)
        for root in roots:
            if any(flow.upto(term) & flow.below(root) & flow.heavy for term in terms):
                skips[node] = root
                break
    return skips


def _flatten(flow: Flow, add: fx.Node, inner: set[fx.Node]) -> list[fx.Node]:
    """The terms of a sum; an addition whose only user is the sum belongs to it (`x + attention + mlp`)."""
    found: list[fx.Node] = []
    pending = list(_terms(add) or ())
    while pending:
        term = pending.pop()
        node, single = term, len(flow.users(term)) == 1
        while single and (source := passes_through(node)) is not None:
            node, single = source, len(flow.users(source)) == 1
        terms = _terms(node) if single else None
        if terms is None:
            found.append(term)
        else:
            inner.add(node)
            pending.extend(terms)
    return found


def _previous(flow: Flow, add: fx.Node, skip: fx.Node, order: list[fx.Node]) -> fx.Node | None:
    """The residual addition that feeds this one's skip term through light ops only.

    It has the same shape, or else the same width and size: OPT flattens batch and tokens for its MLP.
    """
    reached = flow.upto(skip)
    earlier = [o for o in reversed(order) if flow.index[o] < flow.index[add] and reached >> flow.index[o] & 1]
    for key in (shape_key, _volume):
        same = next((o for o in earlier if key(_value(o)) == key(_value(add))), None)
        if same is not None and not reached & flow.below(same) & flow.heavy:
            return same
    return None


def _value(add: fx.Node) -> torch.Tensor:
    value = tensor_of(add)
    assert value is not None, "residual additions are tensors"
    return value


def _volume(value: torch.Tensor) -> tuple[str, ...]:
    return str(value.shape[-1]), str(value.numel())


def _with_points(flow: Flow, chain: Chain, skips: dict[fx.Node, fx.Node]) -> Chain:
    """Fill in the points: skip terms, moved down over casts that are the only user."""
    first = skips[chain.adds[0]]
    value = tensor_of(first)
    assert value is not None
    chain.points = [_settle(flow, skips[add], value.dtype) for add in chain.adds]
    last = _repeat_tail(flow, chain.adds, skips[chain.adds[-1]]) or chain.adds[-1]
    chain.points.append(_settle(flow, last, value.dtype))
    return chain


def _settle(flow: Flow, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The last of a row of casts below a value that has the stream's dtype, else the value itself."""
    found = node
    while True:
        value = tensor_of(node)
        if value is not None and value.dtype == dtype:
            found = node
        users = flow.users(node)
        if len(users) != 1 or passes_through(users[0]) is not node:
            return found
        node = users[0]


def _repeat_tail(flow: Flow, adds: list[fx.Node], skip: fx.Node) -> fx.Node | None:
    """Where the stream goes after the last addition, by analogy with the ops after the earlier ones.

    A post-norm model has a norm between an addition and the next skip term; the last addition has the norm
    but no next addition. Only a plain row of ops is followed, and only where every op has one fitting user.
    """
    node, source = adds[-1], adds[-2]
    for expected in flow.members(flow.below(source) & flow.upto(skip)):
        if not expected.args or expected.args[0] is not source:
            return None
        fitting = [
            u for u in flow.users(node) if u.target == expected.target and u.args and u.args[0] is node
        ]
        if len(fitting) != 1:
            return None
        node, source = fitting[0], expected
    return node
