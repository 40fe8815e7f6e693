"""The first of several equal blocks, made as compact as the others are.

Capture computes what all blocks share (tables of positions, a projection batched over the layers) where the
first block needs it: between the first block's own calls. Such a block is no copy of the second, although all
it computes itself is. What is shared moves in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import fx

from tilewright.compiler.repeats import Run, arguments_of, correspondence, find_runs, is_write, keys_of
from tilewright.compiler.storage_alias import Aliases


def gather_first_instances(graph: fx.Graph, is_alone: Callable[[fx.Node], bool]) -> int:
    """Move what is shared in front of the block before each repeated stretch; the number of blocks gained.

    The order of the block's calls stays, and so does every write of state and every read of what is written.
    """
    runs = find_runs(_calls(graph), is_alone)
    for gained in range(len(runs)):
        if not _gather_one(graph, is_alone):
            return gained
    return len(runs)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function"]


def _gather_one(graph: fx.Graph, is_alone: Callable[[fx.Node], bool]) -> bool:
    calls = _calls(graph)
    numbers = keys_of(calls)
    keys = dict(zip(calls, numbers, strict=True))
    for run in find_runs(calls, is_alone):
        for shifted in _phases(numbers, run):
            block = _before(calls, keys, shifted)
            strange = _between(calls, block, shifted) if block else []
            if strange and _may_move(graph, strange, block, is_alone):
                for node in strange:
                    block[0].prepend(node)
                return True
    return False


def _phases(keys: Sequence[int], run: Run) -> Iterator[Run]:
    """The run, and as many windows that begin later, for as long as what follows it is like its begin."""
    for d in range(run.period):
        yield replace(run, start=run.start + d)
        last = run.end + d
        if last >= len(keys) or keys[last] != keys[last - run.period]:
            return


def _before(calls: Sequence[fx.Node], keys: dict[fx.Node, int], run: Run) -> list[fx.Node]:
    """The calls before a run that compute, in order, what each of its windows does; empty when none do."""
    first, second = (calls[run.start + k * run.period :][: run.period] for k in (0, 1))
    place = {n: i for i, n in enumerate(first)}
    position = {n: i for i, n in enumerate(calls[: run.start])}
    found: dict[int, fx.Node] = {}
    pending = [
        (place[y], x)
        for a, b in zip(first, second, strict=True)
        for x, y in zip(arguments_of(a), arguments_of(b), strict=True)
        if y in place
    ]
    while pending:
        k, node = pending.pop()
        if node not in position or keys[node] != keys[first[k]] or found.setdefault(k, node) is not node:
            return []
        pending += [
            (place[x], y)
            for x, y in zip(arguments_of(first[k]), arguments_of(node), strict=True)
            if x in place and found.get(place[x]) is not y
        ]
        if not pending:  # what nothing of the block reads: writes, and results of the program
            missing = ((i, _like(n, place, found, keys)) for i, n in enumerate(first) if i not in found)
            pending = [(i, n) for i, n in missing if n is not None][:1]
    block = [found[i] for i in sorted(found)]
    if len(block) < run.period or correspondence(first, block) is None:
        return []
    at = [position[n] for n in block]
    return block if all(a < b for a, b in zip(at, at[1:], strict=False)) else []


def _like(
    node: fx.Node, place: dict[fx.Node, int], found: dict[int, fx.Node], keys: dict[fx.Node, int]
) -> fx.Node | None:
    """The one call that reads in the block found so far what `node` reads in its own."""
    inner = [place.get(x) for x in arguments_of(node)]
    known = next((found[i] for i in inner if i is not None and i in found), None)
    readers = [] if known is None else [n for n in known.users if keys.get(n) == keys[node]]
    fitting = [
        n
        for n in readers
        if n not in found.values()
        and all(i is None or found.get(i) is x for i, x in zip(inner, arguments_of(n), strict=True))
    ]
    return fitting[0] if len(fitting) == 1 else None


def _between(calls: Sequence[fx.Node], block: Sequence[fx.Node], run: Run) -> list[fx.Node]:
    own = set(block)
    return [n for n in calls[calls.index(block[0]) : run.start] if n not in own]


def _may_move(
    graph: fx.Graph, strange: Sequence[fx.Node], block: Sequence[fx.Node], is_alone: Callable[[fx.Node], bool]
) -> bool:
    """Whether calls that stand inside of a block may stand before it: they read nothing of it, and neither
    write nor read state that is written."""
    aliases = Aliases(graph)
    written = {aliases.leader(n.args[0]) for n in graph.nodes if is_write(n)}  # type: ignore[arg-type]
    own = set(block)
    return not any(
        is_write(n) or is_alone(n) or any(x in own or aliases.leader(x) in written for x in n.all_input_nodes)
        for n in strange
    )
