"""Repeated blocks of a model: found on the residual streams of its graph, named by module paths if present.

The graph must be functional: a cache that is written in place hides the data flow from its keys to the
attention that reads them, and the rules of `legality` say so for each block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from tilewright.compiler.dataflow import Flow, is_mutating
from tilewright.compiler.legality import BlockFacts, LiveOut, RuleVerdict, Surroundings, judge, live_outs
from tilewright.compiler.program import InputKind, InputSpec
from tilewright.compiler.residual import Chain, find_chains
from tilewright.compiler.segments import (
    AttentionSite,
    Cut,
    Segment,
    attention_sites,
    closure,
    cut_by_path,
    cut_into_blocks,
    segments_of,
    signature,
)
from tilewright.compiler.step_input import step_masks


@dataclass(frozen=True)
class Block:
    """A run of segments of one stream with one entry and one exit value."""

    name: str
    """Module path of the block, or `stream 0 block 3` where the capture holds none."""
    stream: int
    span: tuple[int, int]
    """First segment and the one after the last, as positions in the stream."""
    path: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    """Graph order: all from entry to exit, exit included, and helpers that serve this block alone."""
    segments: tuple[Segment, ...]
    signature: str
    typical: bool
    """It computes the same function as most blocks of its stream."""
    parameters: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    """Arguments of the call that the block reads itself (a mask, a timestep)."""
    state: tuple[fx.Node, ...]
    """Placeholders that the program writes to and the block reads or writes."""
    shared: tuple[fx.Node, ...]
    """Computed values from outside besides the entry: rotary tables, masks, modulation, encoder states."""
    live_outs: tuple[LiveOut, ...]
    coupled: tuple[str, ...]
    """Names of the blocks of other streams that share an attention with this one."""
    legality: tuple[RuleVerdict, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its segments in order."""
        return tuple(kind for segment in self.segments for kind in segment.kinds)

    def verdict(self, rule: str) -> RuleVerdict:
        """The verdict of one rule, `L1` to `L7`."""
        return next(v for v in self.legality if v.rule == rule)


@dataclass(frozen=True)
class Stream:
    """One residual stream and its blocks."""

    index: int
    points: tuple[fx.Node, ...]
    """The stream's value before each segment, and after the last."""
    segments: tuple[Segment, ...]
    blocks: tuple[Block, ...]
    start: int
    period: int
    repeats: int
    """Longest exact repetition: `repeats` times `period` segments from segment `start`; zeros when none."""
    inside: int | None = None
    """The stream in one of whose segments this one lies wholly."""


@dataclass(frozen=True)
class Layer:
    """One layer of the model: a block, or blocks of coupled streams that are only legal together."""

    index: int
    blocks: tuple[Block, ...]

    @property
    def path(self) -> str:
        return self.blocks[0].path

    def failures(self) -> list[tuple[Block, RuleVerdict]]:
        """What forbids to bypass the layer; taking all its blocks meets L5, and L7 is for caching only."""
        return [(b, v) for b in self.blocks for v in b.legality if not v.ok and v.rule not in ("L5", "L7")]


@dataclass(frozen=True)
class BlockStructure:
    """The streams of a graph and its layers in order of execution."""

    streams: tuple[Stream, ...] = ()
    layers: tuple[Layer, ...] = ()
    attentions: tuple[AttentionSite, ...] = ()
    refusal: str = ""
    """Why no layers are given, empty when there are some."""
    _by_node: dict[fx.Node, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for layer in self.layers for block in layer.blocks)

    def layer_of(self, node: fx.Node) -> int | None:
        """Index of the layer a node belongs to, None outside the layers."""
        return self._by_node.get(node)


@dataclass
class _Draft:
    """A block before it is coupled and judged."""

    name: str
    stream: int
    span: tuple[int, int]
    path: str
    mask: int
    reads: int
    """Mask of the operands of its nodes."""
    signature: str
    partners: dict[str, int] = field(default_factory=dict)
    """Names of coupled blocks -> their masks with their entries."""


def find_blocks(
    graph: fx.Graph, inputs: Sequence[InputSpec] = (), flow: Flow | None = None
) -> BlockStructure:
    """The residual streams, blocks and layers of a functional graph with `meta["val"]`.

    `inputs` describes the placeholders (a Program's `inputs`): with it a block's placeholders are told apart
    into parameters, arguments and state; without it all that is not written to counts as a parameter.
    `flow` is the graph's reachability where the caller has it already.
    """
    foreign = next((n for n in graph.nodes if n.op in ("call_module", "call_method")), None)
    if foreign is not None:
        return BlockStructure(refusal=f"{foreign.name} is a {foreign.op}: the graph is not in normal form")
    flow = flow or Flow(graph)
    chains = find_chains(flow)
    sites = tuple(attention_sites(flow))
    if not chains:
        return BlockStructure(
            attentions=sites, refusal="no residual stream: no value is added to a function of itself"
        )
    finder = _Finder(flow, chains, sites, inputs)
    return finder.structure()


class _Finder:
    """One search; holds what its steps share."""

    def __init__(
        self, flow: Flow, chains: list[Chain], sites: tuple[AttentionSite, ...], inputs: Sequence[InputSpec]
    ) -> None:
        self.flow, self.chains, self.sites = flow, chains, sites
        self.cores = [chain.core(flow, 0, len(chain.adds)) | flow.bit(chain.points[0]) for chain in chains]
        self.streams_mask, below = 0, 0
        for chain, core in zip(chains, self.cores, strict=True):
            self.streams_mask |= core
            below |= core | flow.below(chain.points[0])
        kinds = {spec.name: spec for spec in inputs}
        held = [n for n in flow.nodes if n.op in ("placeholder", "get_attr")]
        written = {n.args[0] for n in flow.nodes if is_mutating(n)}
        self.state = {n for n in held if n in written or (n.name in kinds and kinds[n.name].mutated)}
        self.arguments = {
            n
            for n in held
            if n not in self.state and n.name in kinds and kinds[n.name].kind is not InputKind.WEIGHT
        }
        self.around = Surroundings(
            flow,
            {point: i for i, chain in enumerate(chains) for point in chain.points},
            {chain.points[-1] for chain in chains},
            *step_masks(flow),
            below,
        )

    def structure(self) -> BlockStructure:
        """Cut, couple, judge, and gather into layers."""
        rows = [segments_of(self.flow, chain, self.streams_mask, self.sites) for chain in self.chains]
        found = [(segments, cut) for segments, cut in zip(rows, _cut_all(rows), strict=True)]
        drafts: list[list[_Draft]] = []
        for i, (_, cut) in enumerate(found):
            spans = zip(cut.ranges, cut.paths, strict=True)
            drafts.append([self._draft(i, span, path, n) for n, (span, path) in enumerate(spans)])
        _make_names_unique([draft for row in drafts for draft in row])
        self._couple([draft for row in drafts for draft in row])
        streams = []
        for i, (segments, cut) in enumerate(found):
            blocks = self._blocks(segments, drafts[i])
            points = tuple(self.chains[i].points)
            repeated = (cut.start, cut.period, cut.repeats)
            streams.append(Stream(i, points, tuple(segments), blocks, *repeated, self._inside(i)))
        layers = self._layers(streams)
        refusal = self._refusal(streams, layers)
        if refusal:
            return BlockStructure(tuple(streams), attentions=self.sites, refusal=refusal)
        by_node = {node: layer.index for layer in layers for block in layer.blocks for node in block.nodes}
        return BlockStructure(tuple(streams), tuple(layers), self.sites, "", by_node)

    def _draft(self, stream: int, span: tuple[int, int], path: str, number: int) -> _Draft:
        chain = self.chains[stream]
        mask = closure(self.flow, chain.core(self.flow, *span), self.streams_mask)
        shape = signature(self.flow, mask, chain.points[span[0]], chain.adds[span[1] - 1])
        reads = 0
        for node in self.flow.members(mask):
            for source in node.all_input_nodes:
                reads |= self.flow.bit(source)
        return _Draft(path or f"stream {stream} block {number}", stream, span, path, mask, reads, shape)

    def _inside(self, stream: int) -> int | None:
        """The stream one of whose segments holds this stream wholly."""
        own = self.cores[stream]
        for other, chain in enumerate(self.chains):
            if other != stream and any(not own & ~chain.core(self.flow, i, i + 1) for i in chain.steps):
                return other
        return None

    def _couple(self, drafts: Sequence[_Draft]) -> None:
        """Record the blocks of different streams that share nodes or read each other's inner values."""
        nests = [self._nest(i) for i in range(len(self.chains))]
        for i, a in enumerate(drafts):
            for b in drafts[i + 1 :]:
                if a.stream == b.stream or b.stream in nests[a.stream] or a.stream in nests[b.stream]:
                    continue
                if a.mask & b.mask or a.reads & self._inner(b) or b.reads & self._inner(a):
                    a.partners[b.name] = b.mask | self.flow.bit(self.chains[b.stream].points[b.span[0]])
                    b.partners[a.name] = a.mask | self.flow.bit(self.chains[a.stream].points[a.span[0]])

    def _nest(self, stream: int) -> set[int]:
        """The streams around a stream."""
        around: set[int] = set()
        outer = self._inside(stream)
        while outer is not None and outer not in around:
            around.add(outer)
            outer = self._inside(outer)
        return around

    def _inner(self, draft: _Draft) -> int:
        return draft.mask & ~self.flow.bit(self.chains[draft.stream].points[draft.span[1]])

    def _blocks(self, segments: Sequence[Segment], drafts: Sequence[_Draft]) -> tuple[Block, ...]:
        usual = Counter(draft.signature for draft in drafts).most_common(1)
        return tuple(self._block(d, segments, d.signature == usual[0][0]) for d in drafts)

    def _block(self, draft: _Draft, segments: Sequence[Segment], typical: bool) -> Block:
        chain, flow = self.chains[draft.stream], self.flow
        entry, exit_ = (chain.points[i] for i in draft.span)
        nodes = tuple(flow.members(draft.mask))
        read = dict.fromkeys(
            source
            for node in nodes
            for source in node.all_input_nodes
            if source is not entry and not draft.mask >> flow.index[source] & 1
        )
        outs = tuple(live_outs(self.around, draft.mask, exit_, self.state))
        written = {u.args[0] for out in outs for u in out.users if is_mutating(u)}
        state = tuple(n for n in flow.nodes if n in self.state and (n in read or n in written))
        inputs = tuple(n for n in read if n in self.arguments)
        shared = tuple(n for n in read if n.op == "call_function")
        held = tuple(n for n in read if n not in self.state and n not in self.arguments and n not in shared)
        facts = BlockFacts(draft.mask, entry, exit_, draft.path, tuple(read), draft.partners)
        return Block(
            name=draft.name,
            stream=draft.stream,
            span=draft.span,
            path=draft.path,
            entry=entry,
            exit=exit_,
            nodes=nodes,
            segments=tuple(segments[slice(*draft.span)]),
            signature=draft.signature,
            typical=typical,
            parameters=held,
            inputs=inputs,
            state=state,
            shared=shared,
            live_outs=outs,
            coupled=tuple(draft.partners),
            legality=judge(self.around, facts, outs),
        )

    def _layers(self, streams: Sequence[Stream]) -> list[Layer]:
        """Blocks grouped by coupling, in order; streams around other streams' blocks are left to those.

        What precedes the first coupled block of a stream is a prelude (a text refiner), not a layer.
        """
        outer = {s.inside for s in streams if s.blocks}
        groups: list[list[Block]] = []
        placed: set[str] = set()
        by_name = {b.name: b for s in streams if s.index not in outer for b in s.blocks}
        for stream in streams:
            joined = [i for i, b in enumerate(stream.blocks) if b.coupled]
            for block in stream.blocks[joined[0] if joined else 0 :]:
                if block.name in by_name and block.name not in placed:
                    group = _together(block, by_name)
                    placed.update(b.name for b in group)
                    groups.append(group)
        groups.sort(key=lambda g: min(self.flow.index[b.exit] for b in g))
        return [Layer(i, tuple(group)) for i, group in enumerate(groups)]

    def _refusal(self, streams: Sequence[Stream], layers: Sequence[Layer]) -> str:
        lengths = ", ".join(str(len(s.segments)) for s in streams)
        if not layers:
            return f"no block repeats along the residual streams (additions in each: {lengths})"
        inside = 0
        for layer in layers:
            for block in layer.blocks:
                for node in block.nodes:
                    inside |= self.flow.bit(node)
        covered, total = (inside & self.flow.heavy).bit_count(), self.flow.heavy.bit_count()
        skips = [
            v.reason
            for layer in layers
            for b in layer.blocks
            for v in b.legality
            if v.rule == "L3" and not v.ok
        ]
        if skips and 2 * covered < total:
            return (
                f"no single residual stream runs through the model (additions in each: {lengths}); the "
                f"repeated blocks hold {covered} of {total} heavy ops and their values skip ahead: {skips[0]}"
            )
        return ""


def _cut_all(rows: Sequence[Sequence[Segment]]) -> list[Cut]:
    """The blocks of each stream; one without repetition has blocks where another's modules run through it.

    The text stream of a model with two coupled layers may hold only one of them.
    """
    cuts = [cut_into_blocks(segments) for segments in rows]
    containers = {path.rpartition(".")[0] for cut in cuts for path in cut.paths if path}
    return [
        cut if cut.ranges else Cut(*cut_by_path(segments, containers))
        for segments, cut in zip(rows, cuts, strict=True)
    ]


def _make_names_unique(drafts: Sequence[_Draft]) -> None:
    """Coupled streams run through the same modules: say the stream where a name occurs twice."""
    counts = Counter(draft.name for draft in drafts)
    for draft in drafts:
        if counts[draft.name] > 1:
            draft.name = f"{draft.name} (stream {draft.stream})"


def _together(block: Block, by_name: dict[str, Block]) -> list[Block]:
    """A block and all that is coupled with it, the longest stream first."""
    group, pending = {block.name: block}, [block]
    while pending:
        for name in pending.pop().coupled:
            if name in by_name and name not in group:
                group[name] = by_name[name]
                pending.append(by_name[name])
    return sorted(group.values(), key=lambda b: b.stream)
