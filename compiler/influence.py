"""How much each layer of a model matters, measured on sample data: what `drop-layers` chooses by.

Block influence (arXiv:2403.03853) is 1 - cos between a layer's input and output; beside it the perplexity
after leaving layers out, one after the other. Files are JSON and carry a fingerprint of the model's weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, fx

from tilewright.compiler.blocks import BlockStructure
from tilewright.compiler.calibration import fingerprint
from tilewright.compiler.diagnostics import FactError, LoadError, OptionError
from tilewright.compiler.program import Program
from tilewright.compiler.whole_file import written_whole

FORMAT = "tilewright-influence-1"
Rule = Literal["influence", "perplexity", "shifted"]
Shifts = Mapping[int, Sequence[Tensor]]
"""Dropped layer -> what is added to the stream [C] where it was, for each of its blocks."""
Hooks = Mapping[fx.Node, Callable[[Any], Any]]
"""Node -> what its value becomes; called once for each time that the node runs."""
_MAX_BYTES = 16 << 20


@dataclass
class Influence:
    """Measurements of one model's layers over one set of samples."""

    fingerprint: str
    source: str = ""
    tokens: int = 0
    perplexity: float = 0.0
    """Of the whole model on the samples."""
    influence: list[float] = field(default_factory=list)
    """1 - mean cosine of each layer's input and output."""
    gain: list[float] = field(default_factory=list)
    """RMS of each layer's output over that of its input."""
    orders: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Rule -> layers in the order of dropping, each with the perplexity ratio once it is gone too."""
    shifts: list[list[list[list[float]]]] = field(default_factory=list)
    """Rule `shifted`, without its first layer, its first two, ...: for each of these layers and each of its
    blocks, what is added where it was: the mean of the stream is then that of the whole model."""

    def chosen(self, count: int, rule: str) -> tuple[list[int], float]:
        """(the `count` layers to drop, the perplexity ratio measured without them)."""
        order = self.orders.get(rule, [])
        if count > len(order):
            raise OptionError(
                f"count = {count}: the rule {rule!r} was measured for {len(order)} dropped layers",
                remedy="measure more, or drop fewer",
            )
        return [layer for layer, _ in order[:count]], order[count - 1][1] if count else 1.0

    def shifts_of(self, count: int) -> Shifts:
        """What goes in the place of the first `count` layers of rule `shifted`."""
        layers, _ = self.chosen(count, "shifted")
        rows = self.shifts[count - 1] if count else []
        return {n: [torch.tensor(row) for row in blocks] for n, blocks in zip(layers, rows, strict=True)}

    def check(self, program: Program, layers: int) -> None:
        """FactError when these measurements are of another model."""
        here = fingerprint(program)
        if len(self.influence) != layers or self.fingerprint != here:
            raise FactError(
                f"the importance data is of another model: {len(self.influence)} layers, fingerprint "
                f"{self.fingerprint[:12]}; here {layers} layers, {here[:12]}",
                remedy="measure this model",
            )

    def save(self, path: Path) -> None:
        """Write one JSON file, complete or not at all."""
        with written_whole(path) as file:
            file.write_text(json.dumps({"format": FORMAT, **asdict(self)}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Influence:
        """Read a file that `save` wrote; LoadError names what is wrong with any other."""
        where = str(path)
        try:
            if Path(path).stat().st_size > _MAX_BYTES:
                raise LoadError(f"is larger than {_MAX_BYTES} bytes", where=where)
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise LoadError("holds no importance data", where=where, remedy="measure it")
            found = cls(**data)
            numbers = [*found.influence, *found.gain, found.perplexity]
            if not all(isinstance(v, float) and math.isfinite(v) for v in numbers):
                raise ValueError("a measurement is no finite number")
            orders = {k: [(int(n), float(r)) for n, r in v] for k, v in found.orders.items()}
            if any(not 0 <= n < len(found.influence) for order in orders.values() for n, _ in order):
                raise ValueError("an order names a layer that does not exist")
            found.orders = orders
            if [len(rows) for rows in found.shifts] != list(range(1, len(orders.get("shifted", [])) + 1)):
                raise ValueError("shifts and order do not belong together")
            if not all(math.isfinite(v) for k in found.shifts for blocks in k for row in blocks for v in row):
                raise ValueError("a shift is no finite number")
            return found
        except OSError as error:
            raise LoadError(f"cannot be read: {error.strerror or error}", where=where) from error
        except UnicodeDecodeError as error:
            raise LoadError(
                "holds no importance data", where=where, remedy="linear maps go with rule=linear"
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise LoadError(f"is damaged: {error}", where=where) from error


class LayerRun:
    """Runs a program layer by layer; layers can be left out, and a run may start again at any layer."""

    def __init__(self, program: Program, structure: BlockStructure) -> None:
        self.layers = structure.layers
        self._module = program.module
        nodes = list(program.graph.nodes)
        stage = dict.fromkeys(nodes, -1)
        for node in nodes:
            own = structure.layer_of(node)
            inner = [stage[n] for n in node.all_input_nodes]
            stage[node] = own if own is not None else max(inner, default=-1)
        self._stages: list[list[fx.Node]] = [[] for _ in range(len(self.layers) + 1)]
        for node in nodes:
            self._stages[stage[node] + 1].append(node)
        self._owned = [{n for b in layer.blocks for n in b.nodes} for layer in self.layers]
        self._live = self._needed_after()

    def _needed_after(self) -> list[set[fx.Node]]:
        needed: set[fx.Node] = set()
        found = []
        exits = [{b.exit for b in layer.blocks} for layer in self.layers]
        for nodes, kept in zip(reversed(self._stages), [*reversed(exits), set()], strict=True):
            found.append(needed | kept)
            needed -= set(nodes)
            needed.update(source for node in nodes for source in node.all_input_nodes)
        return found[::-1]

    def run(
        self,
        start: int,
        before: dict[fx.Node, Any],
        dropped: Iterable[int] = (),
        shifts: Shifts = MappingProxyType({}),
        stop: int | None = None,
        hooks: Hooks = MappingProxyType({}),
    ) -> tuple[Any, list[dict[fx.Node, Any]]]:
        """(the program's result, what is needed from each stage on).

        start: the first stage to run, 0 for the prelude (its `before` holds the placeholders), i + 1 for
        layer i; before: what is needed from there on. shifts: added where layers are dropped. stop: the
        stage in front of which to stop; there is no result then. hooks: what values become.
        """
        gone, states, env = set(dropped), [before], dict(before)
        result: Any = None
        for number in range(start, len(self._stages) if stop is None else stop):
            layer = number - 1
            skipped = self._owned[layer] if layer in gone else set()
            if skipped:
                for i, block in enumerate(self.layers[layer].blocks):
                    entry = env[block.entry]
                    env[block.exit] = entry + shifts[layer][i].to(entry) if layer in shifts else entry
                    if block.exit in hooks:
                        env[block.exit] = hooks[block.exit](env[block.exit])
            for node in self._stages[number]:
                if node in skipped or node in env:
                    continue
                if node.op == "output":
                    result = fx.node.map_arg(node.args[0], env.__getitem__)
                elif node.op == "get_attr":
                    env[node] = self._module.get_buffer(str(node.target))
                else:
                    args = fx.node.map_arg(node.args, env.__getitem__)
                    kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
                    env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                if node in hooks:
                    env[node] = hooks[node](env[node])
            env = {n: v for n, v in env.items() if n in self._live[number]}
            states.append(dict(env))
        return result, states


@dataclass
class Streams:
    """Sums over the tokens of each layer's input and output."""

    cosine: Tensor
    before: Tensor
    after: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, layers: int) -> Streams:
        cosine, before, after = torch.zeros(3, layers, dtype=torch.float64)
        return cls(cosine, before, after)

    def take(self, run: LayerRun, states: Sequence[dict[fx.Node, Any]]) -> None:
        """Add one run's states; the tokens of all coupled streams of a layer count alike."""
        for i, layer in enumerate(run.layers):
            pairs = [(states[i + 1][b.entry], states[i + 2][b.exit]) for b in layer.blocks]
            rows = [(x.flatten(0, -2).double(), y.flatten(0, -2).double()) for x, y in pairs]
            x, y = torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows])
            self.cosine[i] += torch.cosine_similarity(x, y, dim=-1).sum()
            self.before[i] += x.square().mean(-1).sum()
            self.after[i] += y.square().mean(-1).sum()
        self.tokens += x.shape[0]
