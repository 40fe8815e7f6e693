"""Find the one rewrite that breaks parity: first the pass, then the rule and node, then a repro of a few
nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from tilewright.compiler.diagnostics import ParityError, TilewrightError
from tilewright.compiler.log import Fuel
from tilewright.compiler.module_paths import source_line
from tilewright.compiler.pipeline import Pipeline, RunOptions, run_pass
from tilewright.compiler.program import Program

Accept = Callable[[Program], bool]
"""True when a rewritten program still agrees with the original; an error means that it does not."""

WRONG = "wrong result"


@dataclass(frozen=True)
class Culprit:
    """The first rewrite after which the program no longer agrees."""

    pass_name: str
    rule: str
    node: str
    source: str
    application: int
    """Number of the rewrite over the whole pipeline, from 1."""
    runs: int
    """How many times the pipeline was run to find it."""
    before: str
    """Readable code of the region as it was; at most the matched nodes."""
    after: str
    nodes: int
    """Nodes of the repro: the larger of the two regions."""
    failure: str
    """What went wrong: a wrong result, or the error that the rewrite raised."""


def bisect(make: Callable[[], Program], pipeline: Pipeline, accept: Accept) -> Culprit | None:
    """Binary search over the number of rewrites; None when the whole pipeline agrees.

    make: a fresh normalized program each time, the same every time. accept: compares a rewritten program
    with the truth. ParityError when even the untouched program is not accepted.
    """
    search = _Search(make, pipeline, accept)
    if search.fails(0):
        raise ParityError(
            f"the program disagrees before any rewrite: {search.failure(0)}",
            remedy="the fault is not in the pipeline",
        )
    low, high = 0, search.total()
    if not search.fails(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if search.fails(middle):
            high = middle
        else:
            low = middle
    return search.culprit(high)


class _Search:
    """Runs of the pipeline with less and less fuel, and what came of each."""

    def __init__(self, make: Callable[[], Program], pipeline: Pipeline, accept: Accept) -> None:
        self._make = make
        self._pipeline = pipeline
        self._accept = accept
        self._known: dict[int, str] = {}
        self.runs = 0

    def _run(self, limit: int | None) -> tuple[int, str]:
        """(rewrites done, what went wrong or an empty text) of one run."""
        self.runs += 1
        program, fuel = self._make(), Fuel(limit)
        try:
            for p in self._pipeline.passes:
                run_pass(p, program, RunOptions(replay=False), fuel)
            program.module.recompile()
            return fuel.spent, "" if self._accept(program) else WRONG
        except Exception as error:  # what a rewrite raises, now or when its result runs, is looked for
            return fuel.spent, _line(error)

    def total(self) -> int:
        """Rewrites of a full run; of one that raises, those up to the error."""
        spent, failure = self._run(None)
        self._known[spent] = failure
        return spent

    def fails(self, limit: int) -> bool:
        return bool(self.failure(limit))

    def failure(self, limit: int) -> str:
        """What goes wrong with so many rewrites; empty when nothing does."""
        if limit not in self._known:
            self._known[limit] = self._run(limit)[1]
        return self._known[limit]

    def culprit(self, number: int) -> Culprit:
        """Run up to the guilty rewrite and describe it."""
        self.runs += 1
        program, fuel = self._make(), Fuel(number)
        for p in self._pipeline.passes:
            held, old = fuel.spent, Region(program.graph)
            try:
                report = run_pass(p, program, RunOptions(replay=False), fuel)
            except Exception as error:  # named in the result
                return self._raised(p.name, number, fuel, old, _line(error))
            if fuel.spent == number and fuel.spent > held and report.applied:
                done = report.applied[-1]
                size = max(len(done.removed), len(done.inserted))
                before = old.code(done.removed or [done.node, *done.inserted])
                after = Region(program.graph).code(done.inserted)
                where = done.rule, done.node, done.source, number, self.runs
                return Culprit(p.name, *where, before, after, size, self._known[number])
        raise ParityError(
            "the failing rewrite could not be reproduced", remedy="make() must be deterministic"
        )

    def _raised(self, name: str, number: int, fuel: Fuel, old: Region, failure: str) -> Culprit:
        """The rewrite that the last fuel went to raised an error, so there is nothing to see after it."""
        assert fuel.last is not None, "the untouched program was accepted, so some rewrite took fuel"
        node, m = fuel.last
        matched = [n.name for n in (m.nodes if m is not None else (node,))]
        where = m.form if m is not None else "", node.name, source_line(node), number, self.runs
        return Culprit(name, *where, old.code(matched), "", len(matched), failure)


def _line(error: Exception) -> str:
    """An error as one line, with its class when it is not ours."""
    if isinstance(error, TilewrightError):
        return error.line()
    return " ".join(f"{type(error).__name__}: {error}".split())


class Region:
    """Prints named nodes of a graph as a small function, inputs first."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = fx.Graph()
        done: dict[fx.Node, fx.Node] = {}
        self._graph.graph_copy(graph, done)
        self._nodes = {old.name: new for old, new in done.items()}

    def code(self, names: list[str]) -> str:
        """Python-like text of the nodes; values from outside are parameters with their shape."""
        inside = {self._nodes[n] for n in names if n in self._nodes}
        outside: dict[fx.Node, None] = {}
        lines = []
        for node in self._graph.nodes:
            if node in inside:
                outside.update({i: None for i in node.all_input_nodes if i not in inside})
                lines.append(f"    {node.name} = {node.target}{node.args!r}")
        shapes = [f"{n.name}: {_shape(n)}" for n in outside]
        return "\n".join([f"def region({', '.join(shapes)}):", *lines])


def _shape(node: fx.Node) -> str:
    value: Any = node.meta.get("val")
    return (
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if hasattr(value, "shape")
        else "value"
    )
