"""When a block may be skipped or its result reused: seven rules, each with a verdict and a reason.

L1 single entry and exit of one shape, dtype and device. L2 every other live-out is of a declared class.
L3 nothing outside uses a value inside. L4 values shared with later blocks lie outside. L5 coupled streams
go together. L6 no effect in place besides declared state. L7 (caching a result) externals stay the same over
a session.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from tilewright.compiler.dataflow import Flow, is_mutating, op_name, shape_key, tensor_of
from tilewright.compiler.module_paths import module_path

STATE, WEIGHTS, COUNTER, OUTPUT, VALUE = (
    "state write",
    "attention weights",
    "counter",
    "model output",
    "value",
)
_WRITES = frozenset(
    {"index_copy", "index_put", "slice_scatter", "select_scatter", "scatter", "cat", "copy", "kv_update"}
)


@dataclass(frozen=True)
class LiveOut:
    """A node of a block, other than its exit, that something outside the block reads."""

    node: fx.Node
    kind: str
    """STATE (cache write), WEIGHTS (softmax), COUNTER (integers), OUTPUT, or VALUE (read by later ops)."""
    users: tuple[fx.Node, ...]


@dataclass(frozen=True)
class RuleVerdict:
    """One rule on one block."""

    rule: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Surroundings:
    """What the rules need to know about a block's graph."""

    flow: Flow
    points: Mapping[fx.Node, int]
    """Every point of every stream -> its stream."""
    last: Collection[fx.Node]
    """The last points of the streams."""
    step: int
    """Mask of what depends on a step embedding."""
    step_sources: int
    """Mask of what a step embedding is computed from."""
    streams: int
    """Mask of what depends on any stream."""


@dataclass(frozen=True)
class BlockFacts:
    """What is known about a block when it is judged."""

    mask: int
    entry: fx.Node
    exit: fx.Node
    path: str
    reads: Sequence[fx.Node]
    """Operands from outside other than the entry: placeholders and computed values."""
    partners: Mapping[str, int]
    """Names of coupled blocks -> their masks with their entries."""


def live_outs(around: Surroundings, mask: int, exit_: fx.Node, state: Collection[fx.Node]) -> list[LiveOut]:
    """The nodes of a block that are read outside it, with their class."""
    found = []
    flow = around.flow
    for node in flow.members(mask):
        users = tuple(u for u in flow.users(node) if not mask >> flow.index[u] & 1)
        if users and node is not exit_:
            found.append(LiveOut(node, _kind(flow, node, users, state), users))
    return found


def _kind(flow: Flow, node: fx.Node, users: Sequence[fx.Node], state: Collection[fx.Node]) -> str:
    tensor = tensor_of(node)
    if all(is_mutating(u) and u.args[0] in state for u in users):
        return STATE
    later = any((flow.below(u) | flow.bit(u)) & flow.heavy for u in users)
    if later:
        return VALUE
    if tensor is not None and not tensor.is_floating_point():
        return COUNTER
    if op_name(node) in ("softmax", "_softmax"):
        return WEIGHTS
    return STATE if op_name(node) in _WRITES else OUTPUT


def judge(around: Surroundings, block: BlockFacts, outs: Sequence[LiveOut]) -> tuple[RuleVerdict, ...]:
    """The verdict of every rule, in order."""
    return (
        _same_form(block),
        _declared(outs),
        _no_use_outside(around, block, outs),
        _hoisted(around, block),
        _coupled(block),
        _in_place(around, block),
        _constant_externals(around, block),
    )


def _verdict(rule: str, faults: Sequence[str], fine: str) -> RuleVerdict:
    return RuleVerdict(rule, not faults, "; ".join(faults) if faults else fine)


def _same_form(block: BlockFacts) -> RuleVerdict:
    before, after = tensor_of(block.entry), tensor_of(block.exit)
    if before is None or after is None:
        return RuleVerdict("L1", False, "entry or exit is not a tensor")
    forms = [(shape_key(t), str(t.dtype), str(t.device)) for t in (before, after)]
    faults = [
        f"entry {block.entry.name} has {name} {a}, exit {block.exit.name} has {b}"
        for name, a, b in zip(("shape", "dtype", "device"), *forms, strict=True)
        if a != b
    ]
    return _verdict("L1", faults, f"one entry {block.entry.name} and one exit {block.exit.name} of one form")


def _declared(outs: Sequence[LiveOut]) -> RuleVerdict:
    faults = [f"{o.node.name} is returned by the model" for o in outs if o.kind == OUTPUT]
    declared = [f"{o.node.name} ({o.kind})" for o in outs if o.kind in (STATE, WEIGHTS, COUNTER)]
    return _verdict(
        "L2", faults, f"declared live-outs: {', '.join(declared)}" if declared else "no other live-out"
    )


def _no_use_outside(around: Surroundings, block: BlockFacts, outs: Sequence[LiveOut]) -> RuleVerdict:
    flow = around.flow
    partners = 0
    for mask in block.partners.values():
        partners |= mask
    faults = []
    for out in outs:
        users = [u.name for u in out.users if not partners >> flow.index[u] & 1]
        if out.kind == VALUE and users:
            faults.append(f"{out.node.name} is used outside by {', '.join(users[:3])}")
    if block.exit not in around.last:
        beyond = _users_beyond_next(around, block.exit)
        if beyond:
            faults.append(f"exit {block.exit.name} is also used by {', '.join(u.name for u in beyond[:3])}")
    return _verdict("L3", faults, "no value inside is used outside")


def _users_beyond_next(around: Surroundings, point: fx.Node) -> list[fx.Node]:
    """Users of a point that do not lead to the next point of its stream: long skips, extra outputs."""
    flow, stream = around.flow, around.points[point]
    after = [n for n, s in around.points.items() if s == stream and flow.index[n] > flow.index[point]]
    following = min(after, key=flow.index.__getitem__)
    inside = flow.upto(following)
    return [u for u in flow.users(point) if not inside >> flow.index[u] & 1 and not _side_write(flow, u)]


def _side_write(flow: Flow, node: fx.Node) -> bool:
    """True when a value ends in writes to state only."""
    ends = [n for n in flow.members(flow.below(node) | flow.bit(node)) if not flow.users(n)]
    return bool(ends) and all(is_mutating(n) for n in ends)


def _hoisted(around: Surroundings, block: BlockFacts) -> RuleVerdict:
    flow = around.flow
    computed = [n for n in block.reads if n.op == "call_function"]
    free = [n for n in computed if not around.streams >> flow.index[n] & 1]
    names = [n.name for n in free if block.path and f"{module_path(n)}.".startswith(f"{block.path}.")]
    fine = (
        f"computed in this block's module, kept outside it: {', '.join(names)}"
        if names
        else "nothing to hoist"
    )
    return RuleVerdict("L4", True, fine)


def _coupled(block: BlockFacts) -> RuleVerdict:
    faults = [f"coupled with {name}: legal only together" for name in block.partners]
    return _verdict("L5", faults, "not coupled")


def _in_place(around: Surroundings, block: BlockFacts) -> RuleVerdict:
    """Only a last `copy_` into an input may write; an earlier write hides data flow through what it wrote."""
    flow = around.flow
    aside = flow.below(block.entry) & ~flow.below(block.exit)
    faults = [
        f"{node.name} writes to {node.args[0]} in place"
        for node in flow.members(block.mask | aside)
        if is_mutating(node) and not _is_final_write(flow, node)
    ]
    return _verdict("L6", faults, "no effect in place besides declared state")


def _is_final_write(flow: Flow, node: fx.Node) -> bool:
    target = node.args[0] if node.args else None
    placed = isinstance(target, fx.Node) and target.op == "placeholder"
    return placed and op_name(node) == "copy_" and not flow.users(node)


def _constant_externals(around: Surroundings, block: BlockFacts) -> RuleVerdict:
    flow = around.flow
    partners = 0
    for mask in block.partners.values():
        partners |= mask
    faults = []
    for node in block.reads:
        here = flow.bit(node)
        if here & partners:
            faults.append(f"{node.name} is a value of a coupled stream")
        elif here & around.step:
            faults.append(f"{node.name} depends on the step")
        elif here & around.step_sources and block.mask & around.step:
            faults.append(f"{node.name} feeds a step embedding inside")
    return _verdict("L7", faults, "externals do not depend on the step")
