"""`tilewright.kv_cache`: a cache for Hugging Face models whose decode costs what it holds, not its capacity.

The cache stores keys and values in pages and computes the attention over them. The model is set to the
attention named "tilewright", which does so for this cache and is the stock "sdpa" for every other; the masks
of the two are one deferred object, so that a [B, 1, T, S] mask is only built where the stock one needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.ops.paged import PAGE_SIZES
from tilewright.frontends import kv_compiled
from tilewright.frontends.kv_layer import NOT_HANDED, PagedLayer, check_inference
from tilewright.frontends.kv_offload import Placement
from tilewright.frontends.kv_padding import first_tokens
from tilewright.frontends.kv_policies import layers_for
from tilewright.frontends.kv_shadow import check_rotation
from tilewright.frontends.kv_spec_cache import SpecTier

NAME = "tilewright"
"""Of the attention and its mask in the registries of transformers."""
UNSUPPORTED = ("softcap", "sliding_window", "position_bias", "s_aux")
"""Arguments of an attention that the paged ops have no place for."""


class DeferredMask:
    """What a mask is made of. The paged attention needs the padding alone."""

    def __init__(self, build: Callable[[], Tensor | None], padding: Tensor | None, plain: bool) -> None:
        """padding: bool [B, S], True for tokens. plain: nothing but causality and padding is masked."""
        self.build, self._padding, self._plain = build, padding, plain
        self._first: Tensor | None = None
        self._known = False

    def first(self, prefix: Sequence[int] = ()) -> Tensor | None:
        """int64 [B], where the padding of each sequence ends; None without padding.

        prefix: of each sequence, the tokens that the cache began with; padding stands behind the longest.
        OptionError for a mask that is more than such padding.
        """
        if not self._known:
            padding = self._only_padding()
            self._first, self._known = None if padding is None else first_tokens(padding, prefix), True
        return self._first

    def first_in_graph(self, handle: Tensor) -> Tensor | None:
        """As `first`, of the cache that has the layer of `handle`; 0 everywhere where there is no padding."""
        if not self._known:
            padding = self._only_padding()
            found = None if padding is None else kv_compiled.first_of_mask(handle, padding)
            self._first, self._known = found, True
        return self._first

    def _only_padding(self) -> Tensor | None:
        if not self._plain:
            raise OptionError("the paged cache masks padding and later tokens only; this model asks for more")
        return self._padding


def _mask(*, attention_mask: Tensor | None = None, **how: Any) -> DeferredMask:
    """What transformers calls for a mask."""
    plain = how.get("mask_function", causal_mask_function) is causal_mask_function
    return DeferredMask(partial(sdpa_mask, attention_mask=attention_mask, **how), attention_mask, plain)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: query [B, H, T, D] -> ([B, T, H, E], None)."""
    layer: Any = getattr(key, "tilewright_layer", None)
    cache: Any = getattr(key, "tilewright_cache", None)
    if layer is None and cache is None:
        mask = attention_mask.build() if isinstance(attention_mask, DeferredMask) else attention_mask
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **how)
        return out, None
    refused = [name for name in UNSUPPORTED if how.get(name) is not None]
    if refused or dropout:
        raise OptionError(f"the paged cache has no {' or '.join(refused) or 'dropout'}")
    if attention_mask is not None and not isinstance(attention_mask, DeferredMask):
        raise OptionError(
            "the paged cache takes a 2-D attention_mask [B, S]; this one was built by someone else"
        )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if cache is not None:
        handle = cache.taken()
        first = None if attention_mask is None else attention_mask.first_in_graph(handle)
        return kv_compiled.attend(handle, query, key, value, first, scale), None
    first = None if attention_mask is None else attention_mask.first(layer.prefix)
    return layer.attend(query, key, value, first, scale).transpose(1, 2).contiguous(), None


class PagedCache(Cache):  # type: ignore[misc]
    """Made by `kv_cache`. Of one model and one batch at a time; `reset` makes room for the next.

    Works in a compiled model, too: one op a layer, see `kv_compiled`. As a context manager, or by `close`, it
    gives its pages back and the model its former attention.
    """

    is_compileable = False
    """For generate(), which would compile of its own accord; a model that was compiled before is fine."""

    def __init__(
        self,
        model: Any,
        layers: list[PagedLayer],
        before: str,
        placement: Placement | SpecTier | None,
        check: Callable[[], None],
    ) -> None:
        """check: raises where the model would not call our attention."""
        super().__init__(layers=layers)
        self._model, self._before, self.placement = model, before, placement
        self.handles = [kv_compiled.handle_of(layer) for layer in layers]
        """What stands for the layers in a compiled graph, int64 [] each."""
        self._check = check
        self._waiting: int | None = None
        self.on_reset: Callable[[], None] | None = None
        """Called once when the cache forgets what it began with."""

    @property
    def is_sliding(self) -> list[bool]:
        """No layer is; a compiled graph does not look at the layers, so that it serves every policy."""
        return [False] * len(self.handles)

    @property
    def is_linear(self) -> list[bool]:
        """As `is_sliding`."""
        return [False] * len(self.handles)

    @property
    def is_dummy(self) -> list[bool]:
        """As `is_sliding`."""
        return [False] * len(self.handles)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *how: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new rows of a layer; in a compiled graph its attention does so.

        Returns the rows, the keys marked as ours."""
        if not torch.compiler.is_compiling():
            found: tuple[Tensor, Tensor] = self.layers[layer_idx].update(
                key_states, value_states, *how, **more
            )
            return found
        self._check()
        check_inference(key_states)
        if self._waiting is not None:
            raise OptionError(NOT_HANDED.format(self._waiting), remedy="this model needs another cache")
        self._waiting = layer_idx
        new = key_states.view_as(key_states)
        new.tilewright_cache = self  # type: ignore[attr-defined]
        return new, value_states

    def taken(self) -> Tensor:
        """What stands in a compiled graph for the layer whose rows its attention now stores."""
        assert self._waiting is not None, "set with the mark on the keys"
        handle, self._waiting = self.handles[self._waiting], None
        return handle

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, padding included: a number, in a compiled graph an int64 tensor []."""
        if torch.compiler.is_compiling():
            return kv_compiled.length(self.handles[layer_idx])
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[Any, int]:
        """(tokens after the next call, 0)."""
        return self.get_seq_length(layer_idx) + query_length, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the pages or extents that are held, over all layers and tiers."""
        if self.placement is not None:
            return sum(layer.held_bytes for layer in self.placement.layers)
        views = [layer.view for layer in self.layers if layer.is_initialized]
        return sum(view.pool.used * view.pool.page_bytes for view in views)

    def statistics(self) -> dict[str, Any]:
        """Of `offload-kv` and `spec-cache-kv`: the slow tier, bytes resident (in the fast one) and held (in
        both), what moved; else {}."""
        return {} if self.placement is None else self.placement.statistics()

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        super().reset()
        self._waiting = None
        if self.on_reset is not None:
            self.on_reset()
            self.on_reset = None
        if self.placement is not None:
            self.placement.close()

    def close(self) -> None:
        """Give back all pages, and the model its former attention."""
        self.reset()
        self._model.set_attn_implementation(self._before)

    def __enter__(self) -> PagedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kv_cache(model: Any, pipeline: Any = "", page: int | None = None) -> PagedCache:
    """An empty paged cache for `model`: `model.generate(..., past_key_values=cache)`.

    model: a causal language model of transformers. pipeline: at most one pass that decides what is kept or
    attended, such as `quest-kv{budget=1024}` or `quantize-kv{bits=4}` (rows are kept as codes), and
    `offload-kv{fast_bytes=64MiB}` for a cache of which only so much is in memory (alone or with
    `lessismore-kv`); empty: everything, in memory. page: tokens of a page;
    None for that of the pass, else 16.
    Left-padded batches, beams and taking tokens back work; `offload-kv` refuses to reorder beams. Of
    `spec-cache-kv` rows come back from host memory a step ahead, and `custom_generate=` has to be
    `tilewright.frontends.kv_spec_generate.generate_with_guesses`. OptionError where the model has layers
    other than full attention.
    """
    if page is not None and page not in PAGE_SIZES:
        raise OptionError(f"page = {page}: expected one of {', '.join(map(str, PAGE_SIZES))}")
    config = model.config.get_text_config(decoder=True)
    kinds, _ = get_layer_types_and_kwargs(config)
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        raise OptionError(f"{type(model).__name__} has {', '.join(others)} layers; the paged cache has none")

    def check() -> None:
        if config._attn_implementation != NAME:
            raise OptionError(
                f"the model's attention is {config._attn_implementation!r}, which cannot read this cache",
                remedy=f"model.set_attn_implementation({NAME!r})",
            )

    layers, placement = layers_for(pipeline, len(kinds), page, check)
    check_rotation(layers, config)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    before = config._attn_implementation
    model.set_attn_implementation(NAME)
    return PagedCache(model, layers, "sdpa" if before == NAME else before, placement, check)
