"""Drop what does nothing and bring views, casts and arguments to one spelling."""

from __future__ import annotations

from collections.abc import Iterator

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, Tensor, graph_pass
from tilewright.compiler.canonicalize import canonicalize


@graph_pass("eliminate-noop", stage=Stage.NORMALIZE, exactness=Exactness.BITWISE, trains=True)
class EliminateNoop(GraphPass):
    """Remove casts, copies, views and arithmetic that change nothing; merge consecutive views.

    rewrite:
        x.to(x.dtype), x.contiguous(), dropout(x, 0.0), x * 1, view(view(x))
     -> x, ..., view(x)
    """

    def apply(self, program: Program, log: PassLog) -> None:
        first = next(n for n in reversed(program.graph.nodes) if n.op == "output")
        if not log.take(first):
            log.finish(())
            return
        counts = canonicalize(program.module, training=program.training)
        for rule, count in sorted(counts.items()):
            if count:
                log.applied(first, rule=f"{rule} x{count}")
        if not any(counts.values()):
            log.note("the program is in canonical form already")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x = Tensor(2, 3, 5)
        yield {}, Example(lambda x: (x.contiguous() * 1 + x.view(6, 5).view(2, 3, 5)).float(), (x,), count=0)
