"""Compute the linear layers that read one input together: Q, K and V; gate and up.

The weights stay where the model put them, so nothing is copied: a kernel reads them in one parallel
region. One fork and join instead of three is what a decode step on a CPU gains.
"""

from __future__ import annotations

import operator
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
from tilewright.compiler.graph import insert_like
from tilewright.compiler.schema import arguments


@graph_pass("fuse-projections", stage=Stage.LOWER, exactness=Exactness.BITWISE, trains=True)
class FuseProjections(GraphPass):
    """Group linear layers by their input.

    rewrite:
        q = linear(x, wq); k = linear(x, wk); v = linear(x, wv)
     -> q, k, v = linear_multi(x, [wq, wk, wv])
    """

    def apply(self, program: Program, log: PassLog) -> None:
        position = {n: i for i, n in enumerate(program.graph.nodes)}
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and node.target is ops.linear and isinstance(node.args[0], fx.Node):
                groups.setdefault(node.args[0], []).append(node)
        for members in groups.values():
            ready = [n for n in members if self._is_ready(n, members[0], position, log)]
            if len(members) < 2:
                log.refused(members[0], f"no other linear reads {members[0].args[0]}")
            elif len(ready) >= 2 and log.take(ready[0]):
                self._fuse(program, ready, log)
        log.finish(("tilewright::linear",))

    @staticmethod
    def _is_ready(node: fx.Node, first: fx.Node, position: dict[fx.Node, int], log: PassLog) -> bool:
        given = arguments(node)
        for name in ("weight", "bias"):
            source = given[name]
            if isinstance(source, fx.Node) and position[source] > position[first]:
                log.refused(node, f"its {name} {source.name} is computed after {first.name}", blame=source)
                return False
        return True

    @staticmethod
    def _fuse(program: Program, members: list[fx.Node], log: PassLog) -> None:
        given = [arguments(n) for n in members]
        args = (given[0]["x"], [g["weight"] for g in given], [g["bias"] for g in given])
        fused = insert_like(program.graph, members[0], ops.linear_multi, args, members[0])
        fused.meta["rewritten_by"] = (*members[0].meta.get("rewritten_by", ()), "fuse-projections")
        after = fused
        made = [fused]
        for i, member in enumerate(members):
            with program.graph.inserting_after(after):
                after = program.graph.call_function(operator.getitem, (fused, i))
            after.meta = dict(member.meta)
            made.append(after)
        log.applied(members[0], rule=f"{len(members)} linears", inserted=made, removed=members)
        for member, item in zip(members, made[1:], strict=True):
            member.replace_all_uses_with(item)
            program.graph.erase_node(member)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x = Tensor(2, 5, 12)
        weights = (Tensor(12, 12, weight=True), Tensor(4, 12, weight=True), Tensor(4, weight=True))

        def projections(x, wq, wk, bk):
            return ops.linear(x, wq), ops.linear(x, wk, bk)

        yield {}, Example(projections, (x, *weights))
        yield {}, Example(lambda x, w: ops.linear(x, w), (x, weights[0]), refusal="no other linear")
        late = Example(
            lambda x, w: (lambda a: (a, ops.linear(x, w * a.mean())))(ops.linear(x, w)), (x, weights[0])
        )
        yield {}, Example(late.model, late.inputs, refusal="computed after")
