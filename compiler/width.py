"""Channels that can be left out of a model: which belong together, how much they matter, and their removal.

Source: OverFill (github.com/friendshipkim/overfill). Two kinds of channels are free to choose: those of a
residual stream, which embeddings and output projections write and norms and projections read, and those
inside an MLP, which its first projections write and its last one reads. Heads, and so all that a cache holds,
keep their size. Which values share their channels is found on the graph (`compiler.basis`), never by the
names of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tilewright.compiler import ops
from tilewright.compiler.basis import Basis, Blocked, find_streams
from tilewright.compiler.calibration import LayerStatistics, Statistics, weight_path
from tilewright.compiler.dataflow import SHAPE_ONLY_OPS, Flow, is_pointwise, op_name, see_through, tensor_of
from tilewright.compiler.diagnostics import FactError
from tilewright.compiler.graph import compute_val, fake_mode_of
from tilewright.compiler.inner_rotation import hidden_readers
from tilewright.compiler.program import Program
from tilewright.compiler.schema import arguments

_SIZED = {"reshape": "shape", "view": "size", "expand": "size"}
"""Op -> its argument that spells out the number of channels last."""
_COUNTED = frozenset({"repeat", "repeat_interleave", "split_with_sizes"})


@dataclass(frozen=True)
class Channels:
    """One set of values [..., width] that lose the same channels."""

    width: int
    members: tuple[fx.Node, ...]
    tables: tuple[fx.Node, ...] = ()
    """Embedding look-ups: their table [V, width] loses columns."""
    writers: tuple[fx.Node, ...] = ()
    """Linear layers: their weights lose rows, their biases entries."""
    readers: tuple[fx.Node, ...] = ()
    """Linear layers: their weights lose columns."""
    stream: bool = False
    """Of a residual stream; else inside an MLP."""

    @property
    def norms(self) -> list[fx.Node]:
        """The RMS norms among the members."""
        return [n for n in self.members if n.target is ops.rms_norm]


def stream_channels(program: Program) -> list[tuple[fx.Node, Channels | Blocked]]:
    """(first addition, its channels or why they must stay) of each residual stream."""
    found: list[tuple[fx.Node, Channels | Blocked]] = []
    for node, basis in find_streams(program, gains=True):
        if isinstance(basis, Blocked):
            found.append((node, basis))
            continue
        members, tables = tuple(sorted(basis.members)), tuple(basis.tables)
        writers, readers = tuple(basis.writers), tuple(basis.readers)
        channels = Channels(basis.width, members, tables, writers, readers, stream=True)
        found.append((node, _fixed(program, basis) or channels))
    return found


def _fixed(program: Program, basis: Basis) -> Blocked | None:
    """Why the number of channels of a stream may not change."""
    if basis.centred:
        norm = basis.centred[0]
        return Blocked(norm, f"{norm.name} subtracts the mean of all channels")
    for value, user in basis.exits:
        return Blocked(value, f"{value.name} is read by {user.name} at full width")
    for entry in basis.entries:
        return Blocked(entry, f"{entry.name} enters at full width, and is no table of this stream alone")
    for node in sorted(basis.members):
        if op_name(node) in _COUNTED:
            return Blocked(node, f"{node.name} ({op_name(node)}) counts channels")
        gain = arguments(node)["weight"] if node.target is ops.rms_norm else None
        if gain is not None and not program.is_constant(gain):
            return Blocked(node, f"the gain of {node.name} is computed, not a weight")
    return None


def hidden_channels(program: Program) -> list[tuple[fx.Node, Channels | Blocked]]:
    """(last projection, its hidden channels or why they must stay) of each MLP."""
    found: list[tuple[fx.Node, Channels | Blocked]] = []
    known: set[fx.Node] = set()
    for reader in hidden_readers(program):
        if reader not in known:
            channels = _hidden(program, reader)
            known.update(channels.readers if isinstance(channels, Channels) else ())
            found.append((reader, channels))
    return found


def _hidden(program: Program, reader: fx.Node) -> Channels | Blocked:
    pending = [arguments(reader)["x"]]
    width = _last(pending[0])
    if not isinstance(width, int):
        return Blocked(reader, "it reads a number of channels that varies")
    members: dict[fx.Node, None] = {}
    writers: dict[fx.Node, None] = {}
    while pending:
        node = pending.pop()
        if node in members or node in writers:
            continue
        if node.target is ops.linear:
            writers[node] = None
            continue
        value = tensor_of(node)
        wide = [s for s in node.all_input_nodes if _last(s) == width]
        if (
            value is None
            or _last(node) != width
            or not wide
            or not (is_pointwise(node) or see_through(node) is not node or node.target is ops.gated_mlp)
        ):
            return Blocked(node, f"{node.name} ({op_name(node) or node.op}) is no function of each channel")
        members[node] = None
        pending.extend(wide)
    readers: dict[fx.Node, None] = {}
    for node in (*members, *writers):
        for user in node.users:
            if user in members or op_name(user) in SHAPE_ONLY_OPS:
                continue
            if user.target is not ops.linear or arguments(user)["x"] is not node or node in writers:
                return Blocked(user, f"{user.name} reads the hidden channels of {node.name} too")
            readers[user] = None
    for linear in (*writers, *readers):
        for part in ("weight", "bias"):
            held = arguments(linear)[part]
            if held is not None and not program.is_constant(held):
                return Blocked(linear, f"the {part} of {linear.name} is computed, not a weight")
    return Channels(width, tuple(members), (), tuple(writers), tuple(readers))


def _last(node: fx.Node) -> Any:
    value = tensor_of(node)
    return value.shape[-1] if value is not None and value.dim() else None


def importance(program: Program, channels: Channels, statistics: Statistics | None) -> Tensor:
    """float64 [width]: means over the tokens of a sample, L2 over samples; the readers' weights' L2 without
    statistics.

    Of an MLP the mean of what its last projection reads; of a stream the means of what norms give to layers,
    in magnitude, summed over the norms. A norm whose readers write nothing back, the last one, does not
    count.
    """
    if statistics is None:
        weights = [program.tensor_of(arguments(r)["weight"]).double() for r in channels.readers]
        return torch.stack([w.square().sum(0) for w in weights]).sum(0).sqrt()
    if not channels.stream:
        return _means(program, channels.readers[0], statistics).square().sum(0).sqrt()
    flow, total = Flow(program.graph), torch.zeros(())
    back = sum(flow.bit(n) for n in channels.writers)
    for norm in channels.norms:
        readers = [r for r in readers_of(channels, norm) if flow.below(r) & back]
        if readers:
            total = total + _means(program, readers[0], statistics).abs()
    return total.square().sum(0).sqrt()


def readers_of(channels: Channels, norm: fx.Node) -> list[fx.Node]:
    """The linear layers that read a norm of these channels."""
    return [r for r in channels.readers if see_through(arguments(r)["x"]) is norm]


def _means(program: Program, linear: fx.Node, statistics: Statistics) -> Tensor:
    return _statistic(program, linear, statistics.layer(program, linear), "means")


def _statistic(program: Program, linear: fx.Node, found: LayerStatistics, what: str) -> Tensor:
    """Statistics that only some calibrations hold, in float64; FactError without them."""
    value: Tensor | None = getattr(found, what)
    if value is None:
        raise FactError(
            f"{weight_path(program, linear)}: the calibration holds no {what}",
            remedy="calibrate with --means",
        )
    return value.double()


def norm_factor(
    program: Program, channels: Channels, norm: fx.Node, kept: Tensor, found: Statistics
) -> float:
    """What the gain of a norm is multiplied by, so that its mean over kept channels stands for all.

    The root of the kept channels' mean energy over that of all, measured in what the norm reads, every token
    scaled to the same energy.
    """
    readers = readers_of(channels, norm)
    if not readers:
        return 1.0
    energy = _statistic(program, readers[0], found.layer(program, readers[0]), "energy")
    return float((energy[kept].mean() / energy.mean()).sqrt())


class Trimmer:
    """Takes channels out of one program. Weights are derived by `finish`, once for all that was asked."""

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name
        self._rows: dict[fx.Node, Tensor] = {}
        self._columns: dict[fx.Node, Tensor] = {}
        self._derived: dict[Any, fx.Node] = {}

    def trim(self, channels: Channels, kept: Tensor, factors: Mapping[fx.Node, float]) -> None:
        """Keep these channels (int64, ascending); gains of norms are multiplied by their factor."""
        for node in channels.writers:
            self._rows[node] = kept
        for node in (*channels.readers, *channels.tables):
            self._columns[node] = kept
        for norm in channels.norms:
            self._gain(norm, kept, factors.get(norm, 1.0))
        for node in channels.members:
            slot = _SIZED.get(op_name(node) or "")
            given = arguments(node) if slot else {}
            if slot and given[slot][-1] == channels.width:
                given[slot] = [*given[slot][:-1], kept.numel()]
                node.args, node.kwargs = tuple(given.values()), {}

    def _gain(self, norm: fx.Node, kept: Tensor, factor: float) -> None:
        given = arguments(norm)
        if given["weight"] is None:
            like = given["x"]
            value = torch.full((kept.numel(),), factor, dtype=like.meta["val"].dtype)
            given["weight"] = self.program.constant(value, like)
        else:
            compute = partial(_trimmed_gain, kept=kept, factor=factor, offset=float(given["offset"]))
            given["weight"] = self._derive(given["weight"], compute)
        norm.args, norm.kwargs = tuple(given.values()), {}

    def finish(self) -> None:
        """Derive the weights, forget those that nothing reads any more, and give all values their sizes."""
        for node in dict.fromkeys((*self._rows, *self._columns)):
            rows, columns = self._rows.get(node), self._columns.get(node)
            given = arguments(node)
            key = given["weight"], id(rows), id(columns)
            if key not in self._derived:
                compute = partial(_trimmed, rows=rows, columns=columns)
                self._derived[key] = self._derive(given["weight"], compute)
            given["weight"] = self._derived[key]
            if rows is not None and given["bias"] is not None:
                given["bias"] = self._derive(given["bias"], partial(_trimmed, rows=rows, columns=None))
            node.args, node.kwargs = tuple(given.values()), {}
            node.meta["rewritten_by"] = (*node.meta.get("rewritten_by", ()), self.name)
        self.program.drop_unread()
        self._resize()

    def _derive(self, weight: fx.Node, compute: Any) -> fx.Node:
        return self.program.derive(f"{self.program.path_of(weight)} trimmed", (weight,), compute)

    def _resize(self) -> None:
        nodes = list(self.program.graph.nodes)
        mode = fake_mode_of(*nodes)
        changed = {n for n in nodes if n in self._rows or n in self._columns}
        for node in nodes:
            if node.op != "call_function" or not (
                node in changed or changed.intersection(node.all_input_nodes)
            ):
                continue
            before, after = node.meta["val"], compute_val(node.target, node.args, node.kwargs, mode)
            if isinstance(after, Tensor) and after.shape == before.shape:
                continue
            node.meta["val"] = after
            changed.add(node)


def _trimmed(weight: Tensor, *, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if rows is not None:
        weight = weight.index_select(0, rows.to(weight.device))
    return weight if columns is None else weight.index_select(-1, columns.to(weight.device))


def _trimmed_gain(gain: Tensor, *, kept: Tensor, factor: float, offset: float) -> Tensor:
    wide = gain.double().index_select(0, kept.to(gain.device))
    return ((wide + offset) * factor - offset).to(gain.dtype)
