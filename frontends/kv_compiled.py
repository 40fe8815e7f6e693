"""A compiled model's way to the paged cache: one op a layer stores the new rows and attends.

The graph holds a number for each layer, a tensor of no axes, and nothing that grows with the context:
lengths, pages and whatever a policy decides are found while the op runs. One graph therefore serves every
step, policy and cache of a model. The op says that it writes to the number, which keeps what a graph does to
a layer in order.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.ops.registry import NAMESPACE
from tilewright.frontends.kv_padding import first_tokens

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()


def handle_of(layer: Any) -> Tensor:
    """int64 []: the number by which compiled graphs find `layer` as long as it lives."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number)


def _layer(handle: Tensor) -> Any:
    layer = _LAYERS.get(int(handle))
    if layer is None:
        raise OptionError(f"a compiled graph asks for layer {int(handle)} of a cache that is gone")
    return layer


def _attend(handle: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
    """Store k, v [B, Hkv, T, D or E], then the attention [B, T, H, E] of q [B, H, T, D].

    first: int64 [B] of `kv_cache_first`; None or 0 everywhere: no padding."""
    layer = _layer(handle)
    layer.update(k, v)
    padded = first if first is not None and bool(first.any()) else None
    out: Tensor = layer.attend(q, k, v, padded, scale).transpose(1, 2).contiguous()
    return out


def _first(handle: Tensor, padding: Tensor) -> Tensor:
    """int64 [B]: where the padding of a mask [B, S] ends; 0 everywhere where there is none."""
    first = first_tokens(padding, _layer(handle).prefix)
    return padding.new_zeros(len(padding), dtype=torch.int64) if first is None else first


def _length(handle: Tensor) -> Tensor:
    """int64 []: tokens that the layer has seen."""
    return torch.tensor(_layer(handle).get_seq_length())


def _define(schema: str, run: Any, fake: Any) -> torch._ops.OpOverload:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


attend = _define(
    "kv_cache_attend(Tensor(a!) handle, Tensor q, Tensor k, Tensor v, Tensor? first, float scale) -> Tensor",
    _attend,
    lambda handle, q, k, v, first, scale: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]),
)
first_of_mask = _define(
    "kv_cache_first(Tensor handle, Tensor padding) -> Tensor",
    _first,
    lambda handle, padding: padding.new_empty(padding.shape[0], dtype=torch.int64),
)
length = _define("kv_cache_length(Tensor handle) -> Tensor", _length, lambda handle: torch.empty_like(handle))
