"""A decode step over buffers of fixed size: attention to what is held, not to a mask over the whole buffer.

The mask of such a step depends on the position alone, so it is computed for every position that the buffer
has; where each one names exactly the tokens up to its own, the buffer is read as pages and the kernel of
paged attention stops at the token's own position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import ops
from tilewright.compiler.graph import dead_code
from tilewright.compiler.ops.paged import PAGE_SIZES
from tilewright.compiler.program import Program
from tilewright.compiler.regions import inline
from tilewright.compiler.rewrite import trace, traced_outputs
from tilewright.compiler.schema import arguments

ORIGIN = "onnx-held"


def attend_to_held(program: Program, position: str) -> list[str]:
    """Write attentions to keys and values [1, Hkv, C, D] as paged attentions, where their mask proves that
    every query sees the keys up to `position`, an input int64 [1, 1]. Returns why others stay."""
    at = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == position)
    prefixes: dict[tuple[fx.Node, int], bool] = {}
    lengths: dict[int, fx.Node] = {}
    reasons = []
    for node in [n for n in program.graph.nodes if n.target is ops.attention]:
        a = arguments(node)
        reason = _refusal(a)
        if not reason:
            key = (a["mask"], int(a["k"].meta["val"].shape[2]))
            if key not in prefixes:
                prefixes[key] = _is_prefix(program, *key, at)
            reason = "" if prefixes[key] else "the mask is not of all keys up to the position"
        if reason:
            reasons.append(f"{node.name}: {reason}")
        else:
            _replace(program, node, a, at, lengths)
    dead_code(program.graph)
    return reasons


def _refusal(a: dict[str, Any]) -> str:
    q, k, v = (a[name].meta["val"].shape for name in "qkv")
    if a["mask"] is None or a["causal"] or a["softcap"] or a["sinks"] is not None:
        return "not an attention by a mask alone"
    if not all(isinstance(n, int) for n in (*q, *k, *v)) or len(k) != 4:
        return "sizes that only the call knows"
    if q[0] != 1:
        return f"a batch of {q[0]}, not one"
    if k[2] % PAGE_SIZES[0]:
        return f"buffers of {k[2]} tokens, which pages of {PAGE_SIZES[0]} do not divide"
    return ""


def _is_prefix(program: Program, mask: fx.Node, capacity: int, at: fx.Node) -> bool:
    """True when every row of the mask at each position p < capacity is of the keys 0 .. p: it is computed for
    each of them."""
    if mask.op != "call_function":
        return False
    nodes, seen = [mask], {mask}
    for node in nodes:
        new = [n for n in node.all_input_nodes if n not in seen]
        nodes += new
        seen.update(new)
    known: dict[fx.Node, Any] = {}
    for node in seen:
        if node is at:
            continue
        if program.is_constant(node):
            known[node] = program.tensor_of(node)
        elif node.op == "get_attr":
            known[node] = program.module.get_buffer(str(node.target))
        elif node.op != "call_function":
            return False
    order = [n for n in program.graph.nodes if n in seen and n.op == "call_function"]
    keys = torch.arange(capacity)
    for p in range(capacity):
        found = _computed(order, {**known, at: torch.full((1, 1), p)})
        if found.dtype != torch.bool or found.shape[-1] != capacity or not bool((found == (keys <= p)).all()):
            return False
    return True


def _computed(order: list[fx.Node], env: dict[fx.Node, Any]) -> Tensor:
    """The value of the last of these calls, given what they read."""
    for node in order:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found: Tensor = env[order[-1]]
    return found


def _replace(
    program: Program, node: fx.Node, a: dict[str, Any], at: fx.Node, lengths: dict[int, fx.Node]
) -> None:
    """Every key head becomes a sequence of its own, so that its rows [C, D] are pages as they lie."""
    heads, capacity = (int(n) for n in a["k"].meta["val"].shape[1:3])
    page = max(n for n in PAGE_SIZES if capacity % n == 0)
    count = capacity // page
    table = torch.arange(heads * count, dtype=torch.int32).reshape(heads, count)

    def held(position: Tensor) -> Tensor:
        return (position.reshape(1) + 1).expand(heads).clone()

    def attend(q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:
        queries = q.reshape(heads, -1, 1, q.shape[3])
        pages = [x.reshape(heads * count, 1, page, x.shape[3]) for x in (k, v)]
        out, _ = ops.paged_attention(queries, *pages, table, held, None, None, a["scale"])
        found: Tensor = out.reshape(*q.shape[:3], v.shape[3])
        return found

    def put(function: Any, inputs: list[fx.Node]) -> fx.Node:
        module = trace(function, [n.meta["val"] for n in inputs])
        new = inline(program, module, inputs, before=node, like=node, origin=ORIGIN)
        found: fx.Node = new[traced_outputs(module)[0]]
        return found

    if heads not in lengths:
        lengths[heads] = put(held, [at])
    node.replace_all_uses_with(put(attend, [a["q"], a["k"], a["v"], lengths[heads]]))
    program.graph.erase_node(node)
