"""Linear maps that stand in for adjacent layers, fitted on sample data: `drop-layers{rule=linear}`.

paper: arXiv:2505.02819 (ReplaceMe) fits a square map of the last MLP's output in front of the dropped layers
and merges it into that MLP's last weight. Here that weight itself is moved: the map reads what the weight
reads, which is wider, and costs as little. Rows count by 1 / mean square of the stream behind the layers:
what reads the stream is a norm, and a few tokens of huge values would decide a plain fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import ops
from tilewright.compiler.blocks import Block, BlockStructure
from tilewright.compiler.calibration import fingerprint
from tilewright.compiler.described_tensors import read_described, write_described
from tilewright.compiler.diagnostics import FactError
from tilewright.compiler.program import Program
from tilewright.compiler.schema import arguments

FORMAT = "tilewright-stand-ins-1"


@dataclass(frozen=True, eq=False)
class StandIn:
    """What is added to each stream where layers `first` to `last` are dropped: x W^T + b."""

    first: int
    last: int
    front: bool
    """x is what the linear layer that made the stream in front reads (`front_of`); else that stream."""
    maps: tuple[tuple[Tensor, Tensor], ...]
    """(W [C, K], b [C]) in float32, for each block of the first layer."""


def front_of(structure: BlockStructure, block: Block) -> fx.Node | None:
    """The linear layer whose result alone is added last to the stream that a block reads; None where there
    is none in the layer in front."""
    entry, layer = block.entry, structure.layer_of(block.entry)
    if entry.target is not torch.ops.aten.add.Tensor or entry.kwargs or layer is None:
        return None
    for node in reversed(entry.all_input_nodes):
        own = node.target is ops.linear and len(node.users) == 1
        if own and structure.layer_of(node) == layer == structure.layer_of(arguments(node)["x"]):
            return node
    return None


def stretches(layers: Iterable[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of adjacent numbers, ascending."""
    found: list[tuple[int, int]] = []
    for n in sorted(layers):
        if found and found[-1][1] == n - 1:
            found[-1] = (found[-1][0], n)
        else:
            found.append((n, n))
    return found


class RidgeSums:
    """Sums over rows of x [T, K] and y [T, C], weighted: all that a ridge regression of y on x needs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """K x K and K x C doubles, however many rows there are."""
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64)
        self._x, self._y = (torch.zeros(n, dtype=torch.float64) for n in (inputs, outputs))
        self._weight = 0.0

    def take(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add rows; weight [T]."""
        x, y = x.double(), y.double()
        scaled = x * weight.double()[:, None]
        self._gram += scaled.T @ x
        self._cross += scaled.T @ y
        self._x += scaled.sum(0)
        self._y += weight.double() @ y
        self._weight += float(weight.double().sum())

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(W [C, K], b [C]) in float64: least weighted squares of y - x W^T - b, plus ridge |W|^2, where
        ridge is in units of the mean variance of x."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        gram = self._gram - torch.outer(self._x, mean_x)
        cross = self._cross - torch.outer(self._x, mean_y)
        by = ridge * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        found = torch.linalg.solve(gram + by * torch.eye(len(gram), dtype=torch.float64), cross)
        return found.T.contiguous(), mean_y - mean_x @ found


@dataclass
class StandIns:
    """The layers to drop of one model, with the maps that take their places."""

    fingerprint: str
    layers: int
    """Of the whole model."""
    ratio: float
    """Perplexity over that of the whole model, on samples that the maps were not fitted on."""
    ridge: float
    tokens: int
    """Fitted on."""
    source: str = ""
    maps: list[StandIn] = field(default_factory=list)

    def dropped(self) -> list[int]:
        """The layers to drop, ascending."""
        return [n for s in self.maps for n in range(s.first, s.last + 1)]

    def check(self, program: Program, structure: BlockStructure) -> None:
        """FactError when these maps are of another model, or do not fit where they go."""
        here, count = fingerprint(program), len(structure.layers)
        if self.fingerprint != here or self.layers != count:
            raise FactError(
                f"the linear maps are of another model: {self.layers} layers, fingerprint "
                f"{self.fingerprint[:12]}; here {count} layers, {here[:12]}",
                remedy="measure this model",
            )
        for one in self.maps:
            want = [_shape(structure, b, one.front) for b in structure.layers[one.first].blocks]
            given = [tuple(weight.shape) for weight, _ in one.maps]
            if given != want:
                raise FactError(
                    f"layers {one.first} to {one.last}: the file maps {given}, the model has {want} there",
                    remedy="measure this model",
                )

    def save(self, path: Path) -> None:
        """Write one safetensors file, complete or not at all."""
        tensors: dict[str, Tensor] = {}
        rows = []
        for i, one in enumerate(self.maps):
            rows.append({"first": one.first, "last": one.last, "front": one.front, "blocks": len(one.maps)})
            for j, (weight, bias) in enumerate(one.maps):
                tensors[f"{i}.{j}.weight"], tensors[f"{i}.{j}.bias"] = weight.contiguous(), bias.contiguous()
        names = ("fingerprint", "layers", "ratio", "ridge", "tokens", "source")
        head = {name: getattr(self, name) for name in names} | {"maps": rows}
        write_described(path, FORMAT, head, tensors)

    @classmethod
    def load(cls, path: Path) -> StandIns:
        """Read a file that `save` wrote; LoadError names what is wrong with any other."""
        missing, remedy = "holds no linear maps", "measure with rule linear"
        with read_described(path, FORMAT, missing=missing, remedy=remedy) as (data, file):
            return _parsed(data, file.get_tensor)


def _shape(structure: BlockStructure, block: Block, front: bool) -> tuple[int, ...]:
    """[C, K] of the map that goes in front of a block."""
    width, node = int(block.entry.meta["val"].shape[-1]), front_of(structure, block) if front else block.entry
    if node is None:
        return ()
    reads = arguments(node)["x"] if front else node
    return width, int(reads.meta["val"].shape[-1])


def _parsed(data: Any, tensor: Any) -> StandIns:
    maps, behind = [], -1
    for i, row in enumerate(data["maps"]):
        first, last = int(row["first"]), int(row["last"])
        if not behind < first <= last < int(data["layers"]):
            raise ValueError(f"layers {first} to {last} do not exist, or not behind those of before")
        behind = last
        pairs = [(tensor(f"{i}.{j}.weight"), tensor(f"{i}.{j}.bias")) for j in range(int(row["blocks"]))]
        maps.append(StandIn(first, last, bool(row["front"]), tuple(pairs)))
        for weight, bias in pairs:
            if weight.dim() != 2 or bias.shape != weight.shape[:1] or weight.dtype != torch.float32:
                raise ValueError(f"map {i} has shapes {list(weight.shape)}, {list(bias.shape)}")
            if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                raise ValueError(f"map {i} is not finite")
    ratio, ridge = float(data["ratio"]), float(data["ridge"])
    if not math.isfinite(ratio) or not math.isfinite(ridge):
        raise ValueError("a measurement is no finite number")
    head = str(data["fingerprint"]), int(data["layers"]), ratio, ridge, int(data["tokens"])
    return StandIns(*head, str(data["source"]), maps)


def moved_weight(weight: Tensor, *, by: Tensor) -> Tensor:
    """weight + by, rounded once."""
    return (weight.double() + by.to(weight.device).double()).to(weight.dtype)
