"""Find the one rewrite that breaks parity: first the pass, then the rule and node, then a repro of a few
nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from tilewright.compiler.diagnostics import ParityError, TilewrightError
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import Pipeline, RunOptions, run_pass
from tilewright.compiler.program import Program

Accept = Callable[[Program], bool]
"""True when a rewritten program still agrees with the original."""


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
    with the
    truth. ParityError when even the untouched program is not accepted.
    """
    search = _Search(make, pipeline, accept)
    if search.fails(0):
        raise ParityError(
            "the program disagrees before any rewrite", remedy="the fault is not in the pipeline"
        )
    total = search.total()
    if total is not None and not search.fails(total):
        return None
    low, high = 0, total if total is not None else search.first_error()
    while high - low > 1:
        middle = (low + high) // 2
        if search.fails(middle):
            high = middle
        else:
            low = middle
    return search.culprit(high)


class _Search:
    def __init__(self, make: Callable[[], Program], pipeline: Pipeline, accept: Accept) -> None:
        self._make = make
        self._pipeline = pipeline
        self._accept = accept
        self._known: dict[int, bool] = {}
        self.runs = 0

    def _run(self, limit: int | None) -> tuple[Program, Fuel, str]:
        self.runs += 1
        program, fuel = self._make(), Fuel(limit)
        for p in self._pipeline.passes:
            try:
                run_pass(p, program, RunOptions(replay=False), fuel)
            except TilewrightError as error:
                return program, fuel, error.line()
        program.module.recompile()
        return program, fuel, ""

    def total(self) -> int | None:
        """Rewrites of a full run, None when it raises."""
        _, fuel, error = self._run(None)
        self._spent = fuel.spent
        return None if error else fuel.spent

    def first_error(self) -> int:
        return max(self._spent, 1)

    def fails(self, limit: int) -> bool:
        if limit not in self._known:
            program, _, error = self._run(limit)
            self._known[limit] = bool(error) or not self._accept(program)
        return self._known[limit]

    def culprit(self, number: int) -> Culprit:
        """Run up to the rewrite before the guilty one, then step over it and describe it."""
        program, fuel = self._make(), Fuel(number)
        for p in self._pipeline.passes:
            held = fuel.spent
            copies = Region(program.graph)
            try:
                report = run_pass(p, program, RunOptions(replay=False), fuel)
                failure = "wrong result"
            except TilewrightError as error:
                failure = error.line()
                return Culprit(p.name, "", "", "", number, self.runs, "", "", 0, failure)
            if fuel.spent == number and fuel.spent > held and report.applied:
                application = report.applied[-1]
                old = copies.code(application.removed)
                new = Region(program.graph).code(application.inserted)
                size = max(len(application.removed), len(application.inserted))
                where = application.rule, application.node, application.source
                return Culprit(p.name, *where, number, self.runs, old, new, size, failure)
        raise ParityError(
            "the failing rewrite could not be reproduced", remedy="make() must be deterministic"
        )


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
    value = node.meta.get("val")
    return (
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if hasattr(value, "shape")
        else "value"
    )
