"""The programs of a system that searches for its layout at some steps and keeps it for the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import Program, ops
from tilewright.compiler.graph import insert_like
from tilewright.passes.attention._block_search import Blocks, lists, select_heaviest, with_text_blocks
from tilewright.passes.attention._sites import VideoAttention
from tilewright.passes.attention._sparse_call import (
    Constants,
    insert_function,
    insert_sparse,
    kept_keys,
    key_mask_inputs,
    online_key_flags,
    widened,
)

SLOTS = ("row_ptr", "col", "head_group", "lse")
Choice = Callable[[Tensor], Tensor]
"""mass [B, H, nQ, nK] of the video's blocks -> bool of the same shape."""


def dense_choice(mass: Tensor, *, sparsity: float, threshold: float, adaptive: bool) -> Tensor:
    """`select_heaviest`, by name."""
    return select_heaviest(mass, sparsity, threshold, adaptive)


def insert_phase(
    program: Program, site: VideoAttention, plan: Blocks, constants: Constants, choose: Choice, phase: str
) -> tuple[fx.Node, list[fx.Node]]:
    """Insert one phase for one attention: (its output, all nodes made)."""
    if phase == "sparse":
        kept, made = _kept(program, site, plan, constants, SLOTS[:3])
        out, _, called = _sparse(program, site, plan, constants, kept)
        return out, made + called
    if phase == "cached-search":
        kept, made = _kept(program, site, plan, constants, SLOTS[3:])
        found, more = _search(program, site, plan, constants, choose, kept["lse"])
        found["lse"] = kept["lse"]
        out, _, called = _sparse(program, site, plan, constants, {n: found[n] for n in SLOTS[:3]})
        made += more + called
    else:
        every = Blocks(plan.sizes, plan.text).dense(site.heads)
        dense, lse, made = insert_sparse(program, site, every, constants)
        found, more = _search(program, site, plan, constants, choose, lse)
        found["lse"], out = lse, dense
        made += more
        if phase == "every":
            out, _, called = _sparse(program, site, plan, constants, {n: found[n] for n in SLOTS[:3]})
            return out, made + called
    state = [found[name] for name in SLOTS]
    args = (out, state, list(SLOTS), site.where)
    out = insert_like(program.graph, site.node, ops.step_state_put, args, site.node)
    return out, [*made, out]


def insert_found(
    program: Program,
    site: VideoAttention,
    plan: Blocks,
    constants: Constants,
    look: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> tuple[fx.Node, list[fx.Node]]:
    """Insert a layout found in the call, by look(q, k, text blocks, *order), and its attention."""
    inputs = [site.query, site.key, constants.node(torch.tensor(plan.text), site.query)]
    inputs += [constants.node(t, site.query) for t in plan.order()]
    found, made = insert_function(program, site, look, inputs)
    out, _, called = _sparse(program, site, plan, constants, dict(zip(SLOTS, found, strict=False)))
    return out, made + called


def _search(
    program: Program, site: VideoAttention, plan: Blocks, constants: Constants, choose: Choice, lse: fx.Node
) -> tuple[dict[str, fx.Node], list[fx.Node]]:
    """Insert block mass and selection: the layout's tensors by name."""
    borders = constants.node(torch.tensor([plan.borders()], dtype=torch.int32), site.query)
    text = constants.node(torch.tensor(plan.text), site.query)
    order = [constants.node(t, site.query) for t in plan.order()]
    inputs = [site.query, site.key, lse, borders, text, *order, *key_mask_inputs(site)]
    look = partial(_found, plan=plan, choose=choose, scale=site.scale, kind=site.keys.kind)
    found, made = insert_function(program, site, look, inputs)
    return dict(zip(SLOTS, found, strict=False)), made


def _found(
    q: Tensor, k: Tensor, lse: Tensor, borders: Tensor, text: Tensor, *rest: Tensor,
    plan: Blocks, choose: Choice, scale: float | None, kind: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    order, keys = (rest[:1], rest[1:]) if plan.tiling is not None else ((), rest)
    mask = kept_keys(kind, keys[0], k.shape[2]) if keys else None
    if order:
        q, k, lse = (x.index_select(2, order[0]) for x in (q, k, lse))
        mask = mask.index_select(3, order[0]) if mask is not None else None
    mass = ops.block_mass(q, k, lse, borders, borders, mask, scale)[:, :, plan.video, plan.video]
    return lists(with_text_blocks(choose(mass), text))


def _sparse(
    program: Program, site: VideoAttention, plan: Blocks, constants: Constants, found: dict[str, fx.Node]
) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    layout = plan.dense(site.heads)
    given, made = dict(found), list[fx.Node]()
    if site.keys.kind == "columns":
        layout, flag, made = online_key_flags(program, site, layout, constants, plan.text, found["col"])
        given["flag"] = flag
    out, lse, called = insert_sparse(program, site, layout, constants, given)
    return out, lse, made + called


def _kept(
    program: Program, site: VideoAttention, plan: Blocks, constants: Constants, names: tuple[str, ...]
) -> tuple[dict[str, fx.Node], list[fx.Node]]:
    """Insert reads of this layer's slots."""
    groups, n = site.batch * site.heads, plan.count
    shapes: dict[str, tuple[list[int], Any]] = {
        "row_ptr": ([groups, n + 1], torch.int32),
        "col": ([groups, n * n], torch.int32),
        "head_group": ([site.batch, site.heads], torch.int32),
        "lse": ([site.batch, site.heads, site.tokens], torch.float32),
    }
    made = {}
    for name in names:
        args = (site.query, name, site.where, *shapes[name])
        made[name] = insert_like(program.graph, site.node, ops.step_state_get, args, site.node)
    return made, list(made.values())


def written_out(
    q: Tensor, k: Tensor, v: Tensor, *mask: Tensor,
    plan: Blocks, scale: float | None, sparsity: float, threshold: float, adaptive: bool,
) -> tuple[Tensor]:  # fmt: skip
    """The obvious version: a whole softmax, its blocks summed one by one, and attention under their mask."""
    scores = widened(q) @ widened(k).transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask:
        scores = scores.masked_fill(~mask[0], float("-inf"))
    share = torch.softmax(scores, -1)
    ends = plan.borders()
    mass = torch.stack(
        [
            torch.stack(
                [share[:, :, a:b, c:d].sum((-1, -2)) for c, d in zip(ends, ends[1:], strict=False)], -1
            )
            for a, b in zip(ends, ends[1:], strict=False)
        ],
        2,
    )
    chosen = select_heaviest(mass[:, :, plan.video, plan.video], sparsity, threshold, adaptive)
    kept = torch.ones_like(share, dtype=torch.bool)
    first = plan.video.start
    video = [(a, b) for a, b, t in zip(ends, ends[1:], plan.text, strict=False) if not t]
    rows = []
    for i, (a, b) in enumerate(video):
        columns = [
            chosen[:, :, i, j, None, None].expand(-1, -1, b - a, d - c) for j, (c, d) in enumerate(video)
        ]
        rows.append(torch.cat(columns, -1))
    start, end = ends[first], ends[plan.video.stop]
    kept = torch.slice_scatter(
        kept, torch.slice_scatter(kept[:, :, start:end], torch.cat(rows, 2), 3, start, end), 2, start, end
    )
    own = kept & mask[0] if mask else kept
    return (ops.attention(q, k, v, own, scale),)
