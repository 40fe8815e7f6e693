"""The paged ops for eager callers: the generated kernel where one fits the arguments, else the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilewright.compiler.ops import all_ops
from tilewright.kernels.table import KernelChoice, full_args, host_target, select_for_node
from tilewright.runtime.contracts import Refusal

_DECIDE = {
    "paged_attention": (0, 1, 2),
    "token_attention": (0, 1, 2),
    "paged_append": (0, 1, 4, 5, 6, 7),
    "page_bounds": (0, 1, 2),
    "attention_mass": (0, 1),
    "top_pages": (),
    "pick_pages": (0, 1, 2),
    "merge_parts": (0, 1),
    "packed_attention": (0, 1, 2),
    "packed_append": (0, 1, 4, 5),
    "rotate_rows": (0, 2),
}
"""By op, the tensors whose dtype and head size decide on a kernel."""
_POOL = {
    "paged_attention": 1,
    "token_attention": 1,
    "paged_append": 0,
    "packed_attention": 1,
    "packed_append": 0,
    "rotate_rows": 0,
}
"""By op, the argument whose third axis is the size of a page."""
_FOUND: dict[tuple[Any, ...], tuple[Callable[..., Any], str]] = {}


def callable_for(op: str, args: Sequence[Any]) -> Callable[..., Any]:
    """The fastest callable for a paged op: it takes the op's own positional arguments, as many as `args`.

    It holds for every call that differs from `args` in batch, heads, lengths and the contents of tensors
    only: keep it across the steps of a decode. Builds the kernel on first use. `reason_for` tells why the
    definition was chosen. BuildError where the compiler refuses.
    """
    return _lookup(op, args)[0]


def reason_for(op: str, args: Sequence[Any]) -> str:
    """Why `callable_for` gives the definition for these arguments; empty where it gives a kernel."""
    return _lookup(op, args)[1]


def _lookup(op: str, args: Sequence[Any]) -> tuple[Callable[..., Any], str]:
    decide = _DECIDE[op]
    key = [op, args[_POOL[op]].shape[2] if op in _POOL else 0]
    for i, value in enumerate(args):
        if not isinstance(value, torch.Tensor):
            key.append(value)
        elif i in decide:
            key.append((value.dtype, value.is_cpu, value.shape[-1], value.stride(-1)))
        else:
            key.append(torch.Tensor)
    found = _FOUND.get(tuple(key))
    if found is None:
        found = _FOUND[tuple(key)] = _choose(op, args)
    return found


def _choose(op: str, args: Sequence[Any]) -> tuple[Callable[..., Any], str]:
    full = full_args(op, args)
    choice = select_for_node(op, full, host_target(), training=False)
    if isinstance(choice, Refusal):
        return all_ops()[op].definition, choice.reason
    return _through(choice, full), ""


class _Place:
    """Stands for one tensor argument."""

    def __init__(self, index: int) -> None:
        self.index = index


def _through(choice: KernelChoice, full: Sequence[Any]) -> Callable[..., Any]:
    """The kernel op behind the semantic op's signature: where its arguments come from is worked out once."""
    probe = [_Place(i) if isinstance(value, torch.Tensor) else value for i, value in enumerate(full)]
    given, _ = choice.rewrite_args(probe)
    plan = [(x.index, None) if isinstance(x, _Place) else (-1, x) for x in given]
    kernel = choice.op

    def call(*args: Any) -> Any:
        return kernel(*[args[i] if i >= 0 else constant for i, constant in plan])

    return call
