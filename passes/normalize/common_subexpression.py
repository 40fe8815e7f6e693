"""Compute equal values once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx

from tilewright.compiler import Exactness, Example, GraphPass, PassLog, Program, Stage, Tensor, graph_pass
from tilewright.compiler.graph import is_impure
from tilewright.compiler.regions import mutation_regions


@graph_pass("common-subexpression", stage=Stage.NORMALIZE, exactness=Exactness.BITWISE, trains=True)
class CommonSubexpression(GraphPass):
    """Merge calls of one pure op on the same arguments.

    rewrite:
        a = f(x); b = f(x); g(a, b)
     -> a = f(x); g(a, a)
    """

    def apply(self, program: Program, log: PassLog) -> None:
        regions = mutation_regions(program.graph)
        out = next(n for n in reversed(program.graph.nodes) if n.op == "output")
        seen: dict[Hashable, fx.Node] = {}
        for node in list(program.graph.nodes):
            if node.op != "call_function" or is_impure(node) or _makes_memory(node):
                continue
            key = (node.target, _key(node.args), _key(node.kwargs), regions[node] if regions else 0)
            first = seen.setdefault(key, node)
            if first is node:
                continue
            if out in node.users and out in first.users:
                log.refused(
                    node, f"it and {first.name} are both outputs, which the caller may write to apart"
                )
            elif log.take(node):
                log.applied(node, inserted=[first], removed=[node])
                node.replace_all_uses_with(first)
                program.graph.erase_node(node)
        log.finish(("repeated computation",))

    @classmethod
    def examples(cls) -> Iterator[tuple[dict, Example]]:
        x = Tensor(3, 4)
        yield {}, Example(lambda x: torch.sin(x + 2) * torch.cos(x + 2), (x,))
        yield {}, Example(lambda x: (torch.sin(x), torch.sin(x)), (x,), refusal="both outputs")


def _makes_memory(node: fx.Node) -> bool:
    """Uninitialised memory: two calls are two values."""
    return isinstance(node.target, torch._ops.OpOverload) and "empty" in node.target._schema.name


def _key(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_key, value))
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    return value if isinstance(value, fx.Node) else (type(value).__name__, repr(value))
