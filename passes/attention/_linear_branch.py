"""Sparse-linear attention: the block map from pooled tokens, the linear attention of what it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import OptionError
from tilewright.passes.attention._block_search import Blocks, lists, rank_of, with_text_blocks
from tilewright.passes.attention._sparse_call import widened

Feature = Literal["softmax", "elu", "relu"]
Variant = Literal["none", "paper", "sla1", "main"]
"""Which keys the linear branch sees: none; all but critical and skipped blocks; all but critical; all."""
MAIN_EPSILON = 1e-5


def feature_map(x: Tensor, kind: str) -> Tensor:
    """phi, over the last axis."""
    if kind == "softmax":
        return torch.softmax(x, -1)
    return F.elu(x) + 1.0 if kind == "elu" else F.relu(x)


def in_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(x [..., n, block, D] padded with zeros, int64 [n] tokens of each block) of x [..., N, D]."""
    tokens = x.shape[-2]
    count = -(-tokens // block)
    padded = F.pad(x, (0, 0, 0, count * block - tokens))
    lengths = (tokens - block * torch.arange(count, device=x.device)).clamp(max=block)
    return padded.unflatten(-2, (count, block)), lengths


def block_scores(q: Tensor, k: Tensor, block: int) -> Tensor:
    """[B, H, nQ, nK]: products of mean queries with mean keys, keys less their mean over all tokens."""
    (qs, rows), (ks, columns) = in_blocks(widened(q), block), in_blocks(widened(k), block)
    pooled_q = qs.sum(-2) / rows[:, None]
    pooled_k = ks.sum(-2) / columns[:, None] - widened(k).mean(-2, keepdim=True)
    return pooled_q @ pooled_k.transpose(-1, -2)


def critical_count(topk: float, blocks: int) -> int:
    """Critical blocks of every row: the floor, but one at least."""
    return max(1, min(blocks, int(topk * blocks)))


def block_classes(
    q: Tensor, k: Tensor, block: int, topk: float, skip: float, variant: str
) -> tuple[Tensor, Tensor]:
    """(critical, marginal), bool [B, H, nQ, nK]; no gradient flows through them."""
    scores = block_scores(q.detach(), k.detach(), block)
    rank, blocks = rank_of(scores), scores.shape[-1]
    count = critical_count(topk, blocks)
    critical = rank < count
    if variant == "main":
        return critical, torch.ones_like(critical)
    left = blocks - (int(skip * blocks) if variant == "paper" else 0)
    return critical, (rank >= count) & (rank < max(count, left))


def linear_branch(
    q: Tensor, k: Tensor, v: Tensor, marginal: Tensor, block: int, feature: str, variant: str
) -> Tensor:
    """O_l [B, H, N, E] = phi(Q_i) H_i / (phi(Q_i) Z_i), H_i and Z_i summed over the marginal blocks of row i.

    In float32 at least; 0 where a row has no marginal block. `main` sees all keys and adds 1e-5 below.
    """
    fq, fk, wide_v = feature_map(widened(q), feature), feature_map(widened(k), feature), widened(v)
    if variant == "main":
        above = fq @ (fk.transpose(-1, -2) @ wide_v)
        below = (fq * fk.sum(-2, keepdim=True)).sum(-1, keepdim=True) + MAIN_EPSILON
        return above / below
    (ks, _), (vs, _), (qs, _) = in_blocks(fk, block), in_blocks(wide_v, block), in_blocks(fq, block)
    weight = marginal.to(fk.dtype)
    each = (ks.transpose(-1, -2) @ vs).flatten(-2)
    h = (weight @ each).unflatten(-1, (fk.shape[-1], wide_v.shape[-1]))
    z = weight @ ks.sum(-2)
    above, below = qs @ h, qs @ z[..., None]
    empty = below == 0
    out = torch.where(
        empty, torch.zeros_like(above), above / torch.where(empty, torch.ones_like(below), below)
    )
    return out.flatten(-3, -2)[..., : q.shape[-2], :]


def found_lists(
    q: Tensor, k: Tensor, text: Tensor, *order: Tensor, plan: Blocks, block: int, topk: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's lists of critical blocks; text blocks are critical for all. order: as `Blocks.order`."""
    if order:
        q, k = q.index_select(2, order[0]), k.index_select(2, order[0])
    first, end = plan.borders()[plan.video.start], plan.borders()[plan.video.stop]
    critical, _ = block_classes(q[:, :, first:end], k[:, :, first:end], block, topk, 0.0, "none")
    return lists(with_text_blocks(critical, text))


def with_linear_branch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *,
    plan: Blocks, block: int, topk: float, skip: float, feature: str, variant: str,
) -> tuple[Tensor]:  # fmt: skip
    """out + Proj(O_l) on the video's rows."""
    first, end = plan.borders()[plan.video.start], plan.borders()[plan.video.stop]
    qs, ks, vs = (x[:, :, first:end] for x in (q, k, v))
    _, marginal = block_classes(qs, ks, block, topk, skip, variant)
    linear = linear_branch(qs, ks, vs, marginal, block, feature, variant)
    added = F.linear(linear, weight.to(linear.dtype), bias.to(linear.dtype))
    return (out + F.pad(added.to(out.dtype), (0, 0, first, out.shape[2] - end)),)


def written_out(
    q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, start: int, video: int, scale: float | None, block: int,
    topk: float, skip: float, feature: str, variant: str,
) -> tuple[Tensor]:  # fmt: skip
    """The obvious version: dense attention under the critical blocks' mask, and phi products of all pairs.

    rest: weight and bias of the projection where there is a linear branch, then the key mask if there is one.
    """
    proj, mask = (None, rest) if variant == "none" else (rest[:2], rest[2:])
    qs, ks, vs = (x[:, :, start : start + video] for x in (q, k, v))
    critical, marginal = block_classes(qs, ks, block, topk, skip, variant)
    of = torch.arange(video, device=q.device) // block
    around = (start, q.shape[2] - start - video)
    kept = F.pad(critical[:, :, of][:, :, :, of].int(), around * 2, value=1).bool()
    out = ops.attention(q, k, v, kept & mask[0] if mask else kept, scale)
    if proj is None:
        return (out,)
    pairs = feature_map(widened(qs), feature) @ feature_map(widened(ks), feature).transpose(-1, -2)
    pairs = pairs * marginal[:, :, of][:, :, :, of]
    below = pairs.sum(-1, keepdim=True) + (MAIN_EPSILON if variant == "main" else 0.0)
    linear = torch.nan_to_num(pairs / below) @ widened(vs)
    added = linear @ widened(proj[0]).to(linear.dtype).T + widened(proj[1]).to(linear.dtype)
    return (out + F.pad(added.to(out.dtype), (0, 0, *around)),)


def read_projection(path: str, layer: int, size: int, variant: str, feature: str) -> tuple[Tensor, Tensor]:
    """(weight [E, E], bias [E]) of a layer from a safetensors file with `<layer>.weight` and `<layer>.bias`.

    OptionError where the file is unreadable, was trained for another variant or feature map, or does not fit.
    """

    def wrong(problem: str) -> OptionError:
        return OptionError(f"sparse-linear-attention: option 'proj' = {path!r}: {problem}")

    try:
        with safe_open(Path(path), framework="pt") as file:
            made_for = file.metadata() or {}
            names = set(file.keys())
            wanted = [f"{layer}.weight", f"{layer}.bias"]
            found = [file.get_tensor(n) for n in wanted if n in names]
    except (OSError, SafetensorError) as error:
        raise wrong(f"not a readable safetensors file: {error}") from None
    for name, here in (("variant", variant), ("feature", feature)):
        if made_for.get(name) != here:
            raise wrong(f"trained with {name} {made_for.get(name)!r}, asked for {here!r}: not exchangeable")
    if len(found) != 2:
        raise wrong(f"it has no projection for layer {layer}")
    if list(found[0].shape) != [size, size] or list(found[1].shape) != [size]:
        raise wrong(f"layer {layer} has {list(found[0].shape)}, the heads have size {size}")
    return found[0], found[1]
