"""Which (query, key) pairs a block-sparse attention computes, as one value: `BlockLayout`.

Queries and keys stand in *slots* 0, 1, 2, ...; without index maps slot i is token i. Slots are cut into
blocks of any size (a size of 0 is legal). For every group of heads, a list of key blocks per query block, in
CSR form, names the blocks that are computed; an entry is either computed whole or under one predicate of a
closed set. A layout is data, not code: static layouts are built here, online layouts are the same tensors
computed in the graph (`rows_from_block_mask` is made of plain tensor ops with static shapes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError

FAR = 1 << 30
"""A distance no pair of slots reaches: an open end of a band."""
WIDTH = 6
"""Integers per predicate in the flat form that the op takes."""


class Kind(IntEnum):
    """The closed set of predicates; i and j are query and key slot, u(i) = (i + shift) // unit."""

    BAND = 1
    """-after <= u(i) - j // unit <= before, or j < sink."""
    CAUSAL = 2
    """-after <= u(i) - j // unit, and (u(i) - j // unit <= before or j < sink)."""
    SLOT = 3
    """j % unit < before: the tail of every ragged tile of `unit` slots is empty."""
    PAD_SELF = 4
    """i + shift and j are both below limit[batch], or both are not."""
    USER = 5
    """mask[batch, head, i, j], any axis of size 1 stands for all; columns only: a mask of one query row."""


@dataclass(frozen=True)
class Predicate:
    """One row of the predicate table; use the named constructors."""

    kind: Kind
    before: int = FAR
    after: int = FAR
    unit: int = 1
    sink: int = 0
    shift: int = 0

    @staticmethod
    def band(width: int, unit: int = 1, sink: int = 0, shift: int = 0) -> Predicate:
        """|i // unit - j // unit| <= width, or j < sink."""
        return Predicate(Kind.BAND, width, width, unit, sink, shift)

    @staticmethod
    def causal(window: int = FAR, sink: int = 0, shift: int = 0) -> Predicate:
        """j <= i + shift, and j is one of the last `window` such keys or one of the first `sink`."""
        return Predicate(Kind.CAUSAL, window if window >= FAR else window - 1, 0, 1, sink, shift)

    @staticmethod
    def block_causal(size: int, shift: int = 0) -> Predicate:
        """j // size <= (i + shift) // size."""
        return Predicate(Kind.CAUSAL, FAR, 0, size, 0, shift)

    @staticmethod
    def sink_columns(count: int) -> Predicate:
        """j < count."""
        return Predicate(Kind.BAND, -1, -1, 1, count)

    @staticmethod
    def slot_valid(size: int, valid: int) -> Predicate:
        """j % size < valid."""
        return Predicate(Kind.SLOT, valid, 0, size)

    @staticmethod
    def pad_self(shift: int = 0) -> Predicate:
        """Padding attends to padding only, the rest to the rest only; `limit` says where padding starts."""
        return Predicate(Kind.PAD_SELF, shift=shift)

    @staticmethod
    def user() -> Predicate:
        """The layout's boolean `mask` decides, element by element."""
        return Predicate(Kind.USER)

    def row(self) -> tuple[int, ...]:
        """The flat form: kind, before, after, unit, sink, shift."""
        return (int(self.kind), self.before, self.after, self.unit, self.sink, self.shift)

    @staticmethod
    def from_row(row: Sequence[int]) -> Predicate:
        """Inverse of `row`."""
        return Predicate(Kind(row[0]), *row[1:])


def _fail(message: str, remedy: str = "") -> OptionError:
    return OptionError(f"block layout: {message}", remedy=remedy)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The layout of one attention. All index tensors are int32; G groups, nQ and nK blocks, H query heads.

    A row list shorter than its capacity C leaves the rest of `col` and `flag` unread.
    """

    row_ptr: Tensor
    """[G, nQ + 1]: entries row_ptr[g, r] to row_ptr[g, r + 1] of col[g] are the row of query block r."""
    col: Tensor
    """[G, C] key blocks, none twice in a row; ascending is fastest."""
    q_off: Tensor
    """[1 or G, nQ + 1] first slot of each query block, then the end; ascending."""
    k_off: Tensor
    """[1 or G, nK + 1] the same for keys."""
    head_group: Tensor
    """[1 or B, H] group of each head."""
    flag: Tensor | None = None
    """[G, C]: 0 a whole block, p a block under predicates[p - 1]. None: all whole."""
    predicates: tuple[Predicate, ...] = ()
    k_valid: Tensor | None = None
    """[B]: key slots from here on are not attended (text padding)."""
    q_valid: Tensor | None = None
    """[B]: query slots from here on give 0 and -inf."""
    limit: Tensor | None = None
    """[B]: first padding slot, for PAD_SELF only."""
    src_q: Tensor | None = None
    """[1 or G, query slots]: the token in each query slot, none twice. Results return to token order."""
    src_k: Tensor | None = None
    """[1 or G, key slots]: the token in each key slot, none twice."""
    mask: Tensor | None = None
    """bool [1 or B, 1 or H, 1 or query slots, 1 or key slots], for USER only; in slot order."""

    @staticmethod
    def from_block_mask(
        mask: Tensor,
        q_off: Tensor | Sequence[int],
        k_off: Tensor | Sequence[int],
        heads: int,
        *,
        head_group: Tensor | None = None,
        flag: Tensor | None = None,
        predicates: Sequence[Predicate] = (),
    ) -> BlockLayout:
        """From mask [nQ, nK] or [G, nQ, nK] (bool: which blocks) and flags of the same shape (None: whole).

        head_group None: group 0 for all heads when there is one group, group h for head h when G == heads.
        """
        mask = mask if mask.dim() == 3 else mask[None]
        if head_group is None:
            if mask.shape[0] not in (1, heads):
                raise _fail(f"{mask.shape[0]} groups for {heads} heads", "give head_group")
            one = mask.shape[0] == 1
            head_group = torch.zeros(1, heads) if one else torch.arange(heads)[None]
        row_ptr, col, place = rows_from_block_mask(mask)
        used = max(1, int(row_ptr[:, -1].max()))
        flags = None
        if flag is not None:
            flags = torch.zeros(mask.shape[0], int(place.max()) + 1, dtype=torch.int32)
            flags.scatter_(1, place, flag.expand_as(mask).reshape(mask.shape[0], -1).to(torch.int32))
            flags = flags[:, :used].contiguous()
        layout = BlockLayout(
            row_ptr,
            col[:, :used].contiguous(),
            _offsets(q_off),
            _offsets(k_off),
            head_group.to(torch.int32),
            flags,
            tuple(predicates),
        )
        layout.validate()
        return layout

    @staticmethod
    def dense(queries: int, keys: int, heads: int, *, q_block: int = 128, k_block: int = 128) -> BlockLayout:
        """Every block, whole."""
        q_off, k_off = offsets(queries, q_block), offsets(keys, k_block)
        whole = torch.ones(len(q_off) - 1, len(k_off) - 1, dtype=torch.bool)
        return BlockLayout.from_block_mask(whole, q_off, k_off, heads)

    @staticmethod
    def causal(
        queries: int,
        keys: int,
        heads: int,
        *,
        window: int = FAR,
        sink: int = 0,
        shift: int = 0,
        q_block: int = 128,
        k_block: int = 128,
    ) -> BlockLayout:
        """`Predicate.causal(window, sink, shift)`; blocks that it keeps whole carry no flag."""
        if window < 1 or sink < 0 or shift < 0:
            raise _fail(f"window={window}, sink={sink}, shift={shift}: at least 1, 0, 0")
        q_off, k_off = offsets(queries, q_block), offsets(keys, k_block)
        starts, ends = torch.tensor(k_off[:-1])[None], torch.tensor(k_off[1:])[None] - 1
        first, last = torch.tensor(q_off[:-1])[:, None] + shift, torch.tensor(q_off[1:])[:, None] - 1 + shift
        some = (starts <= last) & ((first - ends < window) | (starts < sink))
        whole = (ends <= first) & ((last - starts < window) | (ends < sink))
        rule = Predicate.causal(window, sink, shift)
        return BlockLayout.from_block_mask(
            some, q_off, k_off, heads, flag=(~whole).int()[None], predicates=(rule,)
        )

    def validate(self) -> None:
        """Raise one OptionError naming the field, the place and the legal range; reads the data."""
        groups = self.row_ptr.shape[0]
        _check_tensors(self, groups)
        for name in ("q_off", "k_off"):
            off = getattr(self, name)
            if bool((off[:, 0] != 0).any()) or bool((off.diff(dim=1) < 0).any()):
                raise _fail(f"{name} must start at 0 and never fall")
        blocks = self.k_off.shape[1] - 1
        capacity = self.col.shape[1]
        for g in range(groups):
            ptr = self.row_ptr[g].tolist()
            if ptr[0] != 0 or ptr[-1] > capacity or any(a > b for a, b in zip(ptr, ptr[1:], strict=False)):
                raise _fail(f"row_ptr[{g}] must rise from 0 to at most {capacity}, it ends at {ptr[-1]}")
            used = self.col[g, : ptr[-1]].long()
            if used.numel() and (int(used.min()) < 0 or int(used.max()) >= blocks):
                bad = int(used.min()) if int(used.min()) < 0 else int(used.max())
                raise _fail(f"col[{g}] names key block {bad}; there are {blocks}")
            rows = torch.repeat_interleave(torch.arange(len(ptr) - 1), torch.tensor(ptr).diff())
            pairs = rows * blocks + used
            if pairs.unique().numel() != pairs.numel():
                counts = torch.bincount(pairs)
                twice = int((counts > 1).nonzero()[0])
                raise _fail(f"group {g}: key block {twice % blocks} is twice in row {twice // blocks}")
            if self.flag is not None and ptr[-1]:
                flags = self.flag[g, : ptr[-1]]
                if int(flags.min()) < 0 or int(flags.max()) > len(self.predicates):
                    bad = int(flags.min()) if int(flags.min()) < 0 else int(flags.max())
                    raise _fail(f"flag {bad} in group {g}; there are {len(self.predicates)} predicates")
        if int(self.head_group.min()) < 0 or int(self.head_group.max()) >= groups:
            raise _fail(f"head_group must lie in 0..{groups - 1}")
        for name in ("src_q", "src_k"):
            src = getattr(self, name)
            if src is not None and any(row.unique().numel() != row.numel() for row in src):
                raise _fail(f"{name} names a token twice")

    def density(self) -> float:
        """Attended pairs / all pairs of slots, mean over groups; k_valid, q_valid and data masks aside.

        Exact: predicates over indices are counted pair by pair in the blocks that carry them; a block under
        PAD_SELF or USER counts as whole.
        """
        groups = self.row_ptr.shape[0]
        total, pairs = 0, 0
        for g in range(groups):
            q, k = _of(self.q_off, g).long(), _of(self.k_off, g).long()
            ptr = self.row_ptr[g].long()
            rows = torch.repeat_interleave(torch.arange(len(ptr) - 1), ptr.diff())
            cols = self.col[g, : len(rows)].long()
            flags = torch.zeros_like(cols) if self.flag is None else self.flag[g, : len(rows)].long()
            area = q.diff()[rows] * k.diff()[cols]
            counted = [p for p, rule in enumerate(self.predicates, 1) if rule.kind <= Kind.SLOT]
            partial = torch.isin(flags, torch.tensor(counted, dtype=torch.long))
            total += int(area[~partial].sum())
            for e in partial.nonzero()[:, 0].tolist():
                r, c = int(rows[e]), int(cols[e])
                i, j = torch.arange(int(q[r]), int(q[r + 1])), torch.arange(int(k[c]), int(k[c + 1]))
                total += int(index_predicate(self.predicates[int(flags[e]) - 1], i, j).sum())
            pairs += int(q[-1]) * int(k[-1])
        return total / pairs if pairs else 0.0

    def as_tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name; `predicates` apart (they are constants)."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "predicates"}
        return {name: value for name, value in found.items() if value is not None}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], predicates: Sequence[Predicate] = ()) -> BlockLayout:
        """Inverse of `as_tensors`; validated."""
        names = {f.name for f in fields(BlockLayout)} - {"predicates"}
        wrong = sorted(set(tensors) - names)
        if wrong:
            raise _fail(f"unknown tensors {', '.join(wrong)}", f"known: {', '.join(sorted(names))}")
        layout = BlockLayout(**tensors, predicates=tuple(predicates))
        layout.validate()
        return layout

    def arguments(self) -> tuple[Tensor | list[int] | None, ...]:
        """The op's arguments between v and scale: `block_sparse_attention(q, k, v, *layout.arguments())`."""
        return (
            self.row_ptr,
            self.col,
            self.q_off,
            self.k_off,
            self.head_group,
            self.flag,
            flat(self.predicates),
            self.k_valid,
            self.q_valid,
            self.limit,
            self.src_q,
            self.src_k,
            self.mask,
        )

    def with_(self, **changes: Tensor | None) -> BlockLayout:
        """A validated copy with other tensors, e.g. `layout.with_(k_valid=lengths)`."""
        made = replace(self, **changes)  # type: ignore[arg-type]
        made.validate()
        return made


def _check_tensors(layout: BlockLayout, groups: int) -> None:
    """Dtypes and shapes, which need no data."""
    for name, value in layout.as_tensors().items():
        wanted = torch.bool if name == "mask" else torch.int32
        axes = {"k_valid": 1, "q_valid": 1, "limit": 1, "mask": 4}.get(name, 2)
        if value.dtype != wanted or value.dim() != axes:
            raise _fail(f"{name} is {list(value.shape)} {value.dtype}; it must have {axes} axes of {wanted}")
        if name in ("q_off", "k_off", "src_q", "src_k") and value.shape[0] not in (1, groups):
            raise _fail(f"{name} has {value.shape[0]} rows; 1 or {groups}")
    if layout.col.shape[0] != groups or (layout.flag is not None and layout.flag.shape != layout.col.shape):
        raise _fail(f"col {list(layout.col.shape)} and flag must be [{groups}, C]")
    if layout.row_ptr.shape[1] != layout.q_off.shape[1]:
        raise _fail(f"row_ptr has {layout.row_ptr.shape[1] - 1} rows, q_off {layout.q_off.shape[1] - 1}")
    check_predicates(layout.predicates, layout.limit is not None, layout.mask is not None)
    for name, off in (("src_q", layout.q_off), ("src_k", layout.k_off)):
        src = getattr(layout, name)
        if src is not None and src.shape[1] < int(off[:, -1].max()):
            raise _fail(f"{name} has {src.shape[1]} slots, the blocks reach {int(off[:, -1].max())}")


def check_predicates(predicates: Sequence[Predicate], limit: bool, mask: bool) -> None:
    """Raise OptionError for parameters out of range or a predicate whose tensor is absent."""
    for p, rule in enumerate(predicates, 1):
        if min(rule.unit - 1, rule.sink, rule.shift, rule.before + 1, rule.after + 1) < 0:
            raise _fail(f"predicate {p} {rule}: unit >= 1, sink and shift >= 0, before and after >= -1")
        if rule.kind is Kind.PAD_SELF and not limit:
            raise _fail(f"predicate {p} is PAD_SELF and there is no limit tensor")
        if rule.kind is Kind.USER and not mask:
            raise _fail(f"predicate {p} is USER and there is no mask tensor")


def flat(predicates: Sequence[Predicate]) -> list[int]:
    """The op's form of the predicate table: WIDTH integers each."""
    return [value for rule in predicates for value in rule.row()]


def unflatten(table: Sequence[int]) -> list[Predicate]:
    """Inverse of `flat`; OptionError when the length or a kind is wrong."""
    if len(table) % WIDTH or any(kind not in tuple(Kind) for kind in table[::WIDTH]):
        raise _fail(f"predicate table {list(table)[:WIDTH]}...: {WIDTH} integers each, kind 1..{len(Kind)}")
    return [Predicate.from_row(table[at : at + WIDTH]) for at in range(0, len(table), WIDTH)]


def index_predicate(rule: Predicate, i: Tensor, j: Tensor) -> Tensor:
    """bool [queries, keys] of a predicate that needs no data, for slots i [queries] and j [keys]."""
    if rule.kind is Kind.SLOT:
        return (j % rule.unit < rule.before).expand(len(i), len(j))
    distance = ((i + rule.shift) // rule.unit)[:, None] - (j // rule.unit)[None]
    above, near = distance >= -rule.after, distance <= rule.before
    sink = (j < rule.sink)[None]
    return above & (near | sink) if rule.kind is Kind.CAUSAL else (above & near) | sink


def offsets(length: int, block: int) -> list[int]:
    """Block borders 0, block, 2 block, ..., length; the last block may be short."""
    if block < 1 or length < 0:
        raise _fail(f"block size {block} of length {length}: at least 1 and 0")
    return [*range(0, length, block), length] if length else [0, 0]


def rows_from_block_mask(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of a block mask bool [G, nQ, nK]: row_ptr [G, nQ + 1], col [G, nQ nK], place [G, nQ nK] int64.

    place is where each block of the mask went in col; blocks that are off go to nQ nK. Plain tensor ops with
    static shapes, so an online layout can run it inside the graph.
    """
    groups, rows, blocks = mask.shape
    on = mask.reshape(groups, -1)
    count = on.to(torch.int32).cumsum(1, dtype=torch.int32)
    row_ptr = torch.nn.functional.pad(count[:, blocks - 1 :: blocks], (1, 0)).contiguous()
    place = torch.where(on, count - 1, rows * blocks).long()
    names = torch.arange(blocks, dtype=torch.int32, device=mask.device).repeat(rows).expand(groups, -1)
    col = torch.zeros(groups, rows * blocks + 1, dtype=torch.int32, device=mask.device)
    return row_ptr, col.scatter(1, place, names)[:, :-1].contiguous(), place


def _offsets(values: Tensor | Sequence[int]) -> Tensor:
    made = torch.as_tensor(values, dtype=torch.int32)
    return made if made.dim() == 2 else made[None]


def _of(rows: Tensor, group: int) -> Tensor:
    return rows[group if rows.shape[0] > 1 else 0]
