"""What of a model is exported: entry points with flat, named tensors; a language model has two of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tilewright.compiler.diagnostics import ExportError, OptionError, nearest
from tilewright.compiler.paging import page_out
from tilewright.frontends.cache_argument import cache_name
from tilewright.frontends.loaded_model import LoadedModel

Axes = dict[str, dict[int, str]]
"""Input name -> axis -> the user's name of a size that may change between calls."""
PREFILL_TOKENS, PAST_TOKENS = 17, 13
"""Example sizes; no other size of a model is likely to equal them."""
LOGITS = ("all", "last")
"""Of which tokens prefill computes them."""


class _Flat(nn.Module):
    """A module called with the tensors of one call, in order; everything else of the call is fixed."""

    def __init__(self, inner: nn.Module, spec: pytree.TreeSpec, leaves: Sequence[Any]) -> None:
        super().__init__()
        self.inner = inner
        self._spec = spec
        self._fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if t else f for t, f in zip(self._is_tensor, self._fixed, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        result = pytree.tree_leaves(_plain(self.inner(*args, **kwargs)))
        return tuple(leaf for leaf in result if isinstance(leaf, Tensor))


class _Decoder(nn.Module):
    """A causal language model whose keys and values come in and go out as tensors.

    (input_ids [B, S], position_ids [B, S], key and value [B, Hkv, P, D] of each layer) -> (logits [B, S, V],
    key and value [B, Hkv, P + S, D] of each layer). Without keys and values the cache is empty. `held`: they
    are buffers of P tokens, filled up to the first of position_ids and going out with S tokens more;
    `in_place`: the S tokens are written into the buffers, and the logits alone go out. `last`: the logits are
    those of the last token, [B, 1, V].
    """

    def __init__(
        self, inner: nn.Module, *, held: bool = False, in_place: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.inner, self._held, self._in_place, self._cache = inner, held, in_place, cache_name(inner)
        self._last = last
        keeps = last and "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._keep = {"logits_to_keep": 1} if keeps else {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        from tilewright.frontends.export.held_cache import held_cache

        input_ids, position_ids, *past = tensors
        cache: Any = DynamicCache()
        if self._held:
            cache = held_cache(past, position_ids[0], in_place=self._in_place)
        else:
            for layer, (key, value) in enumerate(zip(past[0::2], past[1::2], strict=True)):
                cache.update(key, value, layer)
        given = {"input_ids": input_ids, "position_ids": position_ids, self._cache: cache, **self._keep}
        out: Any = self.inner(use_cache=True, **given)
        logits = out.logits[:, -1:] if self._last else out.logits
        if self._in_place:
            return (logits,)
        states = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (logits, *states)


@dataclass
class Entry:
    """One entry point: `module(*tensors)` gives a tuple of tensors."""

    name: str
    module: nn.Module
    tensors: list[Tensor]
    inputs: list[str]
    outputs: list[str]
    axes: Axes = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    """Input -> output that may lie in the same memory: nothing else reads the input."""
    written: list[str] = field(default_factory=list)
    """Inputs that a call writes into."""

    def set_axes(self, axes: Axes) -> None:
        """Take the user's dynamic axes; OptionError for an input or axis that is not there."""
        for name, named in axes.items():
            if name not in self.inputs:
                raise OptionError(f"dynamic axis of {name!r}", remedy=nearest(name, self.inputs))
            rank = self.tensors[self.inputs.index(name)].dim()
            for axis, text in named.items():
                if not 0 <= axis < rank:
                    raise OptionError(f"dynamic axis {axis} of {name}", remedy=f"it has {rank} axes")
                if not re.fullmatch(r"[A-Za-z_]\w{0,63}", text):
                    raise OptionError(f"dynamic axis name {text!r}", remedy="a word of letters and digits")
        self.axes = {**axes}

    def release(self) -> None:
        """Let weights that a file holds leave memory until they are used again."""
        for parameter in self.module.parameters():
            page_out(parameter.data)

    @contextmanager
    def weights_in_turn(self) -> Iterator[None]:
        """Calls of the module inside let each layer's weights go again once it has run."""

        def after(module: nn.Module, *_: Any) -> None:
            for parameter in module.parameters(recurse=False):
                page_out(parameter.data)

        hooks = [m.register_forward_hook(after) for m in self.module.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def resized(self) -> list[Tensor] | None:
        """The tensors with every dynamic axis one shorter; None without such axes or with one too short."""
        if not any(self.axes.values()):
            return None
        found = []
        for name, tensor in zip(self.inputs, self.tensors, strict=True):
            for axis in self.axes.get(name, {}):
                if tensor.shape[axis] < 3:
                    return None
                tensor = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
            found.append(tensor.contiguous())
        return found


def _plain(result: Any) -> Any:
    """Outputs of transformers and diffusers models as dicts: their tensors in order."""
    return dict(result) if isinstance(result, Mapping) else result


def entry_of(
    name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], axes: Axes
) -> Entry:
    """The entry point of one call of a module."""
    call = (tuple(args), dict(kwargs))
    leaves, spec = pytree.tree_flatten(call)
    paths = [path for path, _ in pytree.tree_flatten_with_path(call)[0]]
    names = list(inspect.signature(module.forward).parameters)
    inputs = [
        _input_name(path, names) for path, leaf in zip(paths, leaves, strict=True) if isinstance(leaf, Tensor)
    ]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise ExportError("the example call has no tensor", remedy="give args or kwargs with tensors")
    with torch.no_grad():
        result = _plain(module(*args, **kwargs))
    outputs = [
        _key_text(path, "output")
        for path, leaf in pytree.tree_flatten_with_path(result)[0]
        if isinstance(leaf, Tensor)
    ]
    if not outputs:
        raise ExportError("the model returns no tensor")
    entry = Entry(name, _Flat(module, spec, leaves), tensors, _unique(inputs), _unique(outputs))
    entry.set_axes(axes)
    return entry


def decoder_entries(
    module: nn.Module,
    *,
    dynamic: bool,
    capacity: int | None = None,
    in_place: bool = False,
    last: bool = False,
) -> list[Entry]:
    """`prefill` (dynamic `sequence`) and `decode` (one token, dynamic `past`) of a causal language model.

    capacity: the keys and values of `decode` are buffers of that many tokens, shared by input and output, or
    with `in_place` inputs that it writes into. OptionError for one that the model has no positions for.
    last: prefill gives the logits of its last token alone.
    """
    config: Any = module.config
    generator = torch.Generator().manual_seed(1)
    count = PREFILL_TOKENS + PAST_TOKENS + 1
    tokens = torch.randint(min(3, config.vocab_size - 1), config.vocab_size, (1, count), generator=generator)
    positions = torch.arange(count)[None]
    step, first = _Decoder(module).eval(), PREFILL_TOKENS
    with torch.no_grad():
        past = step(tokens[:, :PAST_TOKENS], positions[:, :PAST_TOKENS])[1:]
    layers = range(len(past) // 2)
    old = [f"past.{i}.{part}" for i in layers for part in ("key", "value")]
    new = ["logits", *[f"present.{i}.{part}" for i in layers for part in ("key", "value")]]
    names = ["input_ids", "position_ids"]
    start = _Decoder(module, last=last).eval()
    prefill = Entry("prefill", start, [tokens[:, :first], positions[:, :first]], names, new)
    at = slice(PAST_TOKENS, PAST_TOKENS + 1)
    if capacity is not None:
        past = _buffers(past, capacity, getattr(config, "max_position_embeddings", None))
    one = step if capacity is None else _Decoder(module, held=True, in_place=in_place).eval()
    decode = Entry("decode", one, [tokens[:, at], positions[:, at], *past], [*names, *old], new)
    if capacity is not None and in_place:
        decode.written, decode.outputs = old, new[:1]
    elif capacity is not None:
        decode.shared = dict(zip(old, new[1:], strict=True))
    if dynamic:
        prefill.set_axes({name: {1: "sequence"} for name in names})
        if capacity is None:
            decode.set_axes({name: {2: "past"} for name in old})
    return [prefill, decode]


def _buffers(past: Sequence[Tensor], capacity: int, most: int | None) -> list[Tensor]:
    """Keys and values [B, Hkv, P, D] at the front of buffers of `capacity` tokens."""
    least = PAST_TOKENS + 1
    if capacity < least or (most is not None and capacity > most):
        end = "" if most is None else f" and at most the model's {most} positions"
        raise OptionError(f"capacity = {capacity}", remedy=f"at least {least}{end}")
    return [nn.functional.pad(t, (0, 0, 0, capacity - t.shape[2])) for t in past]


def entries_of(
    loaded: LoadedModel,
    axes: Axes,
    *,
    static: bool,
    kind: str | None,
    length: int | None,
    capacity: int | None = None,
    in_place: bool = False,
    logits: str | None = None,
) -> list[Entry]:
    """The entry points of a loaded model: the pair of a language model, or one example call.

    logits: of LOGITS; by default `last` for steps that write into buffers, which are for generation.
    """
    if loaded.kind == "causal-lm" and kind is None and not axes:
        last = logits == "last" if logits is not None else in_place and capacity is not None
        return decoder_entries(
            loaded.module, dynamic=not static, capacity=capacity, in_place=in_place, last=last
        )
    for name, value in (("capacity", capacity), ("logits", logits)):
        if value is not None:
            raise OptionError(
                f"{name} = {value} belongs to the prefill and decode of a language model",
                remedy=f"leave out the call and the dynamic axes, or {name}",
            )
    args, kwargs = loaded.example(kind, length=length)
    return [entry_of(kind or next(iter(loaded.examples)), loaded.module, args, kwargs, axes)]


def parse_axes(texts: Sequence[str]) -> Axes:
    """`input_ids.1=sequence` -> {"input_ids": {1: "sequence"}}; OptionError for anything else."""
    found: Axes = {}
    for text in texts:
        match = re.fullmatch(r"(.+)\.(\d+)=(\w+)", text)
        if match is None:
            raise OptionError(f"dynamic axis {text!r}", remedy="write INPUT.AXIS=NAME: input_ids.1=sequence")
        found.setdefault(match[1], {})[int(match[2])] = match[3]
    return found


def _input_name(path: Any, parameters: list[str]) -> str:
    """`(args|kwargs, key, ...)` -> the parameter's name and what leads to the tensor in it."""
    which, first, *rest = path
    key = getattr(first, "idx", None)
    head = first.key if key is None else parameters[key] if key < len(parameters) else f"input{key}"
    assert which.idx in (0, 1), "a call is (args, kwargs)"
    return ".".join([str(head), *[_part(p) for p in rest]])


def _key_text(path: Any, default: str) -> str:
    parts = [_part(p) for p in path]
    if not parts:
        return default
    return ".".join([default, *parts] if parts[0].isdigit() else parts)


def _part(key: Any) -> str:
    found = getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))
    return re.sub(r"[^A-Za-z0-9_]", "_", str(found))


def _unique(names: list[str]) -> list[str]:
    found = list[str]()
    for name in names:
        chosen, number = name, 0
        while chosen in found:
            number += 1
            chosen = f"{name}_{number}"
        found.append(chosen)
    return found
