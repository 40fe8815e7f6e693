"""A decode step over buffers of fixed size: attention to what is held, not to a mask over the whole buffer.

The mask of such a step depends on the position alone, so it is computed for every position that the buffer
has. Where each one names exactly the tokens up to its own, our kernel of paged attention reads the buffer as
pages and stops at the position; in the form without our kernels, onnxruntime's GroupQueryAttention does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from onnx import helper
from torch import Tensor, fx

from tilewright.compiler import ops
from tilewright.compiler.graph import dead_code
from tilewright.compiler.ops.paged import PAGE_SIZES
from tilewright.compiler.program import Program
from tilewright.compiler.regions import inline
from tilewright.compiler.rewrite import trace, traced_outputs
from tilewright.compiler.schema import arguments, target_name
from tilewright.frontends.export.onnx_graph import MICROSOFT, OnnxGraph, dtype_of, shape_of
from tilewright.frontends.export.onnx_rope import rope_halves

ORIGIN = "onnx-held"
_VIEWS = ("aten::view", "aten::reshape", "aten::unsqueeze", "aten::squeeze")
_ROTARY_MULTIPLE = 16
"""Head sizes that GroupQueryAttention turns."""


def attend_to_held(program: Program, position: str) -> list[str]:
    """Write attentions to keys and values [1, Hkv, C, D] as paged attentions, where their mask proves that
    every query sees the keys up to `position`, an input int64 [1, 1]. Returns why others stay."""
    at = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == position)
    prefixes: dict[tuple[fx.Node, int], bool] = {}
    lengths: dict[int, fx.Node] = {}
    reasons = []
    for node in [n for n in program.graph.nodes if n.target is ops.attention]:
        a = arguments(node)
        reason = _refusal(a) or _page_refusal(a["k"])
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
    return ""


def _page_refusal(k: fx.Node) -> str:
    capacity, page = k.meta["val"].shape[2], PAGE_SIZES[0]
    return f"buffers of {capacity} tokens, which pages of {page} do not divide" if capacity % page else ""


def _is_prefix(program: Program, mask: fx.Node, capacity: int, at: fx.Node) -> bool:
    """True when every row of the mask at each position p < capacity is of the keys 0 .. p: it is computed for
    each of them."""
    keys = torch.arange(capacity)

    def fits(found: Tensor, p: int) -> bool:
        right = found.dtype == torch.bool and found.shape[-1] == capacity
        return right and bool((found == (keys <= p)).all())

    return _at_every_position(program, mask, capacity, at, fits)


def _at_every_position(
    program: Program, node: fx.Node, capacity: int, at: fx.Node, fits: Callable[[Tensor, int], bool]
) -> bool:
    """True when `node` depends on the position alone, and fits(its value, p) at each p < capacity."""
    values = _by_position(program, node, capacity, at)
    return values is not None and all(fits(found, p) for p, found in enumerate(values))


def _by_position(program: Program, node: fx.Node, capacity: int, at: fx.Node) -> Iterator[Tensor] | None:
    """The value of `node` at each position p < capacity, None where it depends on more than that."""
    if node.op != "call_function":
        return None
    nodes, seen = [node], {node}
    for reader in nodes:
        new = [n for n in reader.all_input_nodes if n not in seen]
        nodes += new
        seen.update(new)
    known: dict[fx.Node, Any] = {}
    for found in seen - {at}:
        if program.is_constant(found):
            known[found] = program.tensor_of(found)
        elif found.op == "get_attr":
            known[found] = program.module.get_buffer(str(found.target))
        elif found.op != "call_function":
            return None
    order = [n for n in program.graph.nodes if n in seen and n.op == "call_function"]
    return (_computed(order, {**known, at: torch.full((1, 1), p)}) for p in range(capacity))


def _computed(order: list[fx.Node], env: dict[fx.Node, Any]) -> Tensor:
    """The value of the last of these calls, given what they read."""
    for node in order:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    found: Tensor = env[order[-1]]
    return found


@dataclass(frozen=True)
class HeldStep:
    """An attention of one new token to two buffers that its rows were just written into."""

    at: fx.Node
    """The position, int64 [1, 1]."""
    k: fx.Node
    v: fx.Node
    """The writes, which only the attention and the outputs read."""


def held_steps(program: Program, position: str) -> dict[fx.Node, HeldStep]:
    """The attentions that one GroupQueryAttention means together with the writes into their buffers."""
    at = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == position)
    proven: dict[Any, bool] = {}
    found = {}
    for node in [n for n in program.graph.nodes if n.target is ops.attention]:
        a = arguments(node)
        k, v = a["k"], a["v"]
        written = all(_is_row_written(x, node) for x in (k, v))
        if not written or _refusal(a) or dtype_of(a["q"]) != torch.float32:
            continue
        capacity = int(k.meta["val"].shape[2])
        checks = {
            ("mask", a["mask"]): partial(_is_prefix, program, a["mask"], capacity, at),
            **{("row", x.args[2]): partial(_is_row, program, x.args[2], capacity, at) for x in (k, v)},
        }
        for key, check in checks.items():
            if (key, capacity) not in proven:
                proven[key, capacity] = check()
        if all(proven[key, capacity] for key in checks):
            found[node] = HeldStep(at, k, v)
    return found


def _is_row_written(x: fx.Node, attention: fx.Node) -> bool:
    """True for one row written along axis 2 of an input, read by the attention and the outputs alone."""
    if x.target is not ops.kv_update or x.args[0].op != "placeholder" or x.args[3] not in (2, -2):  # type: ignore[union-attr]
        return False
    return x.args[1].meta["val"].shape[2] == 1 and all(u is attention or u.op == "output" for u in x.users)  # type: ignore[union-attr]


def _is_row(program: Program, positions: Any, capacity: int, at: fx.Node) -> bool:
    """True when the row written is that of the position."""
    return _at_every_position(program, positions, capacity, at, lambda found, p: found.tolist() == [p])


def _rotated(x: Any) -> fx.Node | None:
    """The rotary embedding that a value is, seen through views, where GroupQueryAttention has the same."""
    while isinstance(x, fx.Node) and target_name(x.target) in _VIEWS:
        x = x.args[0]
    if not isinstance(x, fx.Node) or x.target is not ops.rope or rope_halves(arguments(x)) is None:
        return None
    _, _, lines, size = shape_of(x)
    return x if lines == 1 and size % _ROTARY_MULTIPLE == 0 and dtype_of(x) == torch.float32 else None


def _tables(g: OnnxGraph, cos: fx.Node, sin: fx.Node, capacity: int, at: fx.Node) -> list[str] | None:
    """Both tables [capacity, half a head] as weights, None where they depend on more than the position."""
    key = ("rotary tables", cos, sin, capacity)
    if key not in g.tables:
        names = []
        for label, node in (("cos", cos), ("sin", sin)):
            values = _by_position(g.program, node, capacity, at)
            if values is not None:
                half = int(shape_of(node)[3]) // 2
                rows = torch.cat([found.reshape(1, -1)[:, :half] for found in values])
                names.append(g.weight(rows.contiguous(), f"rotary.{label}"))
        g.tables[key] = names if len(names) == 2 else None
    found: list[str] | None = g.tables[key]
    return found


def grouped_query(g: OnnxGraph, node: fx.Node, step: HeldStep) -> str:
    """com.microsoft::GroupQueryAttention: it writes the rows, turns them and the queries where a rotary
    embedding of the position does, and attends to what is held."""
    a, (_, queries, rows, size) = arguments(node), shape_of(node.args[0])
    heads, capacity = (int(n) for n in shape_of(step.k)[1:3])
    given: list[Any] = [a["q"], step.k.args[1], step.v.args[1]]
    tables = list[str]()
    turned = [_rotated(x) for x in given[:2]]
    if turned[0] is not None and turned[1] is not None:
        inner = [arguments(x) for x in turned if x is not None]
        if all(inner[0][name] is inner[1][name] for name in ("cos", "sin")):
            tables = _tables(g, inner[0]["cos"], inner[0]["sin"], capacity, step.at) or []
        if tables:
            given[:2] = [row["x"] for row in inner]
    flat = g.constant([1, 1, -1], torch.int64)
    new = [g.node("Reshape", [g.name(x), flat]) for x in given]
    past = [g.name(x.args[0]) for x in (step.k, step.v)]
    one = g.constant([1], torch.int64)
    last = g.cast(g.shared("held", "Reshape", [g.name(step.at), one]), torch.int64, torch.int32)
    total = g.shared("held", "Add", [last, g.constant([1], torch.int32)])
    total = g.shared("total", "Squeeze", [total])
    out = g.fresh()
    g.sizes[out] = (1, 1, queries * rows * size)
    inputs = [*new, *past, last, total, *tables]
    sizes = {"num_heads": queries * rows, "kv_num_heads": heads}
    if tables:
        sizes["do_rotary"] = 1
    scale = size**-0.5 if a["scale"] is None else a["scale"]
    made = [out, g.name(step.k), g.name(step.v)]
    g.nodes.append(
        helper.make_node(
            "GroupQueryAttention", inputs, made, name=out, domain=MICROSOFT, scale=float(scale), **sizes
        )
    )
    g.domains.add(MICROSOFT)
    back = g.constant([*shape_of(node)], torch.int64)
    return g.node("Reshape", [out, back])


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
