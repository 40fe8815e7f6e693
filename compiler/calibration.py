"""What a model's linear layers read on sample data: collected once, saved, and checked before it is used.

Statistics are kept by the path of the layer's weight, with the rotations, folds and scales that the layer had
seen when they were taken: a statistic of another basis says nothing about this one. Files hold tensors and
text only (safetensors), and carry a fingerprint of the model's weights.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import ops
from tilewright.compiler.dataflow import see_through
from tilewright.compiler.described_tensors import read_described, write_described
from tilewright.compiler.diagnostics import FactError, nearest
from tilewright.compiler.paging import give_back_freed, in_a_file, page_out
from tilewright.compiler.program import Program
from tilewright.compiler.schema import arguments

FORMAT = "tilewright-calibration-1"
BASIS_PASSES = (
    "fold-norm-scale",
    "smooth-scales",
    "smooth-rotate",
    "rotate-hadamard",
    "prune-width-for-decode",
)
"""Passes that change what a linear layer reads."""
LARGEST_HESSIAN = 8192
"""Layers with more inputs than this get no Hessian: it would take over half a gigabyte."""
_SAMPLED = 4096
_OPTIONAL = ("hessian", "means", "energy")
"""What a file holds for a layer only where it was wanted."""
_TENSORS = ("absmax", "upper", *_OPTIONAL)


@dataclass
class LayerStatistics:
    """The input [tokens, K] of one linear layer over all samples."""

    basis: str
    """Passes that had changed the layer's input, in order, joined by commas."""
    tokens: int = 0
    absmax: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[K] float32: largest magnitude of each channel."""
    upper: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[K] float32: running estimate of a high quantile of each channel's magnitude."""
    typical: float = 0.0
    """Mean over the samples of the median over tokens of a token's largest magnitude; 0 in files without."""
    samples: int = 0
    hessian: Tensor | None = None
    """[K, K] float64: sum of x^T x, where wanted."""
    means: Tensor | None = None
    """[samples, K] float32: mean over the tokens of each sample, where wanted."""
    energy: Tensor | None = None
    """[K] float64: sum of x^2 / mean(x^2) over the tokens x that the RMS norm in front of this layer read,
    where wanted and there is one."""

    def observe(
        self, x: Tensor, *, quantile: float, hessian: bool, means: bool = False, energy: Tensor | None = None
    ) -> None:
        """Take in x [..., K]; FactError when it is not finite."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not bool(torch.isfinite(rows).all()):
            raise FactError(
                "an activation is not finite", remedy="calibrate on a model that runs without NaN"
            )
        size = rows.abs()
        self.samples += 1
        self.typical += (float(size.amax(1).median()) - self.typical) / self.samples
        high = size.kthvalue(max(1, math.ceil(quantile * size.shape[0])), dim=0).values
        if self.tokens == 0:
            self.absmax, self.upper = size.amax(0), high
        else:
            self.absmax = torch.maximum(self.absmax, size.amax(0))
            self.upper = self.upper + 0.01 * (high - self.upper)
        if hessian and rows.shape[1] <= LARGEST_HESSIAN:
            wide = rows.double()
            product = wide.t() @ wide
            self.hessian = product if self.hessian is None else self.hessian.add_(product)
        if means:
            mean = rows.mean(0, keepdim=True)
            self.means = mean if self.means is None else torch.cat((self.means, mean))
        if energy is not None:
            self.energy = energy if self.energy is None else self.energy + energy
        self.tokens += rows.shape[0]


@dataclass
class Statistics:
    """All layers of one model over one set of samples."""

    fingerprint: str
    """Of the weights, by `fingerprint`."""
    vocabulary: int = 0
    """Rows of the embedding; 0 for a model without one."""
    samples: int = 0
    source: str = ""
    """Where the samples came from: a digest of the text, or the name the caller gave."""
    quantile: float = 0.999
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    """By path of the weight."""

    def layer(self, program: Program, linear: fx.Node) -> LayerStatistics:
        """The statistics of a linear layer; FactError when there are none, or they are of another basis."""
        path, basis = weight_path(program, linear), basis_of(linear)
        found = self.layers.get(path)
        if found is None:
            raise FactError(f"the calibration has no layer {path!r}", remedy=nearest(path, self.layers))
        if found.basis != basis:
            raise FactError(
                f"{path}: calibrated after [{found.basis}], but here its input has seen [{basis}]",
                remedy="calibrate behind the same passes",
            )
        return found

    def check(self, program: Program) -> None:
        """FactError when these statistics are not of this program's model."""
        here, vocabulary = fingerprint(program), vocabulary_of(program)
        if self.vocabulary != vocabulary:
            raise FactError(
                f"the calibration is for a vocabulary of {self.vocabulary}, the model has {vocabulary}"
            )
        if self.fingerprint != here:
            raise FactError(
                f"the calibration is of another model: fingerprint {self.fingerprint[:12]}, here {here[:12]}",
                remedy="calibrate this model",
            )

    def save(self, path: Path) -> None:
        """Write one safetensors file, complete or not at all."""
        tensors: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        written: dict[tuple[int, ...], int] = {}
        for i, (name, layer) in enumerate(self.layers.items()):
            row = {"path": name, "basis": layer.basis, "tokens": layer.tokens}
            rows.append(row | {"typical": layer.typical, "samples": layer.samples})
            held = {kind: getattr(layer, kind) for kind in _TENSORS}
            like = written.setdefault(tuple(map(id, held.values())), i)
            if like != i:
                rows[i]["like"] = like
                continue
            tensors |= {f"{i}.{kind}": v.contiguous() for kind, v in held.items() if v is not None}
        head = {k: getattr(self, k) for k in ("fingerprint", "vocabulary", "samples", "source", "quantile")}
        write_described(path, FORMAT, {**head, "layers": rows}, tensors)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a file that `save` wrote; LoadError names what is wrong with any other."""
        missing, remedy = "is no calibration file", "make one with `calibrate`"
        with read_described(path, FORMAT, missing=missing, remedy=remedy) as (data, file):
            return _parsed(data, file.keys(), file.get_tensor)


def _parsed(data: Any, names: Any, tensor: Callable[[str], Tensor]) -> Statistics:
    found = Statistics(
        str(data["fingerprint"]),
        int(data["vocabulary"]),
        int(data["samples"]),
        str(data["source"]),
        float(data["quantile"]),
    )
    present = set(names)
    layers: list[LayerStatistics] = []
    for i, row in enumerate(data["layers"]):
        if "like" in row:  # it read what that layer read
            like = int(row["like"])
            if not 0 <= like < i:
                raise ValueError(f"layer {i} is like layer {like}")
            held = {kind: getattr(layers[like], kind) for kind in _TENSORS}
        else:
            there = ("absmax", "upper", *(kind for kind in _OPTIONAL if f"{i}.{kind}" in present))
            held = {kind: tensor(f"{i}.{kind}") for kind in there}
        layer = LayerStatistics(
            str(row["basis"]),
            int(row["tokens"]),
            typical=float(row.get("typical", 0.0)),
            samples=int(row.get("samples", 0)),
            **held,
        )
        layers.append(layer)
        more = {kind: held[kind] for kind in _OPTIONAL if held.get(kind) is not None}
        if layer.absmax.dim() != 1 or layer.upper.shape != layer.absmax.shape:
            raise ValueError(f"layer {i} has shapes {list(layer.absmax.shape)}, {list(layer.upper.shape)}")
        for kind, value in more.items():
            if value.shape[-1:] != layer.absmax.shape:
                raise ValueError(f"layer {i} has {kind} of shape {list(value.shape)}")
        found.layers[str(row["path"])] = layer
    return found


def weight_path(program: Program, linear: fx.Node) -> str:
    """Path of the weight that a linear layer goes back to, however it was rotated or scaled since."""
    weight = arguments(linear)["weight"]
    derived = program.derived_of(weight)
    name = weight.name if derived is None else derived.sources[0]
    spec = next((s for s in program.inputs if s.name == name), None)
    return spec.source or name if spec is not None else name


def basis_of(linear: fx.Node) -> str:
    """Which passes have changed the input of a linear layer, in order."""
    return ",".join(name for name in linear.meta.get("rewritten_by", ()) if name in BASIS_PASSES)


def vocabulary_of(program: Program) -> int:
    """Rows of the largest embedding that integers look up; 0 when there is none."""
    sizes = [
        int(arguments(n)["weight"].meta["val"].shape[0])
        for n in program.graph.nodes
        if n.target is ops.embedding
    ]
    return max(sizes, default=0)


def fingerprint(program: Program) -> str:
    """SHA-256 over path, shape, dtype and evenly sampled values of every weight that a linear layer reads."""
    digest = hashlib.sha256()
    used = {weight_path(program, n) for n in program.graph.nodes if n.target is ops.linear}
    rows = [(s.source or s.name, v) for s, v in zip(program.inputs, program.example_inputs, strict=True)]
    for path, value in sorted((p, v) for p, v in rows if p in used):
        digest.update(f"{path} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        digest.update(flat[::step].to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()


class Observer(fx.Interpreter):
    """Runs a program and takes in what each of its linear layers reads.

    Where the program has a folder for scratch files, they hold the Hessians too, and of those and of the
    derived weights only what the layer at work reads is in memory.
    """

    def __init__(
        self, program: Program, statistics: Statistics, *, hessian: bool = False, means: bool = False
    ) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self._statistics, self._hessian, self._means = statistics, hessian, means
        self._scratch = program.scratch
        derived = {n: program.derived_of(n) for n in program.graph.nodes if n.op == "get_attr"}
        self._filed = {n for n, found in derived.items() if found is not None and self._scratch is not None}
        self._names = {
            n: (weight_path(program, n), basis_of(n)) for n in program.graph.nodes if n.target is ops.linear
        }
        readers: dict[fx.Node, fx.Node] = {}
        uses = Counter(path for path, _ in self._names.values())
        alone = [n for n, (path, _) in self._names.items() if uses[path] == 1]
        self._first = {n: readers.setdefault(arguments(n)["x"], n) for n in alone}
        """Of the layers that read one value, the one that is observed for all of them."""
        norms = {n: see_through(arguments(n)["x"]) for n in self._names} if means else {}
        self._norm_of = {n: norm for n, norm in norms.items() if norm.target is ops.rms_norm}
        self._energies: dict[fx.Node, Tensor] = {}
        """Of the latest run, by norm."""

    def run_node(self, n: fx.Node) -> Any:
        if n.target is ops.rms_norm and self._means:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._energies[n] = _energy(args[0] if args else kwargs["x"])
        if n in self._names:
            path, basis = self._names[n]
            first = self._first.get(n, n)
            if first is n:
                layer = self._statistics.layers.setdefault(path, LayerStatistics(basis))
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                self._observe(n, layer, args[0] if args else kwargs["x"])
            else:
                seen = self._statistics.layers[self._names[first][0]]
                self._statistics.layers[path] = replace(seen, basis=basis)
        result = super().run_node(n)
        for read in self._filed.intersection(n.all_input_nodes):
            page_out(self.module.get_buffer(str(read.target)))
        return result

    def _observe(self, n: fx.Node, layer: LayerStatistics, x: Tensor) -> None:
        norm = self._norm_of.get(n)
        layer.observe(
            x,
            quantile=self._statistics.quantile,
            hessian=self._hessian,
            means=self._means,
            energy=None if norm is None else self._energies[norm],
        )
        if self._scratch is not None and layer.hessian is not None:
            if layer.samples == 1:
                layer.hessian = in_a_file(layer.hessian, self._scratch)
            page_out(layer.hessian)
            give_back_freed()  # what the product took


def _energy(x: Tensor) -> Tensor:
    """Sum over the tokens of x [..., K] of x^2 / mean(x^2), in float64."""
    square = x.detach().reshape(-1, x.shape[-1]).double().square()
    return (square / square.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).sum(0)
