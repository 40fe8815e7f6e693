"""A tensor subclass whose elements are residues: plain PyTorch code and FX graphs run on it unchanged.

Composite ops and semantic ops reach it through their own definitions; what arrives here are ATen ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tilewright.compiler.finite_field import planes as field
from tilewright.compiler.finite_field import residues
from tilewright.compiler.finite_field.planes import OutOfScope, Planes
from tilewright.compiler.ops import semantic_op

Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)
HANDLERS: dict[str, Handler] = {}
"""ATen op name -> handler(context, *args, **kwargs) that returns Planes, a tuple of them, or real tensors."""
PAIRS: dict[str, Handler] = {}
"""ATen op name -> handler(context, *args) that returns a Value, of ops that take or give complex tensors."""
COMPOSITES: dict[object, Handler] = {}
"""Torch functions taken whole, because ATen would decompose them into inexact constants or in-place steps."""


class Value(Tensor):
    """A tensor of residues; `dtype` is a label that selects code paths, rounding is not modelled.

    A complex tensor holds pairs: its planes have one axis of two more than it has itself.
    """

    planes: Planes
    key: str

    @staticmethod
    def __new__(cls: type[Value], planes: Planes, dtype: torch.dtype, key: str) -> Value:
        shape = planes.shape[:-1] if dtype.is_complex else planes.shape
        value: Value = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        value.planes = planes
        value.key = key
        return value

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch declares it untyped
        return f"Value(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (composite := COMPOSITES.get(function)) is not None:
            return composite(*args, **kwargs)
        if (op := semantic_op(function)) is not None:
            return op.definition(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its base implementation otherwise
        cls, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


def variable(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, key: str) -> Value:
    """An independent uniform value of this shape."""
    shape = (*shape, 2) if dtype.is_complex else shape
    p = residues.draw(tuple(shape), residues.P, generator)
    return Value(Planes(p, residues.draw(tuple(shape), residues.Q, generator)), dtype, key)


def values_in(arguments: Iterable[object]) -> Iterator[Value]:
    """Every Value among arguments and in lists of them."""
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from values_in(argument)


def as_planes(argument: object) -> Planes:
    """Planes of an argument: a Value, a real tensor or a number."""
    return argument.planes if isinstance(argument, Value) else field.lift(argument)


class Context:
    """What a handler needs to know of the call: the op, its arguments and the key of this draw."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.name = function._schema.name
        self.args = args
        self.kwargs = kwargs
        found = list(values_in((*args, *kwargs.values())))
        self.key = found[0].key
        self.complex = any(value.dtype.is_complex for value in found)
        self.dtype = found[0].dtype
        for value in found[1:]:
            self.dtype = torch.promote_types(self.dtype, value.dtype)

    def wrap(self, result: Any) -> Any:
        """Planes in a result become Values; everything else is kept."""
        label = self.kwargs.get("dtype") or self.dtype
        if not label.is_floating_point:
            raise OutOfScope(f"{self.name} to {label}")
        if isinstance(result, tuple | list):
            return type(result)(self.wrap(item) for item in result)
        return Value(result, label, self.key) if isinstance(result, Planes) else result


def dispatch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One ATen op on Values: its handler, data movement, or an arbitrary function if it is elementwise."""
    if any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in function._schema.arguments
    ):
        raise OutOfScope(f"{function._schema.name} writes in place")
    context = Context(function, args, kwargs)
    if context.complex or context.name == "aten::view_as_complex":
        if context.name in PAIRS:
            return PAIRS[context.name](context, *args, **kwargs)
        if context.name not in MOVEMENT:
            raise OutOfScope(f"{context.name} of complex numbers")
        halves = [tree_map(lambda value, i=i: part(value, i), (args, kwargs)) for i in (0, 1)]
        return join([dispatch(function, *half) for half in halves])
    handler = HANDLERS.get(context.name)
    if handler is not None:
        return context.wrap(handler(context, *args, **kwargs))
    if context.name in MOVEMENT:
        return context.wrap(move(context))
    if torch.Tag.pointwise in function.tags and torch.Tag.nondeterministic_seeded not in function.tags:
        return context.wrap(elementwise(context))
    raise OutOfScope(f"{context.name} is not known over residues")


def part(value: Any, i: int) -> Any:
    """The real (0) or imaginary (1) part of a complex Value as a real one; anything else as it is."""
    if not isinstance(value, Value) or not value.dtype.is_complex:
        return value
    label = torch.float64 if value.dtype == torch.complex128 else torch.float32
    return Value(field.each(lambda t: t[..., i], value.planes), label, value.key)


def join(parts: Sequence[Value]) -> Value:
    """The complex Value of a real and an imaginary part."""
    real, imaginary = field.unify([value.planes for value in parts])
    field.refuse_inf(real, "a complex -inf")
    q = None if real.q is None or imaginary.q is None else torch.stack((real.q, imaginary.q), -1)
    label = torch.complex128 if parts[0].dtype == torch.float64 else torch.complex64
    return Value(Planes(torch.stack((real.p, imaginary.p), -1), q), label, parts[0].key)


_MOVES = """
    view _unsafe_view _reshape_alias reshape permute transpose t unsqueeze squeeze expand slice select
    diagonal unfold cat stack split split_with_sizes unbind clone alias detach lift_fresh _to_copy flip roll
    repeat index_select gather index index_copy index_put scatter take_along_dim embedding slice_scatter
    select_scatter masked_select tril triu constant_pad_nd diag_embed
"""
MOVEMENT = frozenset(f"aten::{name}" for name in _MOVES.split())
"""Ops whose every output element is an input element, or zero."""
_ZERO_FILLED = frozenset(f"aten::{name}" for name in ("tril", "triu", "constant_pad_nd", "diag_embed"))
_NOT_SHAPES = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")


def move(context: Context) -> Any:
    """Run a data movement op on every plane; real float tensors among the arguments become constants."""
    if context.name == "aten::index_put" and (context.kwargs.get("accumulate") or True in context.args[3:]):
        raise OutOfScope("index_put that accumulates")
    leaves, tree = tree_flatten((context.args, context.kwargs))
    joins = context.name in ("aten::cat", "aten::stack")
    where = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Value) or _is_real(leaf) or (joins and isinstance(leaf, Tensor))
    ]
    parts = field.unify([as_planes(leaves[i]) for i in where])
    if str(context.function) == "aten.view.dtype" or _writes_a_number(context):
        raise OutOfScope(f"{context.function} of {context.args[1:]}")

    def run(choose: Callable[[Planes], Tensor | None]) -> Any:
        chosen = [choose(part) for part in parts]
        if any(plane is None for plane in chosen):
            return None
        filled = list(leaves)
        for i, plane in zip(where, chosen, strict=True):
            filled[i] = plane
        args, kwargs = tree_unflatten(filled, tree)
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_SHAPES}
        if context.name in ("aten::_to_copy", "aten::clone"):
            return args[0]
        return _LOOSE.get(context.name, context.function)(*args, **kwargs)

    p, q, inf = run(lambda x: x.p), run(lambda x: x.q), run(lambda x: x.inf)
    e = None if context.name in _ZERO_FILLED else run(lambda x: x.e)
    if isinstance(p, Tensor):
        return Planes(p, q, e, inf)
    empty: list[None] = [None] * len(p)
    return [Planes(*part) for part in zip(p, q or empty, e or empty, inf or empty, strict=True)]


_LOOSE: dict[str, Handler] = {
    # A view of residues may be a copy: their memory layout is not that of the tensor they stand for.
    "aten::view": torch.reshape,
    "aten::_unsafe_view": torch.reshape,
    "aten::_reshape_alias": lambda x, size, stride: torch.reshape(x, size),
}


def _writes_a_number(context: Context) -> bool:
    """True if the op puts a Python number other than zero among the elements."""
    names = [spec.name for spec in context.function._schema.arguments]
    given = {**dict(zip(names, context.args, strict=False)), **context.kwargs}
    value = given.get("value", 0)
    return isinstance(value, int | float) and value != 0


def _is_real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, Value) and leaf.is_floating_point()


def elementwise(context: Context) -> Planes:
    """An elementwise op without a handler: an arbitrary function, named by op and constant arguments."""
    numbers: list[Planes] = []

    def split(leaf: object) -> object:
        if isinstance(leaf, Value) or _is_real(leaf):
            numbers.append(as_planes(leaf))
            return "x"
        if isinstance(leaf, Tensor):
            raise OutOfScope(f"{context.name} of integers and values together")
        return leaf

    constants = tree_map(split, (context.args, sorted(context.kwargs.items())))
    return field.arbitrary(f"{context.name}{constants}", numbers, context.key)
