"""Fitting linear maps that stand in for dropped layers of a language model, and choosing the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tilewright.compiler.blocks import Block, find_blocks
from tilewright.compiler.calibration import fingerprint
from tilewright.compiler.diagnostics import CaptureError, OptionError
from tilewright.compiler.influence import Hooks, LayerRun, Streams
from tilewright.compiler.program import Program
from tilewright.compiler.schema import arguments
from tilewright.compiler.stand_in import RidgeSums, StandIn, StandIns, front_of, stretches
from tilewright.frontends.api import next_token_loss
from tilewright.frontends.influence import Progress, captured_calls, logits_in
from tilewright.frontends.loaded_model import Call

RIDGES = (0.1, 0.001, 0.01, 1.0)
"""Tried for the chosen layers; the first of them chooses."""


@dataclass(frozen=True)
class _Candidate:
    """Layers that may be dropped, and what stands in for those stretches of them that are fitted."""

    spans: tuple[tuple[int, int], ...]
    sums: tuple[tuple[RidgeSums, ...], ...] = ()
    """By stretch and block."""

    @property
    def dropped(self) -> list[int]:
        return [n for first, last in self.spans for n in range(first, last + 1)]

    def maps(self, fronts: _Fronts, ridge: float) -> list[StandIn]:
        """The maps of the stretches fitted so far."""
        return [
            StandIn(*span, fronts.used(span[0]), tuple(_single(s.solve(ridge)) for s in sums))
            for span, sums in zip(self.spans, self.sums, strict=False)
        ]


class _Fronts:
    """What the maps read."""

    def __init__(self, program: Program) -> None:
        self.structure = find_blocks(program.graph, program.inputs)
        if self.structure.refusal:
            raise CaptureError(f"no layers: {self.structure.refusal}")

    def blocks(self, layer: int) -> tuple[Block, ...]:
        return self.structure.layers[layer].blocks

    def used(self, layer: int) -> bool:
        """Whether every block of a layer has a linear layer in front that takes a map for nothing."""
        return all(front_of(self.structure, block) is not None for block in self.blocks(layer))

    def read(self, layer: int, block: Block) -> fx.Node:
        """What the map in front of a block reads."""
        node = front_of(self.structure, block) if self.used(layer) else None
        found: fx.Node = block.entry if node is None else arguments(node)["x"]
        return found

    def hooks(self, maps: Sequence[StandIn]) -> Hooks:
        """What adds the maps to the streams where the layers are left out."""
        found: dict[fx.Node, Callable[[Any], Any]] = {}
        kept: dict[fx.Node, Any] = {}
        for one in maps:
            for block, (weight, bias) in zip(self.blocks(one.first), one.maps, strict=True):
                node = self.read(one.first, block)
                found[node] = partial(_keep, kept, node)
                found[block.exit] = partial(_added, kept, node, weight, bias)
        return found


def _keep(kept: dict[fx.Node, Any], node: fx.Node, value: Any) -> Any:
    kept[node] = value
    return value


def _added(kept: dict[fx.Node, Any], node: fx.Node, weight: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    return value + F.linear(kept[node].float(), weight, bias).to(value.dtype)


def _single(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].float(), pair[1].float()


class _Fitting:
    """One program, the samples to fit on and those to choose by."""

    def __init__(
        self, program: Program, calls: Sequence[tuple[Any, ...]], held: int, tokens: Sequence[Tensor]
    ) -> None:
        self.fronts = _Fronts(program)
        self.run = LayerRun(program, self.fronts.structure)
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        rows = [dict(zip(placeholders, args, strict=True)) for args in calls]
        self.fit, given = rows[:-held], rows[-held:]
        self.tokens = tokens[-held:]
        self.streams = Streams.empty(len(self.run.layers))
        self.states = []
        for row in given:
            states = self.run.run(0, row)[1]
            self.streams.take(self.run, states)
            self.states.append(states)
        self.perplexity = self.held_out([], [], start=len(self.run.layers))

    def held_out(self, dropped: Sequence[int], maps: Sequence[StandIn], start: int) -> float:
        """Perplexity of the samples to choose by, run from a stage on."""
        total, count = 0.0, 0
        for states, tokens in zip(self.states, self.tokens, strict=True):
            hooks = self.fronts.hooks(maps)
            result, _ = self.run.run(start, states[start], dropped, hooks=hooks)
            loss, seen = next_token_loss(logits_in(result), tokens)
            total, count = total + loss, count + seen
        return math.exp(min(total / count, 700.0))

    def ratio(self, candidate: _Candidate, ridge: float) -> float:
        """Perplexity without a candidate's layers, over that of the whole model."""
        start = max(0, candidate.spans[0][0])  # the layer in front runs: the map reads in there
        return self.held_out(candidate.dropped, candidate.maps(self.fronts, ridge), start) / self.perplexity

    def fitted(self, candidates: Sequence[_Candidate], ridge: float) -> list[_Candidate]:
        """The candidates with every stretch fitted, the shallowest first, in as many runs over the samples
        as the longest has stretches. What a later stretch reads has seen the maps of those before."""
        done = list(candidates)
        for turn in range(max(len(c.spans) for c in done)):
            active = [i for i, c in enumerate(done) if turn < len(c.spans)]
            sums = {i: self._empty(done[i].spans[turn][0]) for i in active}
            for row in self.fit:
                self._take(row, {i: done[i] for i in active}, turn, sums, ridge)
            for i in active:
                done[i] = replace(done[i], sums=(*done[i].sums, sums[i]))
        return done

    def _empty(self, layer: int) -> tuple[RidgeSums, ...]:
        sizes = [(self.fronts.read(layer, b), b.entry) for b in self.fronts.blocks(layer)]
        return tuple(RidgeSums(*(int(n.meta["val"].shape[-1]) for n in pair)) for pair in sizes)

    def _take(
        self,
        row: dict[fx.Node, Any],
        candidates: dict[int, _Candidate],
        turn: int,
        sums: dict[int, tuple[RidgeSums, ...]],
        ridge: float,
    ) -> None:
        """Add one sample to the sums of each candidate's stretch number `turn`."""
        wanted: set[fx.Node] = set()
        for candidate in candidates.values():
            first, last = candidate.spans[turn]
            for begin, end in zip(self.fronts.blocks(first), self.fronts.blocks(last), strict=True):
                wanted |= {self.fronts.read(first, begin), begin.entry, end.exit}
        whole = self._values(row, wanted, max(c.spans[turn][1] for c in candidates.values()) + 2)
        for i, candidate in candidates.items():
            first, last = candidate.spans[turn]
            seen = whole
            if turn:
                before = [n for a, b in candidate.spans[:turn] for n in range(a, b + 1)]
                maps = candidate.maps(self.fronts, ridge)
                seen = self._values(row, wanted, first + 1, before, self.fronts.hooks(maps))
            pairs = zip(self.fronts.blocks(first), self.fronts.blocks(last), sums[i], strict=True)
            for begin, end, into in pairs:
                target = whole[end.exit].flatten(0, -2).double()
                entry = seen[begin.entry].flatten(0, -2).double()
                weight = target.square().mean(1).clamp_min(torch.finfo(torch.float64).tiny).reciprocal()
                into.take(seen[self.fronts.read(first, begin)].flatten(0, -2), target - entry, weight)

    def _values(
        self,
        row: dict[fx.Node, Any],
        wanted: set[fx.Node],
        stop: int,
        dropped: Sequence[int] = (),
        hooks: Hooks | None = None,
    ) -> dict[fx.Node, Any]:
        """What some nodes give in a run that stops in front of a stage."""
        kept: dict[fx.Node, Any] = {}
        also = dict(hooks or {})
        for node in wanted:
            also[node] = partial(_after, also.get(node), kept, node)
        self.run.run(0, row, dropped, stop=stop, hooks=also)
        return kept


def _after(hook: Callable[[Any], Any] | None, kept: dict[fx.Node, Any], node: fx.Node, value: Any) -> Any:
    return _keep(kept, node, value if hook is None else hook(value))


def measure_stand_ins(
    module: torch.nn.Module,
    calls: Iterable[Call],
    *,
    held: int,
    count: int = 4,
    layers: Sequence[int] = (),
    pool: int = 8,
    ridges: Sequence[float] = RIDGES,
    source: str = "",
    progress: Progress | None = None,
) -> StandIns:
    """The layers to drop and the linear maps in their places.

    calls: (args, kwargs) with `input_ids` [B, S] of one length; the last `held` of them choose, the others
    are fitted on. layers: drop these, each run of adjacent ones with a map of its own; without them `count`
    adjacent layers are chosen, by perplexity with the map in their place, out of the `pool` runs of least
    block influence. ridges: strengths, in units of the mean variance of what the map reads; the first
    chooses the layers, and the best is kept. Raises OptionError, CaptureError.
    """
    given = list(calls)
    if not 1 <= held < len(given) or pool < 1 or not ridges or not all(0 < r < math.inf for r in ridges):
        raise OptionError(
            f"{len(given)} samples, held = {held}, pool = {pool}, ridges = {tuple(ridges)}: expected fewer "
            "held than samples, at least 1 each, and ridges above 0"
        )
    program, samples = captured_calls(module, given)
    with torch.no_grad():
        fitting = _Fitting(program, samples, held, [kwargs["input_ids"] for _, kwargs in given])
        candidates = fitting.fitted(_candidates(fitting, count, layers, pool), ridges[0])
        best, ratio = candidates[0], math.inf
        for candidate in candidates:
            found = fitting.ratio(candidate, ridges[0])
            if progress is not None:
                progress(f"linear: without {candidate.dropped}, perplexity x {found:.3f}")
            if found < ratio:
                best, ratio = candidate, found
        ridge = ridges[0]
        for other in ridges[1:]:
            # What a later stretch reads depends on the ridge of those before.
            again = len(best.spans) > 1
            tried = fitting.fitted([replace(best, sums=())], other)[0] if again else best
            found = fitting.ratio(tried, other)
            if progress is not None:
                progress(f"linear: ridge {other:g}, perplexity x {found:.3f}")
            if found < ratio:
                best, ridge, ratio = tried, other, found
        fitted_on = sum(int(kwargs["input_ids"].numel()) for _, kwargs in given[:-held])
        maps = best.maps(fitting.fronts, ridge)
    return StandIns(fingerprint(program), len(fitting.run.layers), ratio, ridge, fitted_on, source, maps)


def _candidates(fitting: _Fitting, count: int, layers: Sequence[int], pool: int) -> list[_Candidate]:
    """The layers named, or the runs of `count` adjacent layers of least influence."""
    total = len(fitting.run.layers)
    if layers:
        if len(set(layers)) != len(layers) or not all(0 <= n < total for n in layers) or len(layers) == total:
            raise OptionError(
                f"layers {list(layers)}: expected different numbers, 0 to {total - 1}, and not all of them"
            )
        for n in layers:
            for block, verdict in fitting.run.layers[n].failures():
                raise CaptureError(f"{block.name} cannot be left out: {verdict.rule}: {verdict.reason}")
        return [_Candidate(tuple(stretches(layers)))]
    if not 1 <= count < total:
        raise OptionError(f"count = {count}: expected 1 to {total - 1}, the model has {total} layers")
    influence = (1.0 - fitting.streams.cosine / fitting.streams.tokens).tolist()
    fixed = {layer.index for layer in fitting.run.layers if layer.failures()}
    free = [n for n in range(total - count + 1) if not fixed & set(range(n, n + count))]
    if not free:
        raise CaptureError(f"no {count} adjacent layers can be left out")
    runs = sorted(free, key=lambda n: sum(influence[n : n + count]))
    return [_Candidate(((n, n + count - 1),)) for n in runs[:pool]]
