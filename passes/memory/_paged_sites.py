"""The attentions over pages of a program, and programs to try policies on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import PassLog, Program, ops
from tilewright.compiler.regions import inline
from tilewright.compiler.rewrite import trace, traced_outputs

SITES = (ops.paged_attention, ops.token_attention)


def choose_at_sites(
    program: Program,
    log: PassLog | None,
    attend: Callable[..., Any],
    dense_layers: int,
    page: int | None,
    group: int = 1,
) -> None:
    """Replace each attention of one new token over all pages by attend(q, k_pages, v_pages, table, lengths,
    first, scale), which gives (out, lse). `page`: the only size of a page that will do, None for any.
    `group`: what has to divide the channels of keys and values."""
    sites = [n for n in program.graph.nodes if n.target in SITES]
    for layer, node in enumerate(sites):
        if node.target is not ops.paged_attention:
            continue
        given = [*node.args, *(None,) * (8 - len(node.args))]
        reason = refusal(given, page) or too_early(layer, dense_layers) or ungrouped(given, group)
        if reason:
            if log is not None:
                log.refused(node, reason)
        elif log is None or log.take(node):
            replace(program, log, node, [*given[:6], given[7]], attend)
    if log is not None:
        log.finish(("paged_attention",))


def refusal(given: list[Any], page: int | None) -> str:
    """Why a policy leaves an attention as it is; empty where it may choose for it."""
    if given[6] is not None:
        return "the pages that are attended were chosen before"
    tokens, size = given[0].meta["val"].shape[2], given[1].meta["val"].shape[2]
    if tokens != 1:
        return f"{tokens} queries at once: policies choose for one new token"
    if page is not None and size != page:
        return f"the pool has pages of {size} tokens, the policy is for {page}"
    return ""


def too_early(layer: int, dense_layers: int) -> str:
    """Why a layer attends to everything; empty from `dense_layers` on."""
    return f"layer {layer} is one of the first {dense_layers}" if layer < dense_layers else ""


def ungrouped(given: list[Any], group: int) -> str:
    """Why groups of channels do not fit keys and values; empty where they do."""
    for name, pages in zip(("keys", "values"), given[1:3], strict=True):
        size = pages.meta["val"].shape[3]
        if size % group:
            return f"{name} have {size} channels, which groups of {group} do not divide"
    return ""


def replace(
    program: Program, log: PassLog | None, node: fx.Node, given: list[Any], attend: Callable[..., Any]
) -> list[fx.Node]:
    """Put attend(*given), (out, lse, ...), in the place of `node`; returns the nodes of further results."""
    inputs = [x for x in given if isinstance(x, fx.Node)]

    def call(*tensors: Tensor) -> Any:
        feed = iter(tensors)
        return attend(*[next(feed) if isinstance(x, fx.Node) else x for x in given])

    module = trace(call, [n.meta["val"] for n in inputs])
    name = "policy" if log is None else log.name
    new = inline(program, module, inputs, before=node, like=node, origin=name)
    results = [new[r] for r in traced_outputs(module)]
    removed = [*node.users, node]
    if log is not None:
        log.claim_slots([node], new)
        log.applied(node, inserted=new, removed=removed)
    for user in list(node.users):
        user.replace_all_uses_with(results[0 if user.args[1] == 0 else 1])
        program.graph.erase_node(user)
    program.graph.erase_node(node)
    return results[2:]


def masked_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, kept: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys in order, `kept` bool [B, 1 or Hkv, S] of them: what policies are held to."""
    group = q.shape[1] // k_pages.shape[1]
    k, v = (
        pages[table.clamp(min=0).long()].transpose(1, 2).flatten(2, 3).repeat_interleave(group, 1)
        for pages in (k_pages, v_pages)
    )
    scores = q @ k.transpose(-1, -2) * (q.shape[3] ** -0.5 if scale is None else scale)
    seen = kept.expand(-1, k_pages.shape[1], -1).repeat_interleave(group, 1)[:, :, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def first_of(lengths: Tensor, first: Tensor | None) -> Tensor:
    """int64 [B]: where each sequence starts."""
    return torch.zeros_like(lengths) if first is None else first


def decode_inputs(queries: int = 1) -> tuple[Tensor, ...]:
    """(q, k_pages, v_pages, table, lengths, first): sequences of 61 and 20 tokens in pages of 8."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    table = torch.full((2, 8), -1, dtype=torch.int32)
    table[0], table[1, :3] = torch.randperm(8, generator=generator), torch.tensor([10, 8, 9])
    lengths, first = torch.tensor([61, 20]), torch.tensor([0, 3])
    return normal(2, 4, queries, 16), normal(11, 2, 8, 16), normal(11, 2, 8, 16), table, lengths, first
