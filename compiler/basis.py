"""Where a rotation of channels may go: values that share one basis, what writes them and what reads them.

Multiply every value of a residual stream by an orthogonal matrix R. The model computes the same function if
all that writes to the stream is rotated (embedding tables and output projections, in their weights), all that
reads it is rotated back (the projections behind the norms, in their weights), and nothing in between looks at
single channels: a norm with a gain does, a norm without one commutes with R, because |x R| = |x|. Such a set
of values is found here on the graph alone: it grows from one value over every op that acts on all channels
alike, and ends at linear layers, embeddings and the model's results. Anything else blocks the rotation and is
named. A norm that subtracts the mean becomes one that does not once the mean is taken out of what is written.
The same search inside an attention finds the value heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from tilewright.compiler import ops
from tilewright.compiler.channel_ops import SPLITS, channels, same_basis, split_source
from tilewright.compiler.dataflow import SHAPE_ONLY_OPS, Flow, op_name, passes_through, tensor_of
from tilewright.compiler.program import InputKind, Program
from tilewright.compiler.residual import find_chains
from tilewright.compiler.schema import arguments

NORMS = (ops.rms_norm, ops.layer_norm)
_IGNORED = SHAPE_ONLY_OPS | {"_assert_tensor_metadata"}


@dataclass(frozen=True)
class Blocked:
    """Why there is no rotation here, and the node that says so."""

    node: fx.Node
    reason: str


@dataclass
class Basis:
    """A set of values [..., width] that can be rotated together."""

    width: int
    members: dict[fx.Node, None] = field(default_factory=dict)
    """Every value in the basis, in the order they were found."""
    tables: list[fx.Node] = field(default_factory=list)
    """Embedding look-ups whose table [V, width] is rotated."""
    writers: list[fx.Node] = field(default_factory=list)
    """Linear layers whose output is rotated."""
    readers: list[fx.Node] = field(default_factory=list)
    """Linear layers whose input arrives rotated."""
    entries: list[fx.Node] = field(default_factory=list)
    """Values that are rotated online because what they come from cannot be: tied tables, constants."""
    exits: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    """(value, user) that want the value in the original basis: results, a norm before a tied head."""
    centred: list[fx.Node] = field(default_factory=list)
    """Layer norms without gain; they become rms norms, and whatever is written loses its mean."""
    caches: list[fx.Node] = field(default_factory=list)
    """Placeholders that hold values of this basis from earlier calls."""
    spans: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    """Writer -> the part of its outputs that is in the basis, where projections are fused."""
    heads: bool = False
    """Head values: a linear layer's last axis holds whole heads of `width` channels."""


def find_streams(program: Program, *, gains: bool = False) -> list[tuple[fx.Node, Basis | Blocked]]:
    """(first addition, its basis or why there is none) of each residual stream, longest first.

    gains: as for `grow`.
    """
    found: list[tuple[fx.Node, Basis | Blocked]] = []
    known: set[fx.Node] = set()
    for chain in find_chains(Flow(program.graph)):
        if known.isdisjoint(chain.points):
            basis = grow(program, chain.points[0], gains=gains)
            known.update(chain.points if isinstance(basis, Blocked) else basis.members)
            if isinstance(basis, Basis):
                beyond = next((p for p in chain.points[:-1] if p not in basis.members), None)
                if beyond is not None:
                    basis = Blocked(beyond, f"the stream goes on in the original basis at {beyond.name}")
            found.append((chain.adds[0], basis))
    return found


def find_value_heads(program: Program, *, caches: bool = False) -> list[tuple[fx.Node, Basis | Blocked]]:
    """(attention, basis of its value heads or why there is none) of each attention.

    caches: values kept from earlier calls may hold rotated values; without it they block the rotation.
    """
    found: list[tuple[fx.Node, Basis | Blocked]] = []
    known: set[fx.Node] = set()
    for node in program.graph.nodes:
        if op_name(node) == "attention" and node not in known:
            basis = grow(program, node, heads=True, caches=caches)
            found.append((node, basis))
            if isinstance(basis, Basis):
                known.update(basis.members)
    return found


def grow(
    program: Program, seed: fx.Node, *, heads: bool = False, caches: bool = False, gains: bool = False
) -> Basis | Blocked:
    """The basis around one value, or what blocks it.

    gains: gains of RMS norms do not block it. For what treats channels apart, such as leaving some out.
    """
    value = tensor_of(seed)
    if value is None or value.dim() == 0 or channels(value) < 2:
        return Blocked(seed, f"{seed.name} has no fixed number of channels")
    growth = _Growth(program, Basis(channels(value), heads=heads), caches, gains)
    return growth.run(seed) or growth.settle() or growth.basis


class _Growth:
    """One search from a seed over everything that shares its basis."""

    def __init__(self, program: Program, basis: Basis, caches: bool, gains: bool) -> None:
        self.program, self.basis, self.caches, self.gains = program, basis, caches, gains
        self.pending: list[fx.Node] = []

    def run(self, seed: fx.Node) -> Blocked | None:
        self._join(seed)
        while self.pending:
            node = self.pending.pop()
            blocked = self._made_by(node)
            for user in sorted(node.users):
                blocked = blocked or self._read_by(node, user)
            if blocked is not None:
                return blocked
        return None

    def _join(self, *nodes: fx.Node) -> None:
        for node in nodes:
            if node not in self.basis.members:
                self.basis.members[node] = None
                self.pending.append(node)

    def _made_by(self, node: fx.Node) -> Blocked | None:
        """Follow a value to where it comes from."""
        sources = same_basis(node)
        if sources:
            self._join(*sources)
        elif node.target in NORMS:
            return self._norm(node)
        elif node.target is ops.embedding and self.program.is_constant(arguments(node)["weight"]):
            self.basis.tables.append(node)
        elif self.basis.heads:
            return self._head_writer(node)
        elif node.target is ops.linear:
            return self._writer(node)
        elif node.op == "get_attr" or self.program.is_weight(node):
            self.basis.entries.append(node)
        else:
            return Blocked(node, f"{node.name} is added in the original basis")
        return None

    def _norm(self, node: fx.Node) -> Blocked | None:
        given = arguments(node)
        if given["weight"] is not None and not self._gain_passes(node):
            return Blocked(node, f"the gain of {node.name} acts on single channels of a rotated value")
        if node.target is ops.layer_norm:
            if given["bias"] is not None:
                return Blocked(node, f"the offset of {node.name} acts on single channels of a rotated value")
            if len(given["normalized_shape"]) != 1:
                return Blocked(node, f"{node.name} normalises {len(given['normalized_shape'])} axes")
            self.basis.centred.append(node)
        self._join(given["x"])
        return None

    def _writer(self, node: fx.Node) -> Blocked | None:
        given = arguments(node)
        for name in ("weight", "bias"):
            value = given[name]
            if value is not None and not self.program.is_constant(value):
                return Blocked(node, f"the {name} of {node.name} is computed, not a weight")
        self.basis.writers.append(node)
        return None

    def _read_by(self, node: fx.Node, user: fx.Node) -> Blocked | None:
        """Follow a value to one of its users."""
        if user in self.basis.members or op_name(user) in _IGNORED:
            return None
        if op_name(user) in SPLITS and split_source(user) == (node,):
            self._join(*user.users)
        elif node in same_basis(user):
            self._join(user)
        elif user.op == "output":
            return self._exit(node, user, "is returned")
        elif user.target in NORMS and arguments(user)["x"] is node:
            return self._read_by_norm(node, user)
        elif self.basis.heads:
            return self._head_reader(node, user)
        elif user.target is ops.linear and arguments(user)["x"] is node:
            if not self.program.is_constant(arguments(user)["weight"]):
                return Blocked(user, f"the weight of {user.name} is computed, not a weight")
            self.basis.readers.append(user)
        else:
            return Blocked(user, f"{user.name} ({op_name(user)}) reads single channels of {node.name}")
        return None

    def _exit(self, node: fx.Node, user: fx.Node, what: str) -> Blocked | None:
        if self.basis.heads:
            return None if self.caches else Blocked(node, f"{node.name} {what}: other programs may read it")
        self.basis.exits.append((node, user))
        return None

    def _read_by_norm(self, node: fx.Node, norm: fx.Node) -> Blocked | None:
        given = arguments(norm)
        if self._gain_passes(norm) or (given["weight"] is None and given.get("bias") is None):
            self._join(norm)
            return None
        if not self.basis.heads and not self._foldable(norm):
            self.basis.exits.append((node, norm))
            return None
        return Blocked(
            norm,
            f"the gain of {norm.name} is not folded: put fold-norm-scale before this pass",
        )

    def _gain_passes(self, norm: fx.Node) -> bool:
        return self.gains and norm.target is ops.rms_norm

    def _foldable(self, norm: fx.Node) -> bool:
        """True when the gain could be in the weights behind the norm, which nothing else reads.

        A norm that is not, before a tied head or at the end of an encoder, reads the original basis instead.
        """
        return all(
            user.target is ops.linear
            and arguments(user)["x"] is norm
            and self.program.is_constant(arguments(user)["weight"])
            and len(arguments(user)["weight"].users) == 1
            for user in norm.users
        )

    def _head_writer(self, node: fx.Node) -> Blocked | None:
        """A value that is not in the heads' layout: it must be a linear layer's output cut into heads."""
        if node.op == "placeholder" and not self.program.is_weight(node):
            spec = self.program.spec(node)
            if not self.caches or spec is None or spec.kind is not InputKind.USER and not spec.mutated:
                return Blocked(node, f"{node.name} keeps values that other programs may read")
            self.basis.caches.append(node)
            return None
        if op_name(node) == "attention":
            return Blocked(node, f"the values of {node.name} are its keys or queries too, or change size")
        source = _cut_into_heads(node, self.basis.width)
        if source is None:
            return Blocked(node, f"{node.name} ({op_name(node) or node.op}) is no projection cut into heads")
        below = node
        while (earlier := passes_through(source)) is not None and len(source.users) == 1:
            source, below = earlier, source
        span = _slice_of_outputs(source)
        if span is not None and len(source.users) == 1:
            source, below = arguments(source)["self"], source
        if source.target is not ops.linear:
            return Blocked(
                source, f"{source.name} ({op_name(source) or source.op}) lies between projection and heads"
            )
        for other in sorted(u for u in source.users if u is not below and op_name(u) not in _IGNORED):
            if span is None or _overlap(span, _slice_of_outputs(other)):
                return Blocked(other, f"{other.name} reads the values of {source.name} too")
        if span is not None:
            self.basis.spans[source] = span
        return self._writer(source)

    def _head_reader(self, node: fx.Node, user: fx.Node) -> Blocked | None:
        if op_name(user) == "copy_" and user.args[1] is node and self.caches:
            return None
        if not _merges_heads(user, self.basis.width):
            return Blocked(user, f"{user.name} ({op_name(user)}) reads single channels of {node.name}")
        pending = [user]
        while pending:
            merged = pending.pop()
            for reader in sorted(merged.users):
                if op_name(reader) in _IGNORED:
                    continue
                if passes_through(reader) is merged:
                    pending.append(reader)
                elif reader.target is not ops.linear or arguments(reader)["x"] is not merged:
                    return Blocked(
                        reader, f"{reader.name} ({op_name(reader) or reader.op}) reads the merged heads"
                    )
                elif not self.program.is_constant(arguments(reader)["weight"]):
                    return Blocked(reader, f"the weight of {reader.name} is computed, not a weight")
                else:
                    self.basis.readers.append(reader)
        return None

    def settle(self) -> Blocked | None:
        """Decide what is rotated online, and whether the means can be taken out."""
        basis, sites = self.basis, {*self.basis.tables, *self.basis.readers}
        for table in list(basis.tables):
            weight = arguments(table)["weight"]
            if any(user not in sites for user in weight.users):
                basis.tables.remove(table)
                basis.entries.append(table)
        if not basis.heads and not basis.writers:
            return Blocked(next(iter(basis.members)), "no linear layer writes to this stream")
        online = len(basis.entries) + len(basis.exits)
        if not basis.heads and online > len(basis.readers):
            return Blocked(
                next(iter(basis.members)),
                f"{online} values would be rotated at run time for {len(basis.readers)} readers",
            )
        return self._means_vanish() if basis.centred else None

    def _means_vanish(self) -> Blocked | None:
        """Layer norms ignore the mean of what they read; nothing else may read a value that has one."""
        basis = self.basis
        free = _without_mean(basis)
        for node in basis.members:
            if node in free:
                continue
            for user in sorted(node.users):
                reads = user in basis.readers or (user.target is ops.rms_norm and user in basis.members)
                if reads or (node, user) in basis.exits and user.target is not ops.layer_norm:
                    return Blocked(user, f"{user.name} reads the mean of {node.name}, the layer norms do not")
        return None


def _without_mean(basis: Basis) -> set[fx.Node]:
    """Members whose mean over the channels is zero already: results of layer norms, and sums of such."""
    free: set[fx.Node] = set()
    for node in sorted(basis.members):
        sources = same_basis(node)
        if node in basis.centred or (sources and all(s in free for s in sources)):
            free.add(node)
    return free


def _cut_into_heads(node: fx.Node, width: int) -> fx.Node | None:
    """The operand [..., H * width] of a reshape to [..., H, width], else None."""
    before, after = _reshaped(node)
    if before is None or after is None or after.dim() < 2 or channels(after) != width:
        return None
    heads = after.shape[-2]
    return node.args[0] if isinstance(heads, int) and channels(before) == heads * width else None  # type: ignore[return-value]


def _merges_heads(node: fx.Node, width: int) -> bool:
    """True for a reshape from [..., H, width] to [..., H * width]."""
    before, after = _reshaped(node)
    if before is None or after is None or before.dim() < 2 or channels(before) != width:
        return False
    heads = before.shape[-2]
    return isinstance(heads, int) and channels(after) == heads * width


def _reshaped(node: fx.Node) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if op_name(node) not in ("reshape", "view", "flatten", "unflatten") or not node.args:
        return None, None
    return tensor_of(node.args[0]), tensor_of(node)


def _slice_of_outputs(node: fx.Node) -> tuple[int, int] | None:
    """First output and the one after the last of a slice of the last axis, None for any other node."""
    given, value = arguments(node), tensor_of(node)
    if op_name(node) != "slice" or value is None or given["dim"] % value.dim() != value.dim() - 1:
        return None
    start = given["start"] or 0
    whole = isinstance(start, int) and given["step"] == 1 and channels(value) > 0
    return (start, start + channels(value)) if whole and start >= 0 else None


def _overlap(span: tuple[int, int], other: tuple[int, int] | None) -> bool:
    return other is None or (span[0] < other[1] and other[0] < span[1])
