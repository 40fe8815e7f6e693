"""Where a token order that several attentions share can leave the transformer, and the edits that move it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from tilewright.compiler import Program
from tilewright.compiler.dataflow import Flow, tensor_of
from tilewright.compiler.graph import insert_like
from tilewright.compiler.schema import arguments
from tilewright.compiler.token_order import Moved, Placed, Wanted, operands_for, result_for
from tilewright.passes.attention._sparse_call import Constants


@dataclass(frozen=True, eq=False)
class Order:
    """A permutation of the tokens of an attention: slot -> token."""

    slots: torch.Tensor
    """int64 [tokens]."""

    @cached_property
    def run(self) -> tuple[int, int]:
        """First moved token, and how many from there to the last: the rest of the tokens stay."""
        moved = (self.slots != torch.arange(len(self.slots))).nonzero().flatten()
        return int(moved[0]), int(moved[-1] - moved[0]) + 1

    def equals(self, other: Order) -> bool:
        return torch.equal(self.slots, other.slots)

    def index(self, size: int, start: int, *, inverse: bool) -> torch.Tensor:
        """int64 [size]: the order for a value whose moved run begins at `start`."""
        first, count = self.run
        index = torch.arange(size)
        index[start : start + count] = self.slots[first : first + count] - first + start
        return torch.argsort(index) if inverse else index


def shared_order(program: Program, node: fx.Node) -> Order | str:
    """The one constant order of all heads of a block-sparse attention, or why it has none to hoist."""
    given = arguments(node)
    source = given["src_q"]
    if source is None and given["src_k"] is None:
        return "it attends tokens in their own order"
    if source is not given["src_k"]:
        return "its queries and its keys have different token orders"
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return "its token order is computed in the call"
    slots = program.module.get_buffer(str(source.target)).long()
    if slots.shape[0] != 1:
        return f"it has a token order of its own for each of {slots.shape[0]} groups of heads"
    value = tensor_of(given["q"])
    if value is None or value.shape[-2] != slots.shape[1] or len(slots.unique()) != slots.shape[1]:
        return "its token order leaves tokens out"
    return Order(slots[0])


@dataclass
class Plan:
    """What is permuted, where that begins and where it ends."""

    nodes: list[fx.Node]
    places: dict[fx.Node, Placed] = field(default_factory=dict)
    """How each value that is permuted holds its tokens."""
    sources: dict[fx.Node, str] = field(default_factory=dict)
    """Values that are computed in the old order and permuted then, with the reason."""
    sinks: list[tuple[fx.Node, fx.Node, str]] = field(default_factory=list)
    """(value, user) that needs the old order, with the reason."""

    def summary(self) -> str:
        """For the report."""
        ends = len({value for value, _, _ in self.sinks})
        return f"{len(self.nodes)} attentions, {len(self.sources)} values permuted, {ends} put back"


def plan_hoisting(flow: Flow, nodes: list[fx.Node], order: Order) -> Plan | str:
    """Spread the order from the attentions over everything that commutes; the reason where that is no gain.

    It is none where tokens would have to be put back, or permuted again, between two of the attentions.
    """
    first, count = order.run
    moved, plan = Moved(count, frozenset(nodes)), Plan(nodes)
    pending: list[fx.Node] = []

    def place(node: fx.Node, placed: Placed) -> str | None:
        if node not in plan.places:
            plan.places[node] = placed
            pending.append(node)
        return None if plan.places[node] == placed else f"{node.name} would hold the tokens in two places"

    for node in nodes:
        for name in ("q", "k", "v"):
            place(arguments(node)[name], Placed(2, first))
    while pending:
        node = pending.pop()
        wanted = _operands(node, plan.places[node], moved)
        if isinstance(wanted, str):
            plan.sources[node] = wanted
            continue
        for user in flow.users(node):
            placed = result_for(user, node, plan.places[node], moved)
            if isinstance(placed, str):
                plan.sinks.append((node, user, placed))
            elif placed is not None:
                wanted.append((user, placed))
        for other, placed in wanted:
            conflict = place(other, placed)
            if conflict is not None:
                return conflict
    return _between_layers(flow, nodes, plan) or plan


def _operands(node: fx.Node, placed: Placed, moved: Moved) -> Wanted | str:
    if node.op != "call_function":
        return f"{node.name} comes in its own order"
    return operands_for(node, placed, moved)


def _between_layers(flow: Flow, nodes: list[fx.Node], plan: Plan) -> str | None:
    """Why tokens would be permuted inside the transformer, None when only at its ends."""
    attentions = 0
    for node in nodes:
        attentions |= flow.bit(node)
    for value, reason in plan.sources.items():
        if flow.upto(value) & attentions:
            return f"{reason}, between the layers"
    for _, user, reason in plan.sinks:
        if user.op != "output" and flow.below(user) & attentions:
            return f"{reason}, between the layers"
    return None


def permute_everything(program: Program, plan: Plan, order: Order) -> list[fx.Node]:
    """Insert the permutations at the ends and take the index maps out of the attentions; the nodes made."""
    constants = Constants(program)
    moved = Moved(order.run[1], frozenset(plan.nodes))
    made: list[fx.Node] = []

    def select(node: fx.Node, *, inverse: bool) -> fx.Node:
        place, value = plan.places[node], tensor_of(node)
        assert value is not None, "only tensors are permuted"
        index = constants.node(order.index(int(value.shape[place.axis]), place.start, inverse=inverse), node)
        select_op = torch.ops.aten.index_select.default
        new = insert_like(program.graph, _next_call(node), select_op, (node, place.axis, index), node)
        made.append(new)
        return new

    for node in plan.sources:
        readers = [u for u in node.users if _reads_permuted(plan, u, node, moved)]
        if readers:
            new = select(node, inverse=False)
            for user in readers:
                user.replace_input_with(node, new)
    for node in dict.fromkeys(value for value, _, _ in plan.sinks):
        new = select(node, inverse=True)
        for value, user, _ in plan.sinks:
            if value is node:
                user.replace_input_with(node, new)
    for node in plan.nodes:
        given: dict[str, Any] = arguments(node)
        given.update(src_q=None, src_k=None)
        node.args, node.kwargs = tuple(given.values()), {}
    return made


def _reads_permuted(plan: Plan, user: fx.Node, node: fx.Node, moved: Moved) -> bool:
    if user in plan.nodes:
        return True
    if user not in plan.places or user in plan.sources:
        return False
    wanted = operands_for(user, plan.places[user], moved)
    return isinstance(wanted, list) and (node, plan.places[node]) in wanted


def _next_call(node: fx.Node) -> fx.Node:
    """Where to insert what reads a node: right after it, or after all placeholders and constants."""
    following = node.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following
