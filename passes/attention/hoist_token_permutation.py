"""Move a token order that all heads and layers share out of the whole transformer.

Attention, and every op that treats tokens alike, commutes with a permutation of the tokens (arXiv:2502.04507
applies one per layer; this makes it one per forward). Tokens are permuted once where they enter, rotary
tables and whatever else is added per token with them, and put back once where they leave.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from tilewright.compiler import (
    Exactness,
    Example,
    GraphPass,
    PassLog,
    Program,
    Stage,
    Tensor,
    graph_pass,
    ops,
)
from tilewright.compiler.dataflow import Flow
from tilewright.passes.attention import _hoisting_examples as small
from tilewright.passes.attention._hoisting import Order, permute_everything, plan_hoisting, shared_order

block_sparse = ops.block_sparse_attention


@graph_pass(
    "hoist-token-permutation",
    stage=Stage.ATTENTION,
    exactness=Exactness.ROUNDING,
    paper="arXiv:2502.04507",
    after=("sliding-tile-attention",),
)
class HoistTokenPermutation(GraphPass):
    """Take the index maps out of block-sparse attentions that share one.

    rewrite:
        y = f(x, tables); f uses block_sparse_attention(..., src_q=p, src_k=p) in every layer
     -> y = f(x[p], tables[p])[p^-1]; f uses block_sparse_attention(..., src_q=None, src_k=None)
    """

    def apply(self, program: Program, log: PassLog) -> None:
        nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target is block_sparse]
        ordered: list[fx.Node] = []
        order: Order | None = None
        for node in nodes:
            found = shared_order(program, node)
            if isinstance(found, str):
                log.refused(node, found)
            elif order is not None and not order.equals(found):
                log.refused(node, f"its token order differs from that of {ordered[0].name}")
            else:
                order = order or found
                ordered.append(node)
        if order is not None and len(ordered) < 2:
            log.refused(
                ordered[0], "it is the only one in its order: hoisting would move as much as it saves"
            )
        elif order is not None:
            self._hoist(program, ordered, order, log)
        log.finish(("tilewright::block_sparse_attention",))

    def _hoist(self, program: Program, nodes: list[fx.Node], order: Order, log: PassLog) -> None:
        plan = plan_hoisting(Flow(program.graph), nodes, order)
        if isinstance(plan, str):
            log.refused(nodes[0], plan)
        elif log.take(nodes[0]):
            made = permute_everything(program, plan, order)
            log.applied(nodes[0], rule=plan.summary(), inserted=made, removed=[])

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, table, weight = Tensor(2, 14, 8), Tensor(1, 12, 1, 4), Tensor(8, 8, weight=True)
        once, twice = (x, table, table, weight), (x, table, table, weight, weight)
        yield {}, Example(small.two_layers, (*twice, weight))
        yield {}, Example(small.one_layer, once, refusal="the only one in its order")
        yield {}, Example(small.mixing_model, twice, refusal="between the layers")
        yield {}, Example(small.per_head, twice, refusal="order of its own for each")
        yield {}, Example(small.two_orders, twice, refusal="differs from that of")
