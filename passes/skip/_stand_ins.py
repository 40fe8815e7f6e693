"""Where the linear map that stands in for dropped layers goes: into a layer that is there, or beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from tilewright.compiler import PassLog, Program, ops
from tilewright.compiler.blocks import BlockStructure
from tilewright.compiler.graph import insert_like
from tilewright.compiler.schema import arguments
from tilewright.compiler.stand_in import StandIn, front_of, moved_weight


@dataclass(frozen=True)
class Place:
    """A map x W^T + b that is added to a stream."""

    reads: fx.Node
    """x: what `front` reads, or the stream."""
    front: fx.Node | None
    """The linear layer that takes the map in; None where something else reads the stream too, or where
    there is none."""
    weight: torch.Tensor
    bias: torch.Tensor


def place_of(structure: BlockStructure, one: StandIn, block: int) -> Place:
    """Where the map in front of a block of the first dropped layer goes."""
    weight, bias = one.maps[block]
    behind = structure.layers[one.first].blocks[block]
    front = front_of(structure, behind) if one.front else None
    if front is None:
        return Place(behind.entry, None, weight, bias)
    alone = all(user in behind.nodes for user in behind.entry.users)
    return Place(arguments(front)["x"], front if alone else None, weight, bias)


def put(
    program: Program, place: Place, entry: fx.Node, exit_: fx.Node, log: PassLog | None = None
) -> fx.Node:
    """What the readers of `exit_` read: the entry with the map in the linear layer in front of it, or the
    entry plus a linear layer of its own. Without a log, as in a reference, the latter."""
    given = {} if place.front is None else arguments(place.front)
    if log is not None and place.front is not None and program.is_constant(given["weight"]):
        path = program.path_of(given["weight"])
        fold = partial(moved_weight, by=place.weight)
        weight = program.derive(f"{path} @ dropped layers", (given["weight"],), fold)
        if given["bias"] is None:
            bias = program.constant(place.bias.to(exit_.meta["val"].dtype), exit_, prefix="tw_stand_in_")
        else:
            add = partial(moved_weight, by=place.bias)
            bias = program.derive(f"{path} @ dropped layers, bias", (given["bias"],), add)
        place.front.args, place.front.kwargs = (given["x"], weight, bias), {}
        log.note(f"{path} takes the map of what is dropped behind it: no multiplication more")
        return entry
    value = exit_.meta["val"]
    held = [
        program.constant(part.to(value.dtype), exit_, prefix="tw_stand_in_")
        for part in (place.weight, place.bias)
    ]
    mapped = insert_like(program.graph, exit_.next, ops.linear, (place.reads, *held), exit_)
    if log is not None:
        log.note(
            f"a linear layer {list(place.weight.shape)} stands in for what is dropped behind {entry.name}"
        )
    return insert_like(program.graph, mapped.next, torch.ops.aten.add.Tensor, (entry, mapped), exit_)
