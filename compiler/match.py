"""What matching gives: a match with its bound values, a failure that says how far it got, or a refusal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tilewright.compiler.program import Program
from tilewright.compiler.schema import tensor_meta
from tilewright.runtime.contracts import Refusal


@dataclass(frozen=True)
class Failure:
    """The furthest a match got: `depth` pattern calls matched before `reason`."""

    reason: str
    node: fx.Node | None
    depth: int
    form: str


@dataclass(frozen=True)
class Match:
    """A successful match. Index it by parameter name; values are nodes or constants."""

    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    bound: dict[str, Any]
    form: str
    program: Program | None = None
    """The program the match lies in, when it is matched by a pass."""

    @property
    def training(self) -> bool:
        """True when gradients of the program are wanted."""
        return self.program is not None and self.program.training

    def is_weight(self, name: str) -> bool:
        """True when the parameter is bound to a module-owned tensor that the program does not write to."""
        return self.program is not None and self.program.is_weight(self.bound[name])

    @property
    def root(self) -> fx.Node:
        return self.outputs[0]

    def __getitem__(self, name: str) -> Any:
        return self.bound.get(name)

    def chosen(self, params: Iterable[str]) -> dict[str, Any]:
        """The constants bound to names other than the parameters."""
        return {k: v for k, v in sorted(self.bound.items()) if k not in params and not _has_node(v)}

    def val(self, name: str) -> torch.Tensor:
        """The fake tensor bound to a parameter; TypeError when it is not a tensor."""
        meta = tensor_meta(self.bound[name])
        if meta is None:
            raise TypeError(f"{name} is bound to {self.bound[name]!r}, which is not a tensor")
        return meta

    def is_tensor(self, name: str) -> bool:
        return tensor_meta(self.bound[name]) is not None

    def shape(self, name: str) -> tuple[Any, ...]:
        return tuple(self.val(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.val(name).dtype

    def constant(self, name: str, *kinds: type) -> Refusal | None:
        """None when the parameter is bound to a constant of one of the kinds, otherwise the refusal."""
        value = self.bound[name]
        if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
            return None
        wanted = " or ".join(k.__name__ for k in kinds)
        return refuse(f"{name} must be a constant {wanted}, found {value!r}", at=value)

    def same_dtype(self, *names: str) -> Refusal | None:
        """None when all the named tensors have one dtype."""
        for name in names[1:]:
            if self.dtype(name) != self.dtype(names[0]):
                return refuse(
                    f"{names[0]} is {self.dtype(names[0])} and {name} is {self.dtype(name)}",
                    at=self.bound[name],
                )
        return None

    def shapes(self, **letters: str) -> dict[str, Any] | Refusal:
        """Unify shape letters over tensors: shapes(q="B H S D", k="B H T D") -> {"B": ..., ...}.

        A digit must be that size. Sizes that cannot be proven equal are a refusal. `...` at the start
        skips axes.
        """
        sizes: dict[str, Any] = {}
        for name, spec in letters.items():
            want, have = spec.split(), list(self.shape(name))
            if want and want[0] == "...":
                want = want[1:]
                have = have[-len(want) :] if len(have) >= len(want) else have
            if len(want) != len(have):
                return refuse(f"{name} has {len(have)} axes, expected {spec!r}", at=self.bound[name])
            for letter, size in zip(want, have, strict=True):
                known = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
                if not known_equal(known, size):
                    return refuse(f"axis {letter} of {name} is {size}, expected {known}", at=self.bound[name])
        return sizes


def _has_node(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_node(v) for v in value)
    return isinstance(value, fx.Node)


def known_equal(a: Any, b: Any) -> bool:
    """True when two sizes are provably equal; unknown is False and adds no guard."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return bool(statically_known_true(a == b))
    return bool(a == b)


def refuse(reason: str, at: Any = None) -> Refusal:
    """Say no: the reason completes `PASS did not apply at NODE: ...`; `at` is the node or value to blame."""
    return Refusal(reason, at.name if isinstance(at, fx.Node) else "")
