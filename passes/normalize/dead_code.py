"""Remove what nobody uses."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, Tensor, graph_pass
from tilewright.compiler.graph import is_impure


@graph_pass("dead-code", stage=Stage.NORMALIZE, exactness=Exactness.BITWISE, trains=True)
class DeadCode(GraphPass):
    """Remove pure nodes without users; an attention with zero dropout is pure although torch tags it random.

    rewrite:
        a = f(x); b = g(x); return b
     -> b = g(x); return b
    """

    def apply(self, program: Program, log: PassLog) -> None:
        for node in reversed(list(program.graph.nodes)):
            if node.users or node.op == "output":
                continue
            if is_impure(node):
                if node.op == "call_function" and node.meta.get("val") is not None:
                    log.refused(node, "it is not used but it writes, checks or draws random numbers")
            elif log.take(node):
                log.applied(node, removed=[node])
                program.graph.erase_node(node)
        log.finish(("unused computation",))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x = Tensor(2, 3, 4, 8)

        def unused_attention(x):
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
            return x + 2

        def unused_draw(x):
            torch.nn.functional.dropout(x, 0.5)
            return x + 2

        yield {}, Example(unused_attention, (x,), raw=True)
        yield {}, Example(unused_draw, (x,), refusal="random", raw=True)
