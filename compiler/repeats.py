"""Stretches of a graph that repeat: cut out, so that one compiled function serves all of them.

A transformer of thirty layers lowers to thirty copies of one stretch of nodes that differ in nothing but the
weights they read. Compiling every copy is most of what a whole-graph compiler does with such a model.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from tilewright.compiler.graph import mutates
from tilewright.compiler.storage_alias import Aliases

MIN_COUNT = 3
MIN_SAVED = 60
"""Nodes that need not be compiled again: below, cutting costs more calls than it saves compilation."""
_LIST_CROSSING = 1_000


@dataclass(frozen=True)
class Piece:
    """A stretch of a graph that is compiled as one function of `inputs` that returns `outputs`."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    instance_of: int
    """Position of the first piece with the same code: its own position, unless it is a repetition."""
    alone: bool = False
    """One call of nodes alone that needs no compilation, and the getitems of its results; `inputs` leaves out
    its constants."""


@dataclass(frozen=True)
class Run:
    """`count` windows of `period` calls each that have the same code."""

    start: int
    period: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.period * self.count

    @property
    def saved(self) -> int:
        return self.period * (self.count - 1)


def sink_writes(graph: fx.Graph) -> None:
    """Move each write of state (`copy_` to an input) to right behind the last reader of the old value.

    Capture leaves all writes at the end of the graph. A write next to what it belongs to falls into the same
    stretch, where it can be done in place.
    """
    aliases = Aliases(graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    last_reader: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if node.op == "call_function" and not is_write(node):
                last_reader[aliases.leader(source)] = node
    for node in [n for n in graph.nodes if is_write(n)]:
        target, value = node.args[0], node.args[1]
        if node.users or not isinstance(target, fx.Node) or not isinstance(value, fx.Node):
            continue
        after = [n for n in (value, last_reader.get(aliases.leader(target))) if n is not None]
        anchor = max(after, key=lambda n: position[n])
        if anchor.op == "call_function":
            anchor.append(node)


def is_write(node: fx.Node) -> bool:
    """True for the write-back of declared state."""
    return node.target is torch.ops.aten.copy_.default and _is_input(node.args[0])


def cut(graph: fx.Graph, is_alone: Callable[[fx.Node], bool] = lambda _: False) -> list[Piece]:
    """The graph as pieces in order, repeated stretches as instances of one; empty when nothing repeats.

    A call for which `is_alone` holds is a piece of its own; it may write to its arguments. Also empty when
    any other node writes to anything but declared state, or when a view of state would have to pass from one
    piece to another: such graphs are compiled whole.
    """
    calls = [n for n in graph.nodes if n.op == "call_function"]
    if any(n.op not in ("placeholder", "get_attr", "call_function", "output") for n in graph.nodes):
        return []
    if any(mutates(n) and not is_write(n) and not is_alone(n) for n in calls):
        return []
    single = [i for i, n in enumerate(calls) if is_alone(n)]
    runs = find_runs(calls, is_alone)
    if not runs and not single:
        return []
    runs += [Run(i, _results_end(calls, i) - i, 1) for i in single]
    pieces = list(_pieces(calls, sorted(runs, key=lambda r: r.start), set(single)))
    return [] if _leaks(graph, pieces) else pieces


def _results_end(calls: Sequence[fx.Node], at: int) -> int:
    """Position behind a call and the getitems of its results, which follow it."""
    end = at + 1
    while end < len(calls) and calls[end].target is operator.getitem and calls[end].args[0] is calls[at]:
        end += 1
    return end


def _gaps(calls: Sequence[fx.Node], single: Sequence[int]) -> list[tuple[int, int]]:
    """The stretches between calls that stand alone."""
    ends = [0, *(_results_end(calls, i) for i in single)]
    return list(zip(ends, [*single, len(calls)], strict=True))


def find_runs(calls: Sequence[fx.Node], is_alone: Callable[[fx.Node], bool]) -> list[Run]:
    """The stretches of these calls that repeat, most saving first where they lie between the same calls that
    stand alone."""
    pending = _gaps(calls, [i for i, n in enumerate(calls) if is_alone(n)])
    keys = keys_of(calls)
    last = _last_uses(calls)
    found: list[Run] = []
    while pending:
        low, high = pending.pop()
        run = _best_run(calls, keys, last, low, high)
        if run is not None:
            found.append(run)
            pending += [(low, run.start), (run.end, high)]
    return found


def keys_of(calls: Sequence[fx.Node]) -> list[int]:
    """A number per node: equal for calls of one target with equal constants and values of equal layout."""
    numbers: dict[Any, int] = {}
    rows = []
    for node in calls:
        constants = _render((node.args, node.kwargs))
        rows.append(
            numbers.setdefault((node.target, constants, layout_of(node.meta.get("val"))), len(numbers))
        )
    return rows


def _render(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return fx.Node, layout_of(value.meta.get("val"))
    if isinstance(value, (list, tuple)):
        return tuple(_render(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _render(v)) for k, v in value.items())
    return type(value), str(value)


def layout_of(value: Any) -> Any:
    """What compiled code may depend on: shape, strides, offset, dtype, device; structure for lists."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            return id(value)
        sizes = tuple(str(s) for s in (*value.shape, *value.stride(), value.storage_offset()))
        return sizes, value.dtype, str(value.device), value.requires_grad
    if isinstance(value, (list, tuple)):
        return tuple(layout_of(v) for v in value)
    return type(value), str(value)


def _last_uses(calls: Sequence[fx.Node]) -> list[int]:
    position = {n: i for i, n in enumerate(calls)}
    return [max((position.get(u, len(calls)) for u in n.users), default=i) for i, n in enumerate(calls)]


def _best_run(
    calls: Sequence[fx.Node], keys: Sequence[int], last: Sequence[int], low: int, high: int
) -> Run | None:
    """The run inside [low, high) that saves most."""
    best: Run | None = None
    for period in _periods(keys, low, high):
        begin = low
        for i in range(low, high - period + 1):
            if i < high - period and keys[i] == keys[i + period]:
                continue
            covered = i + period - begin
            if (covered // period - 1) * period > (best.saved if best else MIN_SAVED - 1):
                run = _place(calls, last, begin, i + period, period)
                if run is not None and run.saved > (best.saved if best else MIN_SAVED - 1):
                    best = run
            begin = i + 1
    return best


def _periods(keys: Sequence[int], low: int, high: int) -> list[int]:
    """Likely periods: frequent distances between equal neighbours, most frequent first."""
    seen: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for i in range(low, high):
        if keys[i] in seen:
            distances[i - seen[keys[i]]] += 1
        seen[keys[i]] = i
    return [d for d, _ in distances.most_common(24)]


def _place(calls: Sequence[fx.Node], last: Sequence[int], begin: int, end: int, period: int) -> Run | None:
    """Where to cut a periodic stretch: most repetitions, then fewest values that cross a cut."""

    def crossing(cut_at: int) -> int:
        crossed = [i for i in range(begin, cut_at) if last[i] >= cut_at]
        lists = sum(isinstance(calls[i].meta.get("val"), (list, tuple)) for i in crossed)
        return len(crossed) + _LIST_CROSSING * lists

    full = (end - begin) // period
    slack = end - begin - full * period
    choices = [(begin + s, full) for s in range(slack + 1)]
    choices += [(begin + s, full - 1) for s in range(slack + 1, period)]
    ranked = sorted(choices, key=lambda c: (crossing(c[0] + period) + (full - c[1]), c[0]))
    for start, count in ranked[:4]:
        count = _isomorphic(calls, start, period, count)
        if count >= MIN_COUNT:
            return Run(start, period, count)
    return None


def _isomorphic(calls: Sequence[fx.Node], start: int, period: int, count: int) -> int:
    """How many windows from `start` on have exactly the code of the first."""
    first = calls[start : start + period]
    for k in range(1, count):
        window = calls[start + k * period : start + (k + 1) * period]
        if correspondence(first, window) is None:
            return k
    return count


def correspondence(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> dict[fx.Node, fx.Node] | None:
    """What each node read or computed by `first` is in `second`; None when the two compute differently."""
    inside, other = {n: i for i, n in enumerate(first)}, {n: i for i, n in enumerate(second)}
    partner = dict(zip(first, second, strict=True))
    written: set[fx.Node] = set()
    for a, b in zip(first, second, strict=True):
        for x, y in zip(arguments_of(a), arguments_of(b), strict=True):
            if inside.get(x) != other.get(y) or partner.setdefault(x, y) is not y:
                return None
        if is_write(a):
            written.add(a.args[0])  # type: ignore[arg-type]
    images = [y for x, y in partner.items() if x not in inside]
    if any(images.count(partner[w]) != 1 for w in written):
        return None
    return partner


def arguments_of(node: fx.Node) -> list[fx.Node]:
    """Node arguments in order, repeated ones included."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _pieces(calls: Sequence[fx.Node], runs: Sequence[Run], single: set[int]) -> Iterator[Piece]:
    number, at = 0, 0
    for run in [*runs, Run(len(calls), 0, 0)]:
        if run.start > at:
            yield _piece(calls[at : run.start], number)
            number += 1
        windows = [calls[run.start + k * run.period :][: run.period] for k in range(run.count)]
        if run.start in single:
            values = tuple(arguments_of(calls[run.start]))  # as the call has them: one value may stand twice
            yield replace(_piece(windows[0], number), inputs=values, alone=True)
            number += 1
        else:
            for piece in _instances(windows, number):
                yield piece
                number += 1
        at = run.end


def _piece(nodes: Sequence[fx.Node], number: int) -> Piece:
    inside = set(nodes)
    outputs = tuple(n for n in nodes if any(u not in inside for u in n.users))
    return Piece(tuple(nodes), _inputs(nodes), outputs, number)


def _inputs(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    inside = set(nodes)
    return tuple(dict.fromkeys(x for n in nodes for x in arguments_of(n) if x not in inside))


def _instances(windows: Sequence[Sequence[fx.Node]], number: int) -> Iterator[Piece]:
    """Windows of one run: every one returns what any of them has to."""
    if not windows:
        return
    places: set[int] = set()
    for window in windows:
        inside = set(window)
        places.update(i for i, n in enumerate(window) if any(u not in inside for u in n.users))
    first = windows[0]
    inputs = _inputs(first)
    for window in windows:
        partner = correspondence(first, window)
        assert partner is not None, "the run was checked"
        given = tuple(partner.get(n, n) for n in inputs)
        yield Piece(tuple(window), given, tuple(window[i] for i in sorted(places)), number)


def _leaks(graph: fx.Graph, pieces: Sequence[Piece]) -> bool:
    """True when a list, or a view of an input that is written, passes from one piece to another. What the
    program returns may be such a view."""
    crossing = [n for p in pieces for n in p.outputs]
    if any(isinstance(n.meta.get("val"), (list, tuple)) for n in crossing):
        return True
    aliases = Aliases(graph)
    written = {aliases.leader(n.args[0]) for n in graph.nodes if is_write(n)}  # type: ignore[arg-type]
    return any(aliases.leader(n) in written and any(u.op != "output" for u in n.users) for n in crossing)


def _is_input(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "placeholder"
