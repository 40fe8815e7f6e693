"""Putting a block-sparse attention where a video self-attention stood."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tilewright.compiler import Program, ops
from tilewright.compiler.block_layout import BlockLayout, Predicate
from tilewright.compiler.dataflow import tensor_of
from tilewright.compiler.graph import fake_mode_of, insert_like
from tilewright.compiler.regions import inline
from tilewright.compiler.rewrite import trace, traced_outputs
from tilewright.passes.attention._sites import VideoAttention

aten = torch.ops.aten


class Constants:
    """Buffers of a program, one for each distinct tensor, so that layers with one layout share it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._held: dict[tuple[Any, ...], fx.Node] = {}

    def node(self, value: torch.Tensor, like: fx.Node) -> fx.Node:
        """The get_attr node of a constant, put after the placeholders."""
        key = (value.dtype, tuple(value.shape), value.cpu().numpy().tobytes())
        if key not in self._held:
            graph = self._program.graph
            name = self._program.hold("tw_layout_", value)
            last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
            with graph.inserting_after(last):
                made = graph.get_attr(name)
            mode = fake_mode_of(like)
            made.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
            self._held[key] = made
        return self._held[key]


def with_key_mask(layout: BlockLayout, site: VideoAttention, text_blocks: torch.Tensor) -> BlockLayout:
    """The layout with its text blocks (all blocks where video may be masked) under the site's key mask.

    text_blocks: bool [key blocks]. A block has room for one predicate, so those that get one have none yet.
    """
    if site.keys.kind != "columns":
        return layout
    marked = text_blocks if site.keys.keeps_video else torch.ones_like(text_blocks)
    own = torch.zeros_like(layout.col) if layout.flag is None else layout.flag
    chosen = marked[layout.col.long()]
    predicates = (*layout.predicates, Predicate.user())
    flag = torch.where(chosen, torch.full_like(own, len(predicates)), own)
    return replace(layout, flag=flag, predicates=predicates)


def online_key_flags(
    program: Program,
    site: VideoAttention,
    layout: BlockLayout,
    constants: Constants,
    text: tuple[bool, ...],
    col: fx.Node,
) -> tuple[BlockLayout, fx.Node, list[fx.Node]]:
    """`with_key_mask` for lists that the program computes: (layout with the rule, flags of col, nodes)."""
    hidden = torch.tensor(text) if site.keys.keeps_video else torch.ones(len(text))
    marked = constants.node(hidden.to(torch.int32), site.query)

    def flags(marked: torch.Tensor, col: torch.Tensor) -> tuple[torch.Tensor]:
        return (marked[col.long()],)

    (flag,), made = insert_function(program, site, flags, [marked, col])
    return replace(layout, predicates=(Predicate.user(),), flag=torch.zeros_like(layout.col)), flag, made


def insert_function(
    program: Program, site: VideoAttention, function: Callable[..., Any], inputs: list[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Trace a function on the values of nodes and insert its calls before the site: (results, all made)."""
    return _insert(program, site.node, site.node, function, inputs)


def insert_after(
    program: Program, node: fx.Node, function: Callable[..., Any], inputs: list[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The same, right after a node."""
    return _insert(program, node.next, node, function, inputs)


def _insert(
    program: Program, before: fx.Node, like: fx.Node, function: Callable[..., Any], inputs: list[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    module = trace(function, [n.meta["val"] for n in inputs])
    new = inline(program, module, inputs, before=before, like=like, origin="layout")
    results = [new[r] if isinstance(r, fx.Node) else r for r in traced_outputs(module)]
    return results, [n for old, n in new.items() if old.op == "call_function"]


def widened(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def key_mask_inputs(site: VideoAttention) -> list[fx.Node]:
    """What `kept_keys` needs of a site's key mask, as nodes: one or none."""
    return [site.keys.node] if site.keys.node is not None else []


def kept_keys(kind: str, mask: torch.Tensor, keys: int) -> torch.Tensor:
    """bool [1 or B, 1 or H, 1, T]: the keys that a site's mask keeps, in token order."""
    if kind == "prefix":
        return torch.arange(keys, device=mask.device) < mask[:, None, None, None]
    return mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)


def insert_sparse(
    program: Program,
    site: VideoAttention,
    layout: BlockLayout,
    constants: Constants,
    computed: Mapping[str, fx.Node] | None = None,
) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """Insert the block-sparse attention before the site's node: (out, lse, all nodes made).

    computed: layout arguments that the program computes, by name; they stand for the layout's own.
    """
    made: list[fx.Node] = []

    def call(target: Any, *args: Any) -> fx.Node:
        node = insert_like(program.graph, site.node, target, args, site.node)
        made.append(node)
        return node

    values = dict(zip(LAYOUT_NAMES, layout.arguments(), strict=True))
    computed = computed or {}
    given: dict[str, Any] = {
        name: constants.node(v, site.query) if isinstance(v, torch.Tensor) and name not in computed else v
        for name, v in values.items()
    }
    given.update(computed)
    if site.keys.kind == "prefix":
        given["k_valid"] = _limits(site, call)
    elif site.keys.kind == "columns":
        given["mask"] = _columns(site, layout, given["src_k"], call)
    pair = call(ops.block_sparse_attention, site.query, site.key, site.value, *given.values(), site.scale)
    out, lse = call(operator.getitem, pair, 0), call(operator.getitem, pair, 1)
    return out, lse, made


LAYOUT_NAMES = (
    "row_ptr", "col", "q_off", "k_off", "head_group", "flag", "predicates", "k_valid", "q_valid", "limit",
    "src_q", "src_k", "mask",
)  # fmt: skip
"""`BlockLayout.arguments()` by name."""


def _limits(site: VideoAttention, call: Any) -> fx.Node:
    """int32 [B]: the first masked key of each batch entry."""
    node = site.keys.node
    assert node is not None, "a prefix mask has its limit"
    value = tensor_of(node)
    assert value is not None, "a limit is a tensor"
    if value.dtype != torch.int32:
        node = call(aten.to.dtype, node, torch.int32)
    return node if value.shape[0] == site.batch else call(aten.expand.default, node, [site.batch])


def _columns(site: VideoAttention, layout: BlockLayout, src_k: fx.Node | None, call: Any) -> fx.Node:
    """bool [1 or B, 1 or H, 1, key slots] of the site's mask, in slot order."""
    node = site.keys.node
    assert node is not None, "a column mask has its tensor"
    value = tensor_of(node)
    assert value is not None, "a mask is a tensor"
    if value.dim() != 4:
        node = call(aten.reshape.default, node, [*(1,) * (4 - value.dim()), *value.shape])
    if layout.src_k is None or src_k is None or len(layout.src_k) != 1:
        return node  # with several orders only text is masked, and text keeps its place in all
    row = call(aten.select.int, src_k, 0, 0)
    picked: fx.Node = call(aten.index_select.default, node, 3, row)
    return picked
