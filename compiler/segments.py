"""Segments of a residual stream: their nodes, a hash of what they compute, and how they repeat."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from tilewright.compiler.dataflow import (
    CONV_OPS,
    Flow,
    is_attention,
    no_op_source,
    op_name,
    shape_key,
    tensor_of,
)
from tilewright.compiler.module_paths import module_path
from tilewright.compiler.residual import Chain

SELF, CROSS, MLP, CONV, MIXER = "self-attention", "cross-attention", "mlp", "conv", "mixer"
_PRODUCTS = frozenset({"bmm", "matmul", "baddbmm", "einsum"})
Range = tuple[int, int]


@dataclass(frozen=True)
class AttentionSite:
    """One attention: a whole op, or the last product of matmul, softmax, matmul."""

    node: fx.Node
    query: fx.Node
    key: fx.Node


@dataclass(frozen=True)
class Segment:
    """One step x -> x + f(x) of a stream. A parallel step has several kinds."""

    add: fx.Node
    mask: int
    signature: str
    """Equal for segments that compute the same function of stream, externals and weights of equal shapes."""
    heavy: tuple[tuple[str, int], ...]
    """How many of each heavy op it holds."""
    kinds: tuple[str, ...]
    path: str
    """Module path of the addition."""


@dataclass(frozen=True)
class Cut:
    """Where the blocks of a stream lie: ranges of segments, and the period they were found by."""

    ranges: tuple[Range, ...]
    paths: tuple[str, ...]
    """Module path of each block, empty strings where the capture holds none."""
    period: int = 0
    start: int = 0
    repeats: int = 0


def attention_sites(flow: Flow) -> list[AttentionSite]:
    """Every attention of a graph in graph order, raised or decomposed."""
    sites: dict[fx.Node, AttentionSite] = {}
    for node in flow.members(flow.live):
        if is_attention(node):
            q, k = (list(node.args) + [node.kwargs.get(n) for n in ("query", "key")])[:2]
            if isinstance(q, fx.Node) and isinstance(k, fx.Node):
                sites[node] = AttentionSite(node, q, k)
        elif op_name(node) in ("softmax", "_softmax"):
            site = _decomposed(flow, node)
            if site is not None:
                sites[site.node] = site
    return sorted(sites.values(), key=lambda s: flow.index[s.node])


def _decomposed(flow: Flow, softmax: fx.Node) -> AttentionSite | None:
    """Attention around a softmax: a product of two activations before it and a product with it after."""
    above = [n for n in flow.members(flow.upto(softmax) & flow.heavy)][::-1]
    scores = next((n for n in above if not flow.upto(softmax) & flow.below(n) & flow.heavy), None)
    after = next(flow.members(flow.below(softmax) & flow.heavy), None)
    if scores is None or after is None or op_name(scores) not in _PRODUCTS or op_name(after) not in _PRODUCTS:
        return None
    query, key = scores.all_input_nodes[-2:]
    if not (flow.upto(query) & flow.heavy and flow.upto(key) & flow.heavy):
        return None  # a product with a weight: a router or a classifier, not attention
    return AttentionSite(after, query, key)


def closure(flow: Flow, core: int, forbidden: int) -> int:
    """The core and every call all of whose users lie inside (transposed weights, modulation), repeatedly."""
    mask, pending, waiting = core, list(flow.members(core)), dict[int, int]()
    while pending:
        for source in pending.pop().all_input_nodes:
            i = flow.index[source]
            if source.op != "call_function" or (mask | forbidden) >> i & 1:
                continue
            waiting[i] = waiting.get(i, len(flow.users(source))) - 1
            if waiting[i] == 0:
                mask |= 1 << i
                pending.append(source)
    return mask


def signature(flow: Flow, mask: int, entry: fx.Node, exit_: fx.Node) -> str:
    """Hash of the function from entry to exit: ops and constants; externals count by shape and dtype only.

    Nodes are numbered in depth-first order from the exit, so that graph order does not matter; no-ops vanish.
    """

    def behind(node: fx.Node) -> fx.Node:
        source = no_op_source(node)
        while node is not entry and source is not None and mask >> flow.index[node] & 1:
            node, source = source, no_op_source(source)
        return node

    label: dict[fx.Node, str] = {entry: "entry"}
    rows: list[str] = []
    externals = 0
    stack = [behind(exit_)]
    while stack:
        node = stack[-1]
        if node in label:
            stack.pop()
        elif not mask >> flow.index[node] & 1:
            label[node] = _external(node, externals)
            externals += 1
        else:
            missing = [s for s in map(behind, node.all_input_nodes) if s not in label]
            if missing:
                stack.extend(reversed(missing))
                continue
            arguments = _render((node.args, node.kwargs), lambda n: label[behind(n)])
            rows.append(f"{node.target}{arguments}")
            label[node] = f"%{len(rows)}"
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def _external(node: fx.Node, number: int) -> str:
    tensor = tensor_of(node)
    kind = "value" if node.op == "call_function" else "input"
    described = f"{shape_key(tensor)} {tensor.dtype}" if tensor is not None else str(node.meta.get("val"))
    return f"{kind}{number}:{described}"


def _render(value: Any, name: Any) -> str:
    if isinstance(value, fx.Node):
        return str(name(value))
    if isinstance(value, (list, tuple)):
        return f"({','.join(_render(v, name) for v in value)})"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}={_render(v, name)}' for k, v in value.items())}}}"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def segments_of(flow: Flow, chain: Chain, forbidden: int, sites: Sequence[AttentionSite]) -> list[Segment]:
    """The segments of a stream; `forbidden` marks what belongs to streams and is never a helper."""
    found = []
    for i in chain.steps:
        mask = closure(flow, chain.core(flow, i, i + 1), forbidden)
        entry, add = chain.points[i], chain.adds[i]
        heavy = Counter(op_name(n) for n in flow.members(mask & flow.heavy))
        kinds = _kinds(flow, mask, entry, sites)
        shape = signature(flow, mask, entry, add)
        found.append(Segment(add, mask, shape, tuple(sorted(heavy.items())), kinds, module_path(add)))
    return found


def _kinds(flow: Flow, mask: int, entry: fx.Node, sites: Sequence[AttentionSite]) -> tuple[str, ...]:
    """What a segment computes: its attentions, and what stands beside them on the stream."""
    kinds: list[str] = []
    related = 0
    for site in sites:
        if mask >> flow.index[site.node] & 1:
            kinds.append(SELF if flow.reaches(entry, site.key) else CROSS)
            related |= flow.upto(site.node) | flow.below(site.node)
    beside = mask & flow.heavy & flow.below(entry) & ~related
    names = {op_name(n) for n in flow.members(beside)}
    if names & CONV_OPS:
        kinds.append(CONV)
    elif any(_is_mixing(flow, n) for n in flow.members(beside)):
        kinds.append(MIXER)
    elif names:
        kinds.append(MLP)
    return tuple(dict.fromkeys(kinds))


def _is_mixing(flow: Flow, node: fx.Node) -> bool:
    """True for a product of two activations outside attention (linear attention, state-space models)."""
    return op_name(node) in _PRODUCTS and all(flow.upto(n) & flow.heavy for n in node.all_input_nodes[-2:])


def find_period(signatures: Sequence[str]) -> tuple[int, int, int]:
    """(start, period, repeats >= 2) that covers most of a sequence, shortest period on a tie; else zeros."""
    numbers = {s: i for i, s in enumerate(dict.fromkeys(signatures))}
    row = [numbers[s] for s in signatures]
    best, covered = (0, 0, 0), 0
    for period in range(1, len(row) // 2 + 1):
        run = 0
        for i in range(period, len(row)):
            run = run + 1 if row[i] == row[i - period] else 0
            repeats = run // period + 1
            if repeats >= 2 and repeats * period > covered:
                covered = repeats * period
                best = (i + 1 - covered, period, repeats)
    return best


def cut_into_blocks(segments: Sequence[Segment]) -> Cut:
    """Ranges of segments that are blocks: by repetition, in phase with the modules where paths are known.

    Without paths a block begins at its first self-attention. Blocks at either end that hold the same heavy
    ops segment by segment are members although they differ in detail (first layers often do).
    """
    start, period, repeats = find_period([s.signature for s in segments])
    by_path = cut_by_path(segments)
    if not repeats:
        ranges, paths = by_path
        return Cut(ranges, paths)
    borders = {border for block in by_path[0] for border in block}
    end = start + period * repeats
    for phase in range(period):
        if borders.issuperset(range(start + phase, end + 1, period)):
            return Cut(*by_path, period, start, repeats)
    attention = [i for i in range(start, start + period) if SELF in segments[i].kinds]
    ranges = _aligned(segments, attention[0] if attention else start, period)
    return Cut(ranges, ("",) * len(ranges), period, start, repeats)


def _aligned(segments: Sequence[Segment], first: int, period: int) -> tuple[Range, ...]:
    """The block that begins at segment `first` and its like neighbours on both sides."""
    model = [s.heavy for s in segments[first : first + period]]

    def fits(at: int) -> bool:
        return at >= 0 and [s.heavy for s in segments[at : at + period]] == model

    begin, end = first, first
    while fits(begin - period):
        begin -= period
    while end + period <= len(segments) and fits(end):
        end += period
    return tuple((i, i + period) for i in range(begin, end, period))


def cut_by_path(
    segments: Sequence[Segment], containers: Collection[str] = ()
) -> tuple[tuple[Range, ...], tuple[str, ...]]:
    """Runs of segments under one numbered module (`model.layers.3`), and their paths.

    The module has numbered sisters in the stream, or lies in one of the given containers (`model.layers`),
    whose own numbers may differ: `stages.1.blocks` is one where `stages.0.blocks` is given.
    """
    known_forms = {_any_number(name) for name in containers}
    numbered = [_numbered_prefixes(s.path) for s in segments]
    sisters: dict[str, set[str]] = {}
    for prefixes in numbered:
        for prefix in prefixes:
            sisters.setdefault(prefix.rpartition(".")[0], set()).add(prefix)
    known = {name for name, found in sisters.items() if len(found) >= 2}
    known.update(name for name in sisters if _any_number(name) in known_forms)
    names = [next((p for p in prefixes if p.rpartition(".")[0] in known), "") for prefixes in numbered]
    ranges: list[Range] = []
    for i, name in enumerate(names):
        if name and i and names[i - 1] == name:
            ranges[-1] = (ranges[-1][0], i + 1)
        elif name:
            ranges.append((i, i + 1))
    return tuple(ranges), tuple(names[a] for a, _ in ranges)


def _any_number(path: str) -> str:
    """`stages.1.blocks` -> `stages.*.blocks`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _numbered_prefixes(path: str) -> list[str]:
    """`a.0.b.1.c` -> [`a.0`, `a.0.b.1`]."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
