"""Applying a rotation: weights get it offline as derived buffers, what is left gets it online as ops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from tilewright.compiler import ops
from tilewright.compiler.basis import Basis
from tilewright.compiler.graph import insert_like
from tilewright.compiler.hadamard import HadamardPlan, base_matrix, random_signs, transform_rows
from tilewright.compiler.program import Program
from tilewright.compiler.schema import arguments

ROTATED = "tw_rotated"
"""Node metadata: which rotations a node has taken part in."""
_PIECE = 1 << 22
"""Elements of a table that are rotated at once."""


@dataclass(frozen=True)
class Rotation:
    """x -> x diag(signs) H / sqrt(block) along the last axis, in blocks."""

    block: int
    base: int
    seed: int | None = None
    """Seed of the random signs; None for no signs."""

    @classmethod
    def of(cls, plan: HadamardPlan, seed: int | None = None) -> Rotation:
        return cls(plan.block, plan.base, seed)

    def __call__(self, x: Tensor) -> Tensor:
        """The rotation of x [..., D] in the dtype of x."""
        base = base_matrix(self.base) if self.base > 1 else None
        signs = None if self.seed is None else random_signs(x.shape[-1], self.seed)
        return transform_rows(x, self.block, base, signs)


@dataclass(frozen=True)
class Edit:
    """One rotation of a weight: `columns` W [N, D] -> W R, `rows` W [D, K] -> R^T W, `vector` b -> b R."""

    form: str
    rotation: Rotation
    centre: bool = False
    """Take the mean over the rotated axis out first."""
    span: tuple[int, int] | None = None
    """Part of the axis that is rotated; None for all of it."""


class Rotator:
    """Rotates bases of one program. Weights are edited by `finish`, once for all that was asked of them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._touched: list[fx.Node] = []
        self._constants: dict[tuple[str, int, int], fx.Node] = {}
        self._edits: dict[tuple[fx.Node, str], tuple[Edit, ...]] = {}
        self._derived: dict[tuple[fx.Node, tuple[Edit, ...]], fx.Node] = {}

    def take_touched(self) -> list[fx.Node]:
        """The nodes edited or inserted since the last call."""
        touched, self._touched = list(dict.fromkeys(self._touched)), []
        return touched

    def rotate(self, basis: Basis, rotation: Rotation, mark: str) -> None:
        """Rotate every value of a basis; `mark` is noted on the nodes that take part."""
        centre = bool(basis.centred)
        for node in (*basis.readers, *basis.tables):
            edit = Edit("columns", rotation, centre and node.target is ops.embedding)
            self._edit(node, "weight", edit, mark)
        for writer in basis.writers:
            span = basis.spans.get(writer)
            self._edit(writer, "weight", Edit("rows", rotation, centre, span), mark)
            if arguments(writer)["bias"] is not None:
                self._edit(writer, "bias", Edit("vector", rotation, centre, span), mark)
        for entry in basis.entries:
            self._enter(basis, entry, rotation, centre, mark)
        for value, user in basis.exits:
            user.replace_input_with(value, self.online(value, rotation, mark, inverse=True))
        for norm in basis.centred:
            given = arguments(norm)
            norm.target, norm.args, norm.kwargs = ops.rms_norm, (given["x"], None, given["eps"]), {}
            self._note(norm, mark)
        for member in basis.members:
            member.meta[ROTATED] = frozenset({mark, *member.meta.get(ROTATED, ())})

    def read_rotated(self, linear: fx.Node, rotation: Rotation, mark: str) -> None:
        """Let a linear layer take its input rotated: W -> W R."""
        self._edit(linear, "weight", Edit("columns", rotation), mark)

    def finish(self) -> None:
        """Derive the edited weights and forget those that nothing reads any more."""
        for (node, name), edits in self._edits.items():
            given = arguments(node)
            given[name] = self._derive(given[name], edits)
            node.args, node.kwargs = tuple(given.values()), {}
        self._edits.clear()
        self.program.drop_unread()

    def online(self, value: fx.Node, rotation: Rotation, mark: str, *, inverse: bool = False) -> fx.Node:
        """A node right behind a value that holds it rotated, or rotated back; one per value and direction."""
        for user in value.users:
            if user.meta.get("tw_online") == (mark, inverse):
                return user
        base = self._constant("base", rotation.base, 0, value) if rotation.base > 1 else None
        width = int(value.meta["val"].shape[-1])
        signs = None if rotation.seed is None else self._constant("signs", width, rotation.seed, value)
        graph, place = self.program.graph, value.next
        while place.op in ("placeholder", "get_attr"):
            place = place.next
        node = insert_like(graph, place, ops.hadamard, (value, rotation.block, base, signs, inverse), value)
        node.meta["tw_online"] = (mark, inverse)
        self._note(node, mark)
        return node

    def _enter(self, basis: Basis, entry: fx.Node, rotation: Rotation, centre: bool, mark: str) -> None:
        """Rotate a value of the original basis where it comes in: offline when it is a weight."""
        users = [u for u in entry.users if u in basis.members or u in basis.readers]
        users += [u for v, u in basis.exits if v is entry]
        if self.program.is_constant(entry):
            inside = self._derive(entry, (Edit("columns", rotation, centre),))
        else:
            inside = self.online(self._centred(entry) if centre else entry, rotation, mark)
        for user in users:
            user.replace_input_with(entry, inside)
        basis.exits = [(inside if v is entry else v, u) for v, u in basis.exits]
        inside.meta[ROTATED] = frozenset({mark})

    def _centred(self, value: fx.Node) -> fx.Node:
        """value - mean(value) over the channels."""
        aten, graph = torch.ops.aten, self.program.graph
        mean = insert_like(graph, value.next, aten.mean.dim, (value, [-1], True), value)
        return insert_like(graph, mean.next, aten.sub.Tensor, (value, mean), value)

    def _edit(self, node: fx.Node, name: str, edit: Edit, mark: str) -> None:
        self._edits[node, name] = (*self._edits.get((node, name), ()), edit)
        self._note(node, mark)

    def _derive(self, weight: fx.Node, edits: tuple[Edit, ...]) -> fx.Node:
        key = (weight, edits)
        if key not in self._derived:
            name = f"{self.program.path_of(weight)} rotated"
            self._derived[key] = self.program.derive(
                name, (weight,), partial(rotated, edits=edits), like=weight
            )
        return self._derived[key]

    def _note(self, node: fx.Node, mark: str) -> None:
        node.meta[ROTATED] = frozenset({mark, *node.meta.get(ROTATED, ())})
        node.meta["rewritten_by"] = (*node.meta.get("rewritten_by", ()), "rotate-hadamard")
        self._touched.append(node)

    def _constant(self, what: str, size: int, seed: int, like: fx.Node) -> fx.Node:
        key = (what, size, seed)
        if key not in self._constants:
            value = base_matrix(size).clone() if what == "base" else random_signs(size, seed)
            self._constants[key] = self.program.constant(value, like)
        return self._constants[key]


def rotated(weight: Tensor, *, edits: tuple[Edit, ...]) -> Tensor:
    """A weight after its edits, computed in float64 and rounded once."""
    if weight.numel() <= _PIECE or any(edit.form != "columns" for edit in edits):
        return _rotated(weight, edits)
    found = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows = max(
        1, _PIECE // weight.shape[-1]
    )  # each row for itself: float64 of a large table is not held whole
    for part, into in zip(weight.split(rows), found.split(rows), strict=True):
        into.copy_(_rotated(part, edits))
    return found


def _rotated(weight: Tensor, edits: tuple[Edit, ...]) -> Tensor:
    wide = weight.double()
    for edit in edits:
        turned = wide.t() if edit.form == "rows" else wide
        if edit.centre:
            turned = turned - turned.mean(-1, keepdim=True)
        if edit.span is None:
            turned = edit.rotation(turned)
        else:
            low, high = edit.span
            turned = torch.cat(
                (turned[..., :low], edit.rotation(turned[..., low:high]), turned[..., high:]), -1
            )
        wide = turned.t() if edit.form == "rows" else turned
    return wide.to(weight.dtype).contiguous()
