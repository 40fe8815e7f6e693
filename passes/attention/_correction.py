"""Re-ttention's correction of a static layout by what a dense step left out, from log-sum-exps alone."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import Program, ops
from tilewright.compiler.block_layout import BlockLayout, Kind, unflatten
from tilewright.compiler.schema import arguments
from tilewright.passes.attention._sparse_call import LAYOUT_NAMES, Constants, widened

LAYOUT = ("row_ptr", "col", "q_off", "k_off", "head_group", "flag", "src_q", "src_k")
"""What must be constant for a layout to be static; lengths and masks of the keys may vary."""


@dataclass(frozen=True)
class Sparse:
    """A block-sparse attention with a static layout."""

    node: fx.Node
    given: dict[str, Any]
    layout: BlockLayout
    batch: int
    heads: int
    tokens: int
    size: int


def static_sparse(program: Program, node: fx.Node) -> Sparse | str:
    """The block-sparse attention of a node with its layout, or why that is not static."""
    given = arguments(node)
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == 1 and user.users:
            return f"its log-sum-exp is read by {next(iter(user.users)).name}: it serves a search"
    held: dict[str, Any] = {}
    for name in LAYOUT:
        source = given[name]
        if isinstance(source, fx.Node) and source.op != "get_attr":
            return (
                f"its {name} is computed in the call: the correction belongs to the layout of the dense step"
            )
        held[name] = program.module.get_buffer(str(source.target)) if isinstance(source, fx.Node) else None
    q, v = given["q"].meta["val"], given["v"].meta["val"]
    batch, heads, tokens, _ = q.shape
    return Sparse(node, given, BlockLayout(**held), batch, heads, tokens, int(v.shape[3]))


def dense_arguments(sparse: Sparse, constants: Constants) -> list[Any]:
    """The arguments of the same attention over all blocks, in the same slots and under the same key masks."""
    layout, given = sparse.layout, dict(sparse.given)
    rows, columns = layout.q_off.shape[1] - 1, layout.k_off.shape[1] - 1
    rules = unflatten(given["predicates"])
    user = [p for p, rule in enumerate(rules, 1) if rule.kind is Kind.USER]
    marked = torch.zeros(columns, dtype=torch.bool)
    if layout.flag is not None:
        for g in range(layout.row_ptr.shape[0]):
            used = int(layout.row_ptr[g, -1])
            masked = torch.isin(layout.flag[g, :used], torch.tensor(user, dtype=torch.int32))
            marked[layout.col[g, :used][masked].long()] = True
    groups = layout.row_ptr.shape[0]
    whole = BlockLayout.from_block_mask(
        torch.ones(groups, rows, columns, dtype=torch.bool),
        layout.q_off,
        layout.k_off,
        sparse.heads,
        head_group=layout.head_group,
    )
    if marked.any():
        flag = marked.to(torch.int32)[whole.col.long()]
        whole = replace(whole, flag=flag, predicates=(rules[user[0] - 1],))
    values = dict(zip(LAYOUT_NAMES, whole.arguments(), strict=True))
    for name in ("row_ptr", "col", "flag"):
        value = values[name]
        given[name] = constants.node(value, given["q"]) if isinstance(value, Tensor) else None
    given["predicates"] = values["predicates"]
    return list(given.values())


def collected(
    out: Tensor, lse: Tensor, full: Tensor, full_lse: Tensor, *, ratio: bool
) -> tuple[Tensor, Tensor]:
    """(rho float32 [B, H, N], R [B, H, N, E]): the share of probability the layout keeps, what it misses.

    rho = exp(lse - full_lse) and R = full - rho out. Without `ratio` rho is one.
    """
    kept = torch.exp(lse - full_lse) if ratio else torch.ones_like(lse)
    kept = kept.clamp(max=1.0)
    return kept, (widened(full) - kept[..., None] * widened(out)).to(out.dtype)


def corrected(
    out: Tensor, rho: Tensor, missing: Tensor, age: Tensor, *, growth: float, ratio: bool
) -> tuple[Tensor]:
    """rho' out + R with rho' = min(1, rho + age growth)."""
    kept = (rho + growth * age.to(rho.dtype)).clamp(max=1.0) if ratio else rho
    return ((kept[..., None] * widened(out) + widened(missing)).to(out.dtype),)


def state_of(sparse: Sparse) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shapes and dtypes of the slots of one layer."""
    rows = [sparse.batch, sparse.heads, sparse.tokens]
    dtype = sparse.given["v"].meta["val"].dtype
    return {"rho": (rows, torch.float32), "missing": ([*rows, sparse.size], dtype), "age": ([1], torch.int32)}


def bytes_of(sparse: Sparse) -> int:
    """What one layer keeps between steps, per request and branch."""
    sizes = [(torch.Size(shape).numel(), dtype.itemsize) for shape, dtype in state_of(sparse).values()]
    return sum(count * width for count, width in sizes[:2])


block_sparse = ops.block_sparse_attention
