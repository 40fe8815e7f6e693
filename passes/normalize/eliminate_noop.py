"""Drop what does nothing and bring views, casts and arguments to one spelling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, Tensor, graph_pass
from tilewright.compiler.canonicalize import canonicalize
from tilewright.compiler.graph_schema import same


@graph_pass("eliminate-noop", stage=Stage.NORMALIZE, exactness=Exactness.BITWISE, trains=True)
class EliminateNoop(GraphPass):
    """Remove casts, copies, views and arithmetic that change nothing; merge consecutive views.

    rewrite:
        x.to(x.dtype), x.contiguous(), dropout(x, 0.0), x * 1, view(view(x))
     -> x, ..., view(x)
    """

    def apply(self, program: Program, log: PassLog) -> None:
        graph = program.graph
        if not log.take(next(n for n in reversed(graph.nodes) if n.op == "output")):
            log.finish(())
            return
        before = {n: (n.args, n.kwargs) for n in graph.nodes}
        counts = canonicalize(program.module, training=program.training)
        for removed, inserted in _gaps(list(before), list(graph.nodes)):
            for i, node in enumerate(removed):
                new = inserted if i == 0 else []
                log.applied(node, rule="respelled" if new else "dropped", removed=[node], inserted=new)
            if not removed:
                log.applied(inserted[0], rule="respelled", inserted=inserted)
        for node in graph.nodes:
            if node in before and not _same_call(before[node], (node.args, node.kwargs)):
                log.applied(node, rule="arguments")
        log.note(", ".join(f"{rule} x{n}" for rule, n in sorted(counts.items()) if n) or "nothing to drop")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        def unchanged(x):
            return torch.tanh((x.contiguous() * 1 + x.view(6, 5).view(2, 3, 5)).float())

        yield {}, Example(unchanged, (Tensor(2, 3, 5),), count=0)
        yield {}, Example(unchanged, (Tensor(2, 3, 5),), count=4, raw=True)


def _gaps(before: list[fx.Node], after: list[fx.Node]) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """(nodes that went, nodes that came) between each pair of neighbours that stayed, where there are any."""
    old, new = set(before), set(after)
    gaps: dict[fx.Node | None, tuple[list[fx.Node], list[fx.Node]]] = {}
    for side, (nodes, others) in enumerate(((before, new), (after, old))):
        behind: fx.Node | None = None
        for node in nodes:
            if node in others:
                behind = node
            else:
                gaps.setdefault(behind, ([], []))[side].append(node)
    yield from gaps.values()


def _same_call(one: Any, other: Any) -> bool:
    """Whether two pairs of args and kwargs differ in the nodes they read at most."""
    if one[0] is other[0] and one[1] is other[1]:
        return True
    blank = [fx.node.map_arg(call, lambda node: None) for call in (one, other)]
    return same(blank[0], blank[1])
