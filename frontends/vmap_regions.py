"""Parts of a Dynamo graph under `torch.vmap`, turned into plain aten before the graph is captured.

Pre-dispatch tracing cannot follow vmap: between `_vmap_increment_nesting` and `_vmap_decrement_nesting`
tensors wear a batch wrapper, the tracer loses sight of them and records fakes as constants. Such a region is
traced on its own, below the batching rules, and put back as the aten ops that they produce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler.diagnostics import CaptureError

_ENTER, _LEAVE = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting


def expand_vmap(gm: fx.GraphModule, mode: FakeTensorMode, fakes: Sequence[Any]) -> fx.GraphModule:
    """`gm` itself without vmap, else a copy whose vmap regions are aten; `fakes` in placeholder order."""
    regions = _regions(gm.graph)
    if not regions:
        return gm
    values = fx.Interpreter(gm, garbage_collect_values=False)
    with mode:
        values.run(*fakes)
    copy = fx.GraphModule(gm, fx.Graph())
    replaced: dict[fx.Node, fx.Node] = {}
    first = {region[0]: region for region in regions}
    inside = {node for region in regions for node in region}
    for node in gm.graph.nodes:
        if node in first:
            _put_traced(gm, first[node], copy.graph, replaced, values.env, mode)
        elif node not in inside:
            replaced[node] = copy.graph.node_copy(node, replaced.__getitem__)
            if hasattr(node, "_dynamo_source"):
                replaced[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    copy.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    copy.recompile()
    return copy


def check_nothing_lost(flat: fx.GraphModule) -> None:
    """CaptureError when tracing recorded a fake tensor as a constant, which it does for a value it lost."""
    for node in flat.graph.nodes:
        if node.op == "get_attr":
            value = getattr(flat, str(node.target), None)
            if isinstance(value, torch.Tensor) and (
                isinstance(value, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(value)
            ):
                raise CaptureError(
                    f"{node.target}: a value under a function transform (grad, jvp) was lost in tracing",
                    remedy="put torch.compiler.disable on the function that calls the transform",
                )


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """Outermost runs of nodes from an entry to its exit."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is _ENTER:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        if node.target is _LEAVE:
            depth -= 1
    return regions


def _put_traced(
    gm: fx.GraphModule,
    region: list[fx.Node],
    target: fx.Graph,
    replaced: dict[fx.Node, fx.Node],
    values: dict[fx.Node, Any],
    mode: FakeTensorMode,
) -> None:
    """Trace one region on the values that enter it and append the result to `target`."""
    inside = set(region)
    entering = list(dict.fromkeys(i for node in region for i in node.all_input_nodes if i not in inside))
    leaving = [node for node in region if any(user not in inside for user in node.users)]
    sub = fx.Graph()
    moved = {node: sub.placeholder(node.name) for node in entering}
    for node in region:
        moved[node] = sub.node_copy(node, moved.__getitem__)
    sub.output(tuple(moved[node] for node in leaving))
    with mode:
        given = [values[node] for node in entering]
        traced = make_fx(fx.GraphModule(gm, sub), tracing_mode="real", _allow_non_fake_inputs=True)(*given)
        # Batching rules write into views (`squeeze_`). A second trace, for functionalize has its own levels.
        pure = torch.func.functionalize(traced)
        traced = make_fx(pure, tracing_mode="real", _allow_non_fake_inputs=True)(*given)
    check_nothing_lost(traced)
    inner = dict(
        zip(
            (n for n in traced.graph.nodes if n.op == "placeholder"), map(replaced.get, entering), strict=True
        )
    )
    for node in traced.graph.nodes:
        if node.op == "output":
            for before, after in zip(leaving, node.args[0], strict=True):
                replaced[before] = inner[after]
        elif node.op != "placeholder":
            inner[node] = target.node_copy(node, inner.__getitem__)
            for key in ("stack_trace", "nn_module_stack"):
                if key in region[0].meta:
                    inner[node].meta[key] = region[0].meta[key]
