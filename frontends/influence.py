"""Measuring how much each layer of a language model matters, on sample text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tilewright.compiler.blocks import find_blocks
from tilewright.compiler.calibration import fingerprint
from tilewright.compiler.diagnostics import CaptureError, OptionError
from tilewright.compiler.influence import Influence, LayerRun, Rule, Shifts, Streams
from tilewright.compiler.pipeline import RunOptions
from tilewright.compiler.program import Program
from tilewright.compiler.replay import tensors_in
from tilewright.frontends.api import next_token_loss
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.frontends.loaded_model import Call

Progress = Callable[[str], None]
"""progress(what was measured)."""


class _Capturing:
    """A backend that keeps the one program of a model and the inputs of each of its calls."""

    def __init__(self) -> None:
        self.program: Program | None = None
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.program is not None:
            raise CaptureError(
                "the model was captured as several graphs, or its samples have different shapes",
                remedy="give samples of one length to a model without graph breaks",
            )
        self.program = from_dynamo(gm, example_inputs)

        def run(*args: Any) -> Any:
            self.calls.append(args)
            return gm.forward(*args)

        return run


def captured_calls(module: nn.Module, calls: Sequence[Call]) -> tuple[Program, list[tuple[Any, ...]]]:
    """(the one program of all calls in normal form, its inputs at each); CaptureError for several."""
    capturing = _Capturing()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=capturing, dynamic=False)
    with torch.no_grad():
        for args, kwargs in calls:
            compiled(*args, **kwargs)
    torch._dynamo.reset()
    if capturing.program is None:
        raise CaptureError("nothing was captured", remedy="the call ran no tensor operation")
    normalize(capturing.program, RunOptions(replay=False))
    return capturing.program, capturing.calls


class _Measuring:
    """Perplexity of one program without some of its layers, over samples whose states are kept."""

    def __init__(self, program: Program, calls: Sequence[tuple[Any, ...]], tokens: Sequence[Tensor]) -> None:
        structure = find_blocks(program.graph, program.inputs)
        if structure.refusal:
            raise CaptureError(f"no layers: {structure.refusal}")
        for layer in structure.layers:
            for block, verdict in layer.failures():
                raise CaptureError(f"{block.name} cannot be left out: {verdict.rule}: {verdict.reason}")
        self.run, self.tokens = LayerRun(program, structure), tokens
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        self.states = [[dict(zip(placeholders, args, strict=True))] for args in calls]
        self.dropped: list[int] = []
        self.shifting = False
        """Whether the mean of the stream is restored where layers are dropped."""
        self.shifts: Shifts = {}
        self.streams = Streams.empty(len(structure.layers))
        self.perplexity = self._run(0, (), keep=True)
        for states in self.states:
            self.streams.take(self.run, states)
        self._means = [
            [self._mean(self.states, i + 2, block.exit) for block in layer.blocks]
            for i, layer in enumerate(structure.layers)
        ]

    def _run(self, start: int, dropped: Sequence[int], *, keep: bool) -> float:
        """Perplexity of all samples, run from a stage on; keep: also what every stage needs."""
        held = [states[: start + 1] for states in self.states]
        shifts = self._shifts_of(held, dropped) if self.shifting else {}
        total, count = 0.0, 0
        for i, (states, tokens) in enumerate(zip(held, self.tokens, strict=True)):
            result, found = self.run.run(len(states) - 1, states[-1], dropped, shifts)
            loss, seen = next_token_loss(logits_in(result), tokens)
            total, count = total + loss, count + seen
            if keep:
                self.states[i] = [*states[:-1], *found]
        if keep:
            self.shifts = shifts
        return _exp(total / count)

    def _shifts_of(self, held: list[list[dict[fx.Node, Any]]], dropped: Sequence[int]) -> Shifts:
        """What restores the mean behind each dropped layer; `held` is run on to the last of them."""
        start = len(held[0]) - 1
        shifts = {n: rows for n, rows in self.shifts.items() if n + 1 < start}
        for layer in sorted(n for n in dropped if n + 1 >= start):
            for states in held:
                states[-1:] = self.run.run(len(states) - 1, states[-1], dropped, shifts, stop=layer + 1)[1]
            shifts[layer] = [
                wanted - self._mean(held, layer + 1, block.entry)
                for wanted, block in zip(self._means[layer], self.run.layers[layer].blocks, strict=True)
            ]
        return shifts

    @staticmethod
    def _mean(held: list[list[dict[fx.Node, Any]]], stage: int, node: fx.Node) -> Tensor:
        """The mean over all tokens of what a stage needs; float64 [C]."""
        return torch.cat([states[stage][node].flatten(0, -2).double() for states in held]).mean(0)

    def without(self, layer: int) -> float:
        """Perplexity when this layer is left out beside those already dropped."""
        return self._run(layer + 1, [*self.dropped, layer], keep=False)

    def drop(self, layer: int) -> float:
        """Leave a layer out for good; returns the perplexity."""
        self.dropped.append(layer)
        return self._run(layer + 1, self.dropped, keep=True)

    def together(self, layers: Sequence[int]) -> float:
        """Leave several layers out; returns the perplexity."""
        self.dropped.extend(layers)
        return self._run(min(layers) + 1, self.dropped, keep=True)

    def restore(self) -> None:
        """All layers again."""
        first = min(self.dropped, default=None)
        self.dropped, self.shifts = [], {}
        if first is not None:
            self._run(first + 1, (), keep=True)


def measure_influence(
    module: nn.Module,
    calls: Iterable[Call],
    *,
    count: int = 4,
    rules: Sequence[Rule] = ("influence", "perplexity"),
    pool: int = 12,
    source: str = "",
    progress: Progress | None = None,
) -> Influence:
    """Block influence of every layer, and perplexities when up to `count` layers are dropped.

    calls: (args, kwargs) with `input_ids` [B, S] of one length. Rule `influence` drops the layers of least
    influence; rule `perplexity` drops, one at a time, the layer whose loss raises perplexity least, out of
    the `pool` remaining layers of least influence; rule `shifted` does so with the mean of the stream put
    back behind every dropped layer to what it is in the whole model. Raises OptionError, CaptureError.
    """
    given = list(calls)
    if not given or count < 0 or pool < 1:
        raise OptionError(
            f"{len(given)} samples, count = {count}, pool = {pool}: expected 1, 0 and 1 or more"
        )
    program, samples = captured_calls(module, given)
    with torch.no_grad():
        measuring = _Measuring(program, samples, [kwargs["input_ids"] for _, kwargs in given])
        layers = len(measuring.run.layers)
        if count >= layers:
            raise OptionError(f"count = {count}: the model has {layers} layers")
        sums = measuring.streams
        found = Influence(
            fingerprint(program),
            source,
            sums.tokens,
            measuring.perplexity,
            (1.0 - sums.cosine / sums.tokens).tolist(),
            (sums.after / sums.before).sqrt().tolist(),
        )
        for rule in rules:
            measuring.shifting = rule == "shifted"
            found.orders[rule] = _order(measuring, found, rule, count, pool, progress)
            measuring.restore()
    return found


def perplexities_without(
    module: nn.Module, calls: Iterable[Call], sets: Iterable[Sequence[int]]
) -> Iterator[tuple[Sequence[int], float]]:
    """(layers, perplexity without them) for the empty set and then each of `sets`.

    calls: as for `measure_influence`. Raises CaptureError, and OptionError for a layer that does not exist.
    """
    given = list(calls)
    program, samples = captured_calls(module, given)
    with torch.no_grad():
        measuring = _Measuring(program, samples, [kwargs["input_ids"] for _, kwargs in given])
        yield (), measuring.perplexity
        for layers in sets:
            wrong = [n for n in layers if not 0 <= n < len(measuring.run.layers)]
            if wrong or not layers or len(set(layers)) != len(layers):
                raise OptionError(
                    f"layers {list(layers)}: expected different numbers, 0 to {len(measuring.run.layers) - 1}"
                )
            yield layers, measuring.together(layers)
            measuring.restore()


def _order(
    measuring: _Measuring, found: Influence, rule: Rule, count: int, pool: int, progress: Progress | None
) -> list[tuple[int, float]]:
    ranked = sorted(range(len(found.influence)), key=found.influence.__getitem__)
    order: list[tuple[int, float]] = []
    for _ in range(count):
        left = [n for n in ranked if n not in measuring.dropped]
        layer = left[0] if rule == "influence" else min(left[:pool], key=measuring.without)
        order.append((layer, measuring.drop(layer) / found.perplexity))
        if measuring.shifting:
            rows = [measuring.shifts[n] for n in measuring.dropped]
            found.shifts.append([[row.tolist() for row in blocks] for blocks in rows])
        if progress is not None:
            progress(f"{rule}: {len(order)} dropped, layer {layer}, perplexity x {order[-1][1]:.3f}")
    return order


def logits_in(result: Any) -> Tensor:
    """The model's logits among what it returned; CaptureError without any."""
    for tensor in tensors_in(result):
        if tensor.is_floating_point() and tensor.dim() == 3:
            return tensor
    raise CaptureError("the model returned no logits [B, S, V]")


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
