"""Compute at compile time what depends on no input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, Tensor, graph_pass
from tilewright.compiler.graph import is_impure


@graph_pass("fold-constants", stage=Stage.NORMALIZE, exactness=Exactness.BITWISE, trains=True)
class FoldConstants(GraphPass):
    """Replace a computation over constants by its result, held as a buffer.

    rewrite:
        arange(8) < 3
     -> constant [True, True, True, False, ...]
    """

    max_elements: int = 1 << 18
    """Larger results stay computed: a buffer costs memory for the program's whole life."""

    def validate(self) -> None:
        if self.max_elements < 1:
            raise self.option_error("max_elements", "it must be at least 1")

    def apply(self, program: Program, log: PassLog) -> None:
        constant: dict[fx.Node, bool] = {}
        for node in program.graph.nodes:
            constant[node] = self._is_constant(node, constant)
        for node in [n for n in constant if constant[n]]:
            if node.op != "call_function" or not node.all_input_nodes or all(constant[u] for u in node.users):
                continue
            size = node.meta["val"].numel()
            if size > self.max_elements:
                log.refused(node, f"its {size} elements are more than {self.max_elements}")
            elif log.take(node):
                self._fold(program, node, log)
        log.finish(("computation on constants",))

    @staticmethod
    def _is_constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
        value = node.meta.get("val")
        if node.op == "get_attr":
            return "derived" not in node.meta
        if (
            node.op != "call_function"
            or not isinstance(node.target, torch._ops.OpOverload)
            or is_impure(node)
        ):
            return False
        if not isinstance(value, torch.Tensor) or not all(type(s) is int for s in value.shape):
            return False
        if "empty" in node.target._schema.name or torch.Tag.nondeterministic_seeded in node.target.tags:
            return False
        return all(known[i] for i in node.all_input_nodes)

    def _fold(self, program: Program, node: fx.Node, log: PassLog) -> None:
        values: dict[fx.Node, torch.Tensor] = {}
        with torch.no_grad():
            result = _evaluate(program, node, values)
        name = program.hold("tw_constant_", result.clone())
        with program.graph.inserting_before(node):
            new = program.graph.get_attr(name)
        new.meta = {k: node.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in node.meta}
        log.applied(node, inserted=[new], removed=[node])
        node.replace_all_uses_with(new)

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x = Tensor(8)

        def masked(x):
            return x * (torch.arange(8) < 3)

        yield {}, Example(masked, (x,))
        yield {"max_elements": 4}, Example(masked, (x,), refusal="more than 4")


def _evaluate(program: Program, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    if node not in values:
        if node.op == "get_attr":
            values[node] = program.module.get_buffer(str(node.target))
        else:
            for source in node.all_input_nodes:
                _evaluate(program, source, values)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]
