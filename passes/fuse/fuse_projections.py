"""Compute the linear layers that read one input together: Q, K and V; gate and up.

The weights stay where the model put them, so nothing is copied: a kernel reads them in one parallel
region. One fork and join instead of three is what a decode step on a CPU gains.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
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
from tilewright.compiler.float_format import parse_format
from tilewright.compiler.graph import insert_like
from tilewright.compiler.schema import arguments
from tilewright.compiler.weight_format import WeightFormat

_FUSED: dict[Any, str] = {ops.linear: "weight", ops.quantized_linear: "packed"}
"""Ops that are grouped, and what each calls its weight. Quantized ones share one quantized input, too."""


@graph_pass("fuse-projections", stage=Stage.LOWER, exactness=Exactness.BITWISE, trains=True)
class FuseProjections(GraphPass):
    """Group linear layers by their input.

    rewrite:
        q = linear(x, wq); k = linear(x, wk); v = linear(x, wv)
     -> q, k, v = linear_multi(x, [wq, wk, wv])
    """

    def apply(self, program: Program, log: PassLog) -> None:
        position = {n: i for i, n in enumerate(program.graph.nodes)}
        groups: dict[tuple[fx.Node, str], list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and node.target in _FUSED and isinstance(node.args[0], fx.Node):
                form = str(arguments(node).get("format", ""))  # of quantized weights: one per group
                groups.setdefault((node.args[0], form), []).append(node)
        for members in groups.values():
            members = self._of_one_step(program, members, log)
            ready = [n for n in members if self._is_ready(n, members[0], position, log)]
            if len(members) < 2:
                text = arguments(members[0]).get("format")
                like = f" of format {text}" if text is not None else ""
                log.refused(members[0], f"no other linear{like} reads {members[0].args[0]}")
            elif len(ready) >= 2 and log.take(ready[0]):
                self._fuse(program, ready, log)
        log.finish(("tilewright::linear", "tilewright::quantized_linear"))

    @staticmethod
    def _is_ready(node: fx.Node, first: fx.Node, position: dict[fx.Node, int], log: PassLog) -> bool:
        given = arguments(node)
        for name in ("weight", "packed", "bias"):
            source = given.get(name)
            if isinstance(source, fx.Node) and position[source] > position[first]:
                log.refused(node, f"its {name} {source.name} is computed after {first.name}", blame=source)
                return False
        return True

    @staticmethod
    def _of_one_step(program: Program, members: list[fx.Node], log: PassLog) -> list[fx.Node]:
        """The members but those whose static activations have another step than the first one's."""
        given = [arguments(n) for n in members]
        form = parse_format(given[0]["format"]) if "format" in given[0] else None
        if not isinstance(form, WeightFormat) or not form.has_step:
            return members
        packed = [program.tensor_of(g["packed"]) if program.is_constant(g["packed"]) else None for g in given]
        known = [None if p is None else form.step_of(p) for p in packed]
        kept = [n for n, step in zip(members, known, strict=True) if step == known[0] and step is not None]
        for node in set(members) - set(kept):
            log.refused(node, "the step of its activations is not that of the first layer that reads them")
        return kept or members[:1]

    @staticmethod
    def _fuse(program: Program, members: list[fx.Node], log: PassLog) -> None:
        given = [arguments(n) for n in members]
        biases = [g["bias"] for g in given]
        args: tuple[Any, ...] = (given[0]["x"], [g[_FUSED[members[0].target]] for g in given], biases)
        target = ops.linear_multi
        if members[0].target is ops.quantized_linear:
            args = (*args, [g["rows"] for g in given], given[0]["format"])
            target = ops.quantized_linear_multi
        fused = insert_like(program.graph, members[0], target, args, members[0])
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
        form = WeightFormat(8, 0, "symmetric", "int8-token")
        packed = [form.pack(form.quantizer().quantize(torch.randn(n, 12) * 2)) for n in (12, 4)]

        def quantized(x, p, q):
            return (
                ops.quantized_linear(x, p, None, 12, form.text),
                ops.quantized_linear(x, q, None, 4, form.text),
            )

        yield {}, Example(quantized, (x, *packed))
        static = WeightFormat(8, 0, "symmetric", "int8-static")
        steps = [static.with_step(static.pack_weight(torch.randn(n, 12)), n / 1000) for n in (12, 4)]

        def two_steps(x, p, q):
            return (
                ops.quantized_linear(x, p, None, 12, static.text),
                ops.quantized_linear(x, q, None, 4, static.text),
            )

        yield {}, Example(two_steps, (x, *steps), refusal="the step of its activations is not")
        late = Example(
            lambda x, w: (lambda a: (a, ops.linear(x, w * a.mean())))(ops.linear(x, w)), (x, weights[0])
        )
        yield {}, Example(late.model, late.inputs, refusal="computed after")
