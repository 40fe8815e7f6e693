"""Where a layer, or a half of one, is cut out of its residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx

from tilewright.compiler import PassLog, Program
from tilewright.compiler.blocks import Block, BlockStructure, Layer
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.graph import copy_source
from tilewright.compiler.influence import Influence, Shifts
from tilewright.compiler.legality import STATE
from tilewright.compiler.stand_in import StandIn, StandIns
from tilewright.passes.skip._stand_ins import Place, place_of, put

_HALVES = {"attention": ("self-attention", "cross-attention", "mixer"), "mlp": ("mlp", "conv")}


@dataclass(frozen=True)
class Cut:
    """What read `exit` will read `entry` times `gain` plus `shift`, or plus the map of `place`; `writes` of
    state that only the part between them makes go too."""

    entry: fx.Node
    exit: fx.Node
    writes: tuple[fx.Node, ...]
    gain: float = 1.0
    shift: torch.Tensor | None = None
    place: Place | None = None


@dataclass(frozen=True)
class Detours:
    """What is measured to go around dropped layers."""

    gains: Sequence[float] = ()
    """Of each layer of the model; empty for 1."""
    shifts: Shifts = field(default_factory=dict)
    stand_ins: Sequence[StandIn] = ()

    def place(self, structure: BlockStructure, layer: int, block: int) -> Place | None:
        """Where a linear map goes in front of a block of a layer, None for nowhere."""
        found = [s for s in self.stand_ins if s.first == layer]
        return place_of(structure, found[0], block) if found else None

    def shift(self, layer: int, block: int) -> torch.Tensor | None:
        """What is added behind a block of a layer, None for nothing."""
        return self.shifts[layer][block] if layer in self.shifts else None


def chosen(structure: BlockStructure, numbers: list[int], max_share: float, log: PassLog) -> list[Layer]:
    """The layers of these numbers, ascending. OptionError when there is no such layer, or for too many."""
    if structure.refusal:
        log.note(f"no layers: {structure.refusal}")
        return []
    count = len(structure.layers)
    if numbers and numbers[-1] >= count:
        raise OptionError(f"{log.name}: layer {numbers[-1]}: the model has {count} layers, 0 to {count - 1}")
    if len(numbers) > max_share * count:
        raise OptionError(
            f"{log.name}: {len(numbers)} of {count} layers are more than max_share={max_share:g}",
            remedy="give max_share=1 when this is meant",
        )
    return [structure.layers[n] for n in numbers]


def measured(
    program: Program,
    structure: BlockStructure,
    path: Path,
    rule: str,
    count: int,
    keep_variance: bool,
    most: float,
) -> tuple[list[int], float, Detours]:
    """(the `count` layers that a file of measurements drops, the perplexity ratio without them, what goes
    around them). OptionError for another count than the file's and for a ratio above `most`, FactError for
    another model's file."""
    if rule == "linear":
        maps = StandIns.load(path)
        maps.check(program, structure)
        if len(maps.dropped()) != count:
            raise OptionError(
                f"drop-layers: count = {count}: {path} holds linear maps for {len(maps.dropped())} layers",
                remedy="give that count, or measure for this one",
            )
        _check_growth(maps.dropped(), maps.ratio, most)
        return maps.dropped(), maps.ratio, Detours(stand_ins=maps.maps)
    found = Influence.load(path)
    found.check(program, len(structure.layers))
    numbers, ratio = found.chosen(count, rule) if count else ([], 1.0)
    _check_growth(sorted(numbers), ratio, most)
    shifts = found.shifts_of(count) if rule == "shifted" else {}
    return sorted(numbers), ratio, Detours(found.gain if keep_variance else (), shifts)


def _check_growth(numbers: list[int], ratio: float, most: float) -> None:
    """OptionError where perplexity grew too much without these layers."""
    if ratio > most:
        raise OptionError(
            f"drop-layers: without layers {numbers} perplexity grew {ratio:.3f} times when measured, above "
            f"max_ppl_ratio={most:g}",
            remedy="drop fewer layers, or raise max_ppl_ratio where speculation makes up for it",
        )


def around(program: Program, cut: Cut, log: PassLog) -> fx.Node:
    """What a cut's readers read: its entry, shifted, mapped, or scaled where its gain differs from 1 by a
    percent or more."""
    if cut.place is not None:
        return put(program, cut.place, cut.entry, cut.exit, log)
    if cut.shift is None and abs(cut.gain - 1.0) < 0.01:
        return cut.entry
    found = _detour(program, cut.entry, cut.exit, cut.gain, cut.shift)
    copy_source(cut.exit, found)
    return found


def _detour(
    program: Program, entry: fx.Node, exit_: fx.Node, gain: float, shift: torch.Tensor | None
) -> fx.Node:
    """A call behind `exit_`: the entry plus the shift, or times the gain."""
    value = exit_.meta["val"]
    added = None if shift is None else program.constant(shift.to(value.dtype), exit_, prefix="tw_shift_")
    with program.graph.inserting_after(exit_):
        if added is None:
            made = program.graph.call_function(torch.ops.aten.mul.Scalar, (entry, gain))
        else:
            made = program.graph.call_function(torch.ops.aten.add.Tensor, (entry, added))
    made.meta["val"] = value
    return made


def copy_around(
    program: Program, structure: BlockStructure, numbers: Sequence[int], detours: Detours
) -> None:
    """Make every exit of these layers a scaled, shifted or mapped copy of its entry and leave the rest where
    it is."""
    moved: dict[fx.Node, fx.Node] = {}
    for number in numbers:
        for i, block in enumerate(structure.layers[number].blocks):
            entry = moved.get(block.entry, block.entry)
            gain = detours.gains[number] if detours.gains else 1.0
            place = detours.place(structure, number, i)
            if place is not None:
                copy = put(program, place, entry, block.exit)
            else:
                copy = _detour(program, entry, block.exit, gain, detours.shift(number, i))
            args = copy.args
            block.exit.replace_all_uses_with(copy)
            copy.args = args
            moved[block.exit] = copy


def cuts_of(structure: BlockStructure, layer: Layer, part: str, detours: Detours, log: PassLog) -> list[Cut]:
    """The cuts that take out a layer (`all`) or its `attention` or `mlp`; refusals go to the log."""
    for block, verdict in layer.failures():
        log.refused(block.exit, f"{block.name} may not be bypassed: {verdict.rule}: {verdict.reason}")
        return []
    if part == "all":
        gain = detours.gains[layer.index] if detours.gains else 1.0
        return [
            Cut(
                b.entry,
                b.exit,
                _own_writes(b, set(b.nodes)),
                gain,
                detours.shift(layer.index, i),
                detours.place(structure, layer.index, i),
            )
            for i, b in enumerate(layer.blocks)
        ]
    return [cut for block in layer.blocks for cut in _halves(structure, block, part, log)]


def _halves(structure: BlockStructure, block: Block, part: str, log: PassLog) -> Iterator[Cut]:
    """The segments of a block that are of one half and nothing else."""
    points, found = structure.streams[block.stream].points, False
    for i, segment in enumerate(block.segments, block.span[0]):
        if segment.kinds and all(kind in _HALVES[part] for kind in segment.kinds):
            found = True
            yield Cut(points[i], points[i + 1], _own_writes(block, _between(points[i], points[i + 1])))
    if not found:
        kinds = " | ".join("+".join(s.kinds) or "?" for s in block.segments)
        log.refused(block.exit, f"{block.name} has no step that is {part} alone: {kinds}")


def _between(entry: fx.Node, exit_: fx.Node) -> set[fx.Node]:
    """Everything that reads the entry, directly or not, and feeds the exit; the exit too."""
    below: set[fx.Node] = set()
    pending = [entry]
    while pending:
        for user in pending.pop().users:
            if user not in below and user.op == "call_function":
                below.add(user)
                pending.append(user)
    feeding: set[fx.Node] = set()
    pending = [exit_]
    while pending:
        node = pending.pop()
        if node in below and node not in feeding:
            feeding.add(node)
            pending += node.all_input_nodes
    return feeding


def _own_writes(block: Block, nodes: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Writes of a cache whose new content is made by these nodes alone: nobody else reads that cache."""
    return tuple(
        write
        for out in block.live_outs
        if out.kind == STATE and out.node in nodes
        for write in out.users
        if write.target is torch.ops.aten.copy_.default and not write.users
    )
