"""The token grid of an image or video model and its text segment, read off the shapes around the attention.

A grid is only believed when its product is the number of tokens that some self-attention sees, alone or
beside a text part: a shape that merely looks like a grid says nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from tilewright.compiler.blocks import BlockStructure
from tilewright.compiler.dataflow import Flow, op_name, tensor_of
from tilewright.compiler.segments import AttentionSite

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TokenGrid:
    """Tokens along T, Y and X, and where the text lies when attention is joint."""

    grid: Grid
    origin: str
    text: tuple[int, int] | None = None
    """(start, length) on the token axis of the joint attention."""
    text_origin: str = ""


@dataclass(frozen=True)
class _Source:
    """A node whose shape gives sizes of the grid; `frames` is None where they are counted by the product."""

    node: fx.Node
    frames: int | None
    rows: int
    columns: int
    what: str


def find_grid(flow: Flow, structure: BlockStructure) -> TokenGrid | str:
    """The grid, or the reason why there is none."""
    sites = _self_attentions(flow, structure)
    sources = _patch_embeddings(flow) + _mesh_grids(flow)
    if not sources:
        return "no 3-D or 2-D patch embedding and no mesh of three position ranges feeds an attention"
    tried = []
    for site, tokens in sites:
        for source in sources:
            if not flow.reaches(source.node, site.query):
                continue
            found = _fit(flow, site, tokens, source)
            if found is not None:
                return found
            tried.append(f"{source.what} against {tokens} tokens")
    if not tried:
        return "no self-attention with a static number of tokens reads a patch embedding"
    return f"no product fits: {'; '.join(dict.fromkeys(tried))}"


def _self_attentions(flow: Flow, structure: BlockStructure) -> list[tuple[AttentionSite, int]]:
    """The longest attentions with as many queries as keys, in graph order, and that number.

    Where the model has layers only their attentions count: a text refiner is none of them. Shorter ones
    belong to other resolutions (a U-Net) or to time and space apart; their grids are not the model's.
    """
    found = []
    for site in structure.attentions:
        query, output = tensor_of(site.query), tensor_of(site.node)
        if query is None or output is None or query.dim() < 3:
            continue
        queries = query.shape[-2]
        key = tensor_of(site.key)
        same = key is not None and queries in (key.shape[-2], key.shape[-1])
        if isinstance(queries, int) and same:
            found.append((site, queries))
    inside = [(s, n) for s, n in found if structure.layer_of(s.node) is not None]
    longest = max((n for _, n in inside or found), default=0)
    return [(s, n) for s, n in inside or found if n == longest]


def _patch_embeddings(flow: Flow) -> list[_Source]:
    """Convolutions whose static output may be a grid of tokens, in graph order."""
    found = []
    for node in flow.members(flow.live):
        name, out = op_name(node), tensor_of(node)
        stride = _strides(node)
        if out is None or not all(isinstance(n, int) for n in out.shape) or max(stride) == 1 == min(stride):
            continue
        if name in ("conv3d", "convolution") and out.dim() == 5:
            frames, rows, columns = out.shape[-3:]
            found.append(
                _Source(
                    node,
                    frames,
                    rows,
                    columns,
                    f"patch embedding {node.name} gives {frames}x{rows}x{columns}",
                )
            )
        elif name in ("conv2d", "convolution") and out.dim() == 4:
            rows, columns = out.shape[-2:]
            found.append(
                _Source(
                    node, None, rows, columns, f"patch embedding {node.name} gives {rows}x{columns} per frame"
                )
            )
    return found


def _strides(node: fx.Node) -> tuple[int, ...]:
    """Stride of a convolution; (1,) where it has none. A patch embedding strides, a later layer need not."""
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("stride", 1)
    return (
        tuple(value) if isinstance(value, (list, tuple)) else (int(value) if isinstance(value, int) else 1,)
    )


def _mesh_grids(flow: Flow) -> list[_Source]:
    """Meshes of three static position ranges, in the order of the mesh."""
    found = []
    for node in flow.members(flow.live):
        ranges = node.args[0] if op_name(node) == "meshgrid" and node.args else ()
        if not isinstance(ranges, (list, tuple)) or len(ranges) != 3 or "xy" in node.args:
            continue
        tensors = [tensor_of(r) for r in ranges]
        sizes = [t.shape[0] for t in tensors if t is not None and t.dim() == 1]
        if len(sizes) == 3 and all(isinstance(n, int) for n in sizes):
            what = f"meshgrid {node.name} spans {'x'.join(map(str, sizes))}"
            found.append(_Source(node, sizes[0], sizes[1], sizes[2], what))
    return found


def _fit(flow: Flow, site: AttentionSite, tokens: int, source: _Source) -> TokenGrid | None:
    """The grid when its product is the number of tokens, or that without a joined text part."""
    plane = source.rows * source.columns
    if source.frames is not None:
        options = [source.frames * plane]
    else:
        options = [n for n in _video_lengths(flow, site, tokens, source) if n and n % plane == 0]
    for length in options:
        grid = (length // plane, source.rows, source.columns)
        if not _keeps_batch(site, source, grid[0]):
            continue
        described = f"{source.what}; {math.prod(grid)} tokens"
        if length == tokens:
            return TokenGrid(grid, f"derived: {described} are the sequence at {site.node.name}")
        text = _text_part(flow, site, tokens, length, source)
        if text is not None:
            where = f"derived: joined with the grid at {text[1].name} before {site.node.name}"
            return TokenGrid(grid, f"derived: {described} of {tokens} at {site.node.name}", text[0], where)
    return None


def _keeps_batch(site: AttentionSite, source: _Source, frames: int) -> bool:
    """True when the patches of one batch entry are its tokens: a batch of images holds batch x frames."""
    made, query = tensor_of(source.node), tensor_of(site.query)
    if made is None or query is None or query.dim() != 4:
        return made is None or source.frames is not None or made.shape[0] % frames == 0
    return bool(made.shape[0] == query.shape[0] * (1 if source.frames is not None else frames))


def _video_lengths(flow: Flow, site: AttentionSite, tokens: int, source: _Source) -> list[int]:
    """How many tokens may come from the grid: all of them, or the parts that depend on its source."""
    lengths = [tokens]
    for cat in _joins(flow, site, tokens):
        parts = _parts(cat, tokens)
        lengths += [size for part, size in parts if flow.reaches(source.node, part)]
    return list(dict.fromkeys(lengths))


def _joins(flow: Flow, site: AttentionSite, tokens: int) -> list[fx.Node]:
    """Concatenations above a query whose result has that number of tokens, nearest first."""
    above = [n for n in flow.members(flow.upto(site.query)) if op_name(n) == "cat"]
    return [cat for cat in reversed(above) if _parts(cat, tokens)]


def _parts(cat: fx.Node, tokens: int) -> list[tuple[fx.Node, int]]:
    """The two parts of a concatenation to `tokens` tokens, with their lengths; empty for any other."""
    parts, out = cat.args[0], tensor_of(cat)
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    if out is None or not isinstance(parts, (list, tuple)) or len(parts) != 2 or not isinstance(dim, int):
        return []
    if out.shape[dim] != tokens or not isinstance(out.shape[dim], int):
        return []
    return [(p, t.shape[dim]) for p in parts if isinstance(p, fx.Node) and (t := tensor_of(p)) is not None]


def _text_part(
    flow: Flow, site: AttentionSite, tokens: int, video: int, source: _Source
) -> tuple[tuple[int, int], fx.Node] | None:
    """((start, length), join) of the part that does not come from the grid's source, None when unclear."""
    for cat in _joins(flow, site, tokens):
        (first, size), (second, rest) = _parts(cat, tokens)
        if {size, rest} != {video, tokens - video}:
            continue
        from_grid = [flow.reaches(source.node, part) for part in (first, second)]
        if from_grid == [True, False] and size == video:
            return (video, rest), cat
        if from_grid == [False, True] and rest == video:
            return (0, size), cat
        if size != rest:
            return ((video, rest) if size == video else (0, size)), cat
    return None
