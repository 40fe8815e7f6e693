"""Re-ttention (arXiv:2505.22918): correct a sparse attention by what its last dense step left out.

At a `refresh` step both attentions run; kept are rho, the share of probability the layout keeps, and R, what
the rest contributed. At a `sparse` step the result is rho * sparse + R, where rho grows a little every step.
The phase of a step is chosen outside the program (`runtime.step_state`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

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
from tilewright.compiler.graph import insert_like
from tilewright.passes.attention import _hoisting_examples as small
from tilewright.passes.attention._correction import (
    Sparse,
    bytes_of,
    collected,
    corrected,
    dense_arguments,
    state_of,
    static_sparse,
)
from tilewright.passes.attention._sparse_call import Constants, insert_after

SLOT = "attention.correction"


@graph_pass(
    "statistical-reshape",
    stage=Stage.ATTENTION,
    exactness=Exactness.APPROXIMATE,
    paper="arXiv:2505.22918",
    after=("sliding-tile-attention", "hoist-token-permutation"),
    owns=(SLOT,),
)
class StatisticalReshape(GraphPass):
    """Correct every block-sparse attention whose layout is static.

    rewrite:
        block_sparse_attention(q, k, v, layout)[0]
     -> rho * block_sparse_attention(q, k, v, layout)[0] + R      at a sparse step
     -> the dense attention, and rho and R are kept              at a refresh step
    """

    phase: Literal["refresh", "sparse"] = "refresh"
    """What the program does."""
    growth: float = 0.04
    """Added to rho for every sparse step since the refresh."""
    use_ratio: bool = True
    """Off: only the difference is kept (rho is one), as DiTFastAttn does."""

    def validate(self) -> None:
        if not 0.0 <= self.growth <= 1.0:
            raise self.option_error("growth", "expected 0 to 1")

    def apply(self, program: Program, log: PassLog) -> None:
        constants, count, size = Constants(program), 0, 0
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is not ops.block_sparse_attention:
                continue
            if node.meta.get("tw_slots", {}).get(SLOT) == self.name:
                continue
            sparse = static_sparse(program, node)
            if isinstance(sparse, str):
                log.refused(node, sparse)
            elif log.take(node):
                made = self._correct(program, sparse, count, constants)
                log.claim_slots([node], {n: n for n in [node, *made]})
                log.applied(node, rule=self.phase, inserted=made, removed=[])
                count, size = count + 1, size + bytes_of(sparse)
        if count:
            log.note(f"{size} bytes of state between steps, per request and branch")
        log.finish(("tilewright::block_sparse_attention",))

    def _correct(self, program: Program, sparse: Sparse, layer: int, constants: Constants) -> list[fx.Node]:
        users = [u for u in sparse.node.users if u.target is operator.getitem and u.args[1] == 0]
        after, made = sparse.node, list[fx.Node]()

        def call(target: Any, *args: Any) -> fx.Node:
            nonlocal after
            after = insert_like(program.graph, after.next, target, args, sparse.node)
            made.append(after)
            return after

        def function(fn: Any, *inputs: fx.Node) -> list[fx.Node]:
            nonlocal after
            results, new = insert_after(program, after, fn, list(inputs))
            after = new[-1]
            made.extend(new)
            return results

        out = call(operator.getitem, sparse.node, 0)
        if self.phase == "refresh":
            lse = call(operator.getitem, sparse.node, 1)
            dense = call(ops.block_sparse_attention, *dense_arguments(sparse, constants))
            full, full_lse = call(operator.getitem, dense, 0), call(operator.getitem, dense, 1)
            kept = function(partial(collected, ratio=self.use_ratio), out, lse, full, full_lse)
            result = call(ops.step_state_put, full, kept, ["rho", "missing"], layer)
        else:
            slots = state_of(sparse).items()
            held = [call(ops.step_state_get, out, name, layer, *shape) for name, shape in slots]
            reshape = partial(corrected, growth=self.growth, ratio=self.use_ratio)
            (result,) = function(reshape, out, *held)
        for user in users:
            user.replace_all_uses_with(result)
            program.graph.erase_node(user)
        return made

    def reference(self, program: Program) -> None:
        """A refresh step gives the dense attention."""
        constants = Constants(program)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.target is ops.block_sparse_attention:
                sparse = static_sparse(program, node)
                if isinstance(sparse, Sparse) and self.phase == "refresh":
                    node.args, node.kwargs = tuple(dense_arguments(sparse, constants)), {}

    def exact_limit(self) -> StatisticalReshape:
        return replace(self, phase="refresh")

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x, table, weight = Tensor(2, 14, 8), Tensor(1, 12, 1, 4), Tensor(8, 8, weight=True)
        inputs = (x, table, table, weight, weight)
        yield {}, Example(small.two_dense_layers, inputs, count=2)
        yield {"use_ratio": False}, Example(small.two_dense_layers, inputs, count=2)
        computed = (x, table, table, weight, weight, Tensor(1, 2))
        yield {}, Example(small.computed_groups, computed, refusal="head_group is computed in the call")
