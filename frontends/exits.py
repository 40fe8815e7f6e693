"""Lowering of early exits: what the layers behind an exit still write when no token goes on.

The keys and values of layers that no token goes through come from the state the tokens left with. So the
stretch behind an exit is kept twice: as it is, and as the writes alone, with every layer passing on what it
got. Both read the same inputs; which of them runs is decided at its begin, on every call.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.graph import fake_mode_of
from tilewright.compiler.program import Program
from tilewright.compiler.repeats import cut, is_write, sink_writes

FILL = "tw_fill"
"""Mark on a begin: its `Fill`."""


@dataclass(frozen=True)
class Fill:
    """The writes of a stretch. The program's inputs: the entry, what `held` of the begin names, `given`."""

    program: Program
    given: tuple[fx.Node, ...]
    """Placeholders and buffers of the whole program."""


GATES = (
    ops.step_reuse_begin,
    ops.step_reuse_end,
    ops.step_reuse_end_beside,
    ops.early_exit_begin,
    ops.early_exit_end,
)


def is_gate(node: fx.Node) -> bool:
    """True for calls that stand around stretches which may not run."""
    return node.target in GATES


def split_exits(program: Program) -> list[Program]:
    """Put a `Fill` on every begin, and drop the selects where a call has one token: the gate says the same.

    Returns the programs of the fills. A program that cannot be cut into pieces, or that returns what a
    stretch makes, stays as it is: all of it is computed, and selected from.
    """
    begins = [n for n in program.graph.nodes if n.target is ops.early_exit_begin]
    if not begins or program.training or fake_mode_of(*program.graph.nodes) is None:
        return []
    sink_writes(program.graph)
    if not cut(program.graph, is_gate):
        return []
    nodes = list(program.graph.nodes)
    regions = {}
    for begin in begins:
        end = next(u for u in begin.users if u.target is ops.early_exit_end and u.args[1] is begin)
        regions[begin] = nodes[nodes.index(begin) + 1 : nodes.index(end)]
    if not all(_is_closed(begin, region) for begin, region in regions.items()):
        return []
    fills = [_fill(program, begin, region) for begin, region in regions.items()]
    if all(n.meta["val"].numel() == n.meta["val"].shape[-1] for n in begins):
        for node in nodes:
            if node.target is ops.early_exit_select:
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                program.graph.erase_node(node)
    return fills


def _fill(program: Program, begin: fx.Node, region: list[fx.Node]) -> Program:
    """The writes of a region as a program, its `Fill` on the begin."""
    passed = _passed(begin, region)
    needed, inside = set[fx.Node](), set(region)
    pending = [n for n in region if is_write(n)]
    while pending:
        node = pending.pop()
        needed.add(node)
        pending += [n for n in node.all_input_nodes if n in inside and n not in passed and n not in needed]
    graph = fx.Graph()
    order = [n for n in region if n in needed]
    read = dict.fromkeys(passed.get(a, a) for n in order for a in n.all_input_nodes)
    outer = [n for n in read if n not in inside and n is not begin]
    held = [n for n in outer if n.op == "call_function"]
    given = [n for n in outer if n.op != "call_function"]
    new: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate([begin, *held, *given]):
        new[node] = graph.placeholder(f"given_{i}")
        new[node].meta = dict(node.meta)
    for node in order:
        new[node] = graph.node_copy(node, lambda n: new[passed.get(n, n)])
    graph.output(())
    entry, active, _, gate, layers = begin.args
    begin.args = (entry, active, held, gate, layers)
    module = fx.GraphModule({}, graph)
    found = Program(module, [], [n.meta["val"] for n in (begin, *held, *given)], program.origin)
    begin.meta[FILL] = Fill(found, tuple(given))
    return found


def _passed(begin: fx.Node, region: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The stream behind each layer of a region -> what it is when no token goes on."""
    passed = {begin: begin}
    for node in region:
        if node.target is ops.early_exit_select:
            old = node.args[1]
            assert isinstance(old, fx.Node)
            passed[node] = passed[old]
    return passed


def _is_closed(begin: fx.Node, region: list[fx.Node]) -> bool:
    """Whether nothing of the region but the layers' outputs is read behind it."""
    inside, passed = set(region), _passed(begin, region)
    users = {u for node in region if node not in passed for u in node.users}
    return all(u in inside or u.target is ops.early_exit_end for u in users)
