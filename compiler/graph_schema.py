"""What operator schemas say: arguments, defaults, writes; and what values were traced."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Signature:
    """What the schema of an overload says, read once per overload."""

    positional: tuple[str, ...]
    keyword: tuple[str, ...]
    defaults: Mapping[str, Any]
    """Default by argument name; absent when the argument is required."""
    types: Mapping[str, str]
    mutated: tuple[str, ...]
    """Arguments the op writes to."""
    aliased: tuple[str, ...]
    """Arguments that an output may alias without being written."""
    returns: int
    names: tuple[str, ...]
    """All arguments in schema order."""


@functools.cache
def signature(target: torch._ops.OpOverload) -> Signature:
    """The schema of an overload in the form the helpers of this file use."""
    arguments = target._schema.arguments
    out_sets = {name for r in target._schema.returns if r.alias_info for name in r.alias_info.before_set}
    mutated, aliased = [], []
    for a in arguments:
        info = a.alias_info
        if info is not None and info.is_write:
            mutated.append(a.name)
        elif info is not None and (info.before_set & out_sets or "*" in info.after_set):
            aliased.append(a.name)
    positional = tuple(a.name for a in arguments if not a.kwarg_only)
    keyword = tuple(a.name for a in arguments if a.kwarg_only)
    return Signature(
        positional=positional,
        keyword=keyword,
        defaults={a.name: _default(a) for a in arguments if a.has_default_value()},
        types={a.name: str(a.type) for a in arguments},
        mutated=tuple(mutated),
        aliased=tuple(aliased),
        returns=len(target._schema.returns),
        names=positional + keyword,
    )


def _default(argument: Any) -> Any:
    """A schema default in the form Python callers write it (memory formats are stored as enum numbers)."""
    value = argument.default_value
    if argument.name == "memory_format" and value == 0:
        return torch.contiguous_format
    return value


def normalized_args(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by schema name, defaults filled in; required ones that are absent are left out."""
    sig = signature(_overload(node))
    found: dict[str, Any] = dict(zip(sig.positional, node.args, strict=False))
    found.update(node.kwargs)
    return {
        n: found[n] if n in found else sig.defaults[n] for n in sig.names if n in found or n in sig.defaults
    }


def arg(node: fx.Node, name: str) -> Any:
    """One argument of an op call by schema name, its default when it is not given."""
    return normalized_args(node)[name]


def _overload(node: fx.Node) -> torch._ops.OpOverload:
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"{node.format_node()} is not a call of an operator overload")
    return node.target


def set_positional(node: fx.Node) -> bool:
    """Bring a call into schema form and say whether it changed.

    Arguments that may be positional are, trailing ones that equal their default are dropped, keyword-only
    ones stay keywords in schema order and are dropped when they equal their default. Ints given for float
    arguments become floats and tuples become lists, so that equal calls have equal arguments.
    """
    sig = signature(_overload(node))
    full = {n: _tidy(v, sig.types[n]) for n, v in normalized_args(node).items()}
    positional = [full[n] for n in sig.positional if n in full]
    if len(positional) != len(sig.positional):
        return False
    while positional and _is_default(positional[-1], sig, sig.positional[len(positional) - 1]):
        positional.pop()
    keywords = {n: full[n] for n in sig.keyword if n in full and not _is_default(full[n], sig, n)}
    same_keywords = same(keywords, node.kwargs) and list(keywords) == list(node.kwargs)
    if same_keywords and same(tuple(positional), node.args):
        return False
    node.args, node.kwargs = tuple(positional), keywords
    return True


def _tidy(value: Any, kind: str) -> Any:
    if isinstance(value, tuple | list):
        return [_tidy(v, "") for v in value]
    if kind == "float" and type(value) is int:
        return float(value)
    return value


def _is_default(value: Any, sig: Signature, name: str) -> bool:
    return name in sig.defaults and same(value, sig.defaults[name])


def same(a: Any, b: Any) -> bool:
    """Equality that tells 0, 0.0 and False apart and compares nodes by identity."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if type(a) is not type(b):
        return False
    if isinstance(a, fx.Node | torch.SymInt | torch.SymFloat | torch.SymBool):
        return a is b
    return a is b or bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def val(node: Any) -> Any:
    """The value a node was traced with: fake tensor, number, SymInt or a tuple of them; None when unknown."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def tensor_val(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, None for nodes that are not one tensor or carry no value."""
    value = val(node)
    return value if isinstance(value, torch.Tensor) else None


def shape(node: Any) -> tuple[Any, ...] | None:
    """The sizes of a tensor node (ints, or SymInts where dynamic); None when unknown."""
    value = tensor_val(node)
    return None if value is None else tuple(value.shape)


def static_shape(node: Any) -> tuple[int, ...] | None:
    """The sizes of a tensor node when all of them are plain ints, else None."""
    sizes = shape(node)
    if sizes is None or not all(type(s) is int for s in sizes):
        return None
    return sizes


def rank(node: Any) -> int | None:
    """The number of dimensions of a tensor node; None when unknown."""
    value = tensor_val(node)
    return None if value is None else value.dim()


def is_random(given: Mapping[str, Any]) -> bool:
    """Whether a call of an op that may draw random numbers does, by its arguments (dropout at 0 does not)."""
    if given.get("train") is False or given.get("training") is False:
        return False
    for name in ("dropout_p", "p", "dropout"):
        if name in given:
            return bool(isinstance(given[name], fx.Node) or given[name] != 0)
    return True
