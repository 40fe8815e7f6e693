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
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.frontends.kv_offload import Placement
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
            self._first, self._known = self._find_first(prefix), True
        return self._first

    def _find_first(self, prefix: Sequence[int]) -> Tensor | None:
        if not self._plain:
            raise OptionError("the paged cache masks padding and later tokens only; this model asks for more")
        if self._padding is None or bool(self._padding.all()):
            return None
        begin, padding = max(prefix, default=0), self._padding.bool()
        new = padding[:, begin:]
        # A chunk of a prompt may be padding alone.
        first = torch.where(new.any(1), new.to(torch.int8).argmax(1), new.shape[1]) + begin
        at = torch.arange(padding.shape[1], device=first.device)
        want = at >= first[:, None]
        if prefix:
            want = want | (at < torch.tensor(prefix, device=first.device)[:, None])
            if len(prefix) != len(padding) or not torch.equal(padding, want):
                raise OptionError(
                    f"attention_mask is not 1 for the {list(prefix)} tokens that the cache began with, "
                    "then 0s up to the first token after them",
                    remedy="pass the attention_mask that came with the cache",
                )
        elif not torch.equal(padding, want):
            raise OptionError(
                "attention_mask is not 0s followed by 1s in every row",
                remedy="pad on the left: tokenizer.padding_side = 'left'",
            )
        return first


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
    layer = getattr(key, "tilewright_layer", None)
    if layer is None:
        mask = attention_mask.build() if isinstance(attention_mask, DeferredMask) else attention_mask
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **how)
        return out, None
    refused = [name for name in UNSUPPORTED if how.get(name) is not None]
    if refused or dropout:
        raise OptionError(f"layer {layer.index}: the paged cache has no {' or '.join(refused) or 'dropout'}")
    if attention_mask is not None and not isinstance(attention_mask, DeferredMask):
        raise OptionError(
            "the paged cache takes a 2-D attention_mask [B, S]; this one was built by someone else"
        )
    first = None if attention_mask is None else attention_mask.first(layer.prefix)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return layer.attend(query, key, value, first, scale).transpose(1, 2).contiguous(), None


class PagedCache(Cache):  # type: ignore[misc]
    """Made by `kv_cache`. Of one model and one batch at a time; `reset` makes room for the next.

    As a context manager, or by `close`, it gives its pages back and the model its former attention.
    """

    def __init__(
        self, model: Any, layers: list[PagedLayer], before: str, placement: Placement | SpecTier | None
    ) -> None:
        super().__init__(layers=layers)
        self._model, self._before, self.placement = model, before, placement
        self.on_reset: Callable[[], None] | None = None
        """Called once when the cache forgets what it began with."""

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
    return PagedCache(model, layers, "sdpa" if before == NAME else before, placement)
