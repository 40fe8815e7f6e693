"""Which attentions of a program are the video self-attention, and how their keys are masked.

Cross-attention, text refiners and pooled-text attention look alike to a pattern; what tells them apart is
how many tokens they see and where their keys come from. Everything that does not fit is left dense, with the
reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from tilewright.compiler import Program, ops
from tilewright.compiler.dataflow import LINEAR_OPS, op_name, tensor_of
from tilewright.compiler.schema import arguments
from tilewright.compiler.tiles import Triple


class NotVideo(str):
    """Why an attention is none over the video grid: it stays as it is."""


class Mismatch(str):
    """Why an attention that may be one over the grid cannot be told to be: facts are absent or wrong."""


@dataclass(frozen=True)
class KeyMask:
    """How the keys of an attention are masked, besides the layout."""

    kind: Literal["none", "prefix", "columns"]
    node: fx.Node | None = None
    """prefix: int [B], the first masked key. columns: bool [1 or B, 1 or H, 1, T], True is kept."""
    keeps_video: bool = True
    """It is known to mask no video token."""


@dataclass(frozen=True)
class VideoAttention:
    """One self-attention over the tokens of a video grid, alone or joined with text."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float | None
    batch: int
    heads: int
    tokens: int
    """Video and text."""
    grid: Triple
    start: int
    """First video token."""
    keys: KeyMask
    layer: int | None
    order: int
    """Which video self-attention of the program it is, in graph order."""

    @property
    def video(self) -> int:
        return math.prod(self.grid)

    @property
    def text(self) -> int:
        return self.tokens - self.video

    @property
    def where(self) -> int:
        """The layer, or the order in the graph where layers are not known."""
        return self.order if self.layer is None else self.layer


def attention_nodes(program: Program) -> list[fx.Node]:
    """The semantic attentions of a program."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target is ops.attention]


def find_site(program: Program, node: fx.Node, order: int) -> VideoAttention | NotVideo | Mismatch:
    """The video self-attention that a node is, or why it is none."""
    given = arguments(node)
    shape = _shape(given["q"], given["k"], given["v"])
    if isinstance(shape, str):
        return NotVideo(shape)
    batch, heads, tokens = shape
    for name, idle in (("causal", False), ("softcap", 0.0), ("sinks", None)):
        if given[name] != idle:
            return NotVideo(f"it has {name} = {given[name]}: video self-attention has none")
    foreign = _foreign_keys(given["q"], given["k"])
    if foreign is not None:
        return NotVideo(foreign)
    if not program.facts.has("video_grid"):
        return Mismatch(program.facts.missing("video_grid"))
    grid: Triple = program.facts.get("video_grid")
    start = _video_start(program, grid, tokens)
    if isinstance(start, str):
        return start
    keys = _key_mask(program, given["mask"], start, math.prod(grid))
    if isinstance(keys, str):
        return Mismatch(keys)
    layers = program.facts.get("attention_layers") if program.facts.has("attention_layers") else {}
    return VideoAttention(
        node, given["q"], given["k"], given["v"], given["scale"], batch, heads, tokens, grid, start, keys,
        layers.get(node.name), order,
    )  # fmt: skip


def _shape(q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[int, int, int] | str:
    sizes = [tuple(t.shape) if (t := tensor_of(x)) is not None else () for x in (q, k, v)]
    if len(sizes[0]) != 4 or not all(isinstance(n, int) for size in sizes for n in size):
        return f"q is {list(sizes[0])}: expected four static sizes [batch, heads, tokens, head size]"
    (batch, heads, tokens, _), (_, key_heads, keys, _) = sizes[0], sizes[1]
    if tokens != keys:
        return f"{tokens} queries attend {keys} keys: no self-attention"
    if heads != key_heads:
        return f"{heads} query heads share {key_heads} key heads: no video model does"
    return batch, heads, tokens


def _video_start(program: Program, grid: Triple, tokens: int) -> int | NotVideo | Mismatch:
    """Where the video begins on the token axis."""
    video, shown = math.prod(grid), "x".join(map(str, grid))
    if tokens == video:
        return NotVideo(f"the grid {shown} is a single frame") if grid[0] == 1 else 0
    if tokens < video:
        return NotVideo(f"its {tokens} tokens are not the {video} of the grid {shown}")
    if not program.facts.has("text_segment"):
        return Mismatch(
            f"{tokens} tokens, {video} of the grid {shown}; {program.facts.missing('text_segment')}"
        )
    start, length = program.facts.get("text_segment")
    if video + length != tokens or start not in (0, video):
        return Mismatch(
            f"{tokens} tokens are not the {video} of the grid {shown} with {length} of text at {start}"
        )
    return NotVideo(f"the grid {shown} is a single frame") if grid[0] == 1 else (length if start == 0 else 0)


def projections(node: fx.Node) -> set[fx.Node]:
    """What the nearest linear layers above a value read."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if op_name(current) in LINEAR_OPS and isinstance(current.args[0], fx.Node):
            found.add(current.args[0])
        else:
            pending.extend(current.all_input_nodes)
    return found


def _foreign_keys(q: fx.Node, k: fx.Node) -> str | None:
    """Why keys come from elsewhere than queries, None when they share a hidden state."""
    queries, keys = projections(q), projections(k)
    if not queries or not keys or queries & keys:
        return None
    names = sorted(n.name for n in queries)[0], sorted(n.name for n in keys)[0]
    return f"queries are projected from {names[0]} and keys from {names[1]}: cross-attention"


def _key_mask(program: Program, mask: fx.Node | None, start: int, video: int) -> KeyMask | str:
    """The mask as one over keys, or why it is none."""
    if mask is None:
        return KeyMask("none")
    value = tensor_of(mask)
    if value is None or value.dtype != torch.bool:
        return f"its mask {mask.name} is added to the scores: it cannot be intersected with a layout"
    shape = (1,) * (4 - value.dim()) + tuple(value.shape)
    if shape[2] != 1:
        return f"its mask {mask.name} {list(shape)} differs by query: it cannot be intersected with a layout"
    limit = _prefix(program, mask)
    if limit is not None and start == 0:
        node, least = limit
        if least >= video:
            return KeyMask("prefix", node)
    keeps = limit is not None and limit[1] >= start + video
    return KeyMask("columns", mask, keeps_video=keeps)


def _prefix(program: Program, mask: fx.Node) -> tuple[fx.Node, int] | None:
    """(limit [B], its least value) of a mask that keeps the keys below a limit, a count plus a number.

    It is spelled `masked_fill(ones, positions >= limit, False)`.
    """
    node = _behind_views(mask)
    parts: list[Any] = list(node.args)
    if op_name(node) != "masked_fill" or op_name(parts[0]) != "ones" or parts[2] not in (False, 0):
        return None
    compared: list[Any] = list(parts[1].args)
    if op_name(parts[1]) != "ge" or not isinstance(compared[1], fx.Node):
        return None
    positions, limit = _behind_views(compared[0]), _behind_views(compared[1])
    if not _counts_from_zero(program, positions):
        return None
    value = tensor_of(limit)
    if value is None or value.dim() != 1 or op_name(limit) != "add" or not isinstance(limit.args[1], int):
        return None
    count = limit.args[0]
    return (limit, limit.args[1]) if isinstance(count, fx.Node) and op_name(count) == "sum" else None


def _counts_from_zero(program: Program, node: fx.Node) -> bool:
    """True for 0, 1, 2, ..., computed or held."""
    if node.op != "get_attr":
        return op_name(node) == "arange" and tuple(node.args[:-1]) in ((), (0,))
    held = program.module.get_buffer(str(node.target)).flatten()
    return torch.equal(held, torch.arange(len(held), dtype=held.dtype))


def _behind_views(node: fx.Node) -> fx.Node:
    """The value behind axes of size one."""
    while op_name(node) in ("unsqueeze", "reshape", "view", "squeeze") and isinstance(node.args[0], fx.Node):
        before, after = tensor_of(node.args[0]), tensor_of(node)
        if before is None or after is None or before.numel() != after.numel():
            return node
        if [n for n in before.shape if n != 1] != [n for n in after.shape if n != 1]:
            return node
        node = node.args[0]
    return node


def sites(program: Program) -> list[tuple[fx.Node, VideoAttention | NotVideo | Mismatch]]:
    """Every attention with what it is, in graph order."""
    found: list[tuple[fx.Node, VideoAttention | NotVideo | Mismatch]] = []
    count = 0
    for node in attention_nodes(program):
        site = find_site(program, node, count)
        count += isinstance(site, VideoAttention)
        found.append((node, site))
    return found
