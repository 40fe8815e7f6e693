"""transformers' own `generate()` over an exported package: prefill, then steps that write into buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from tilewright.compiler.diagnostics import LoadError, OptionError
from tilewright.frontends.cache_argument import cache_in
from tilewright.frontends.export.artifact import checked_manifest
from tilewright.frontends.export.description import read_description
from tilewright.frontends.export.package import opened_entries
from tilewright.frontends.hugging_face import reading, tokenizer_in
from tilewright.frontends.model_files import show

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_language_model(folder: str | Path) -> PackagedModel:
    """The language model of a package that was exported with a capacity, ready for `generate()`.

    folder: what `tilewright export MODEL --format pt2 --capacity TOKENS` wrote. Every file is checked against
    the manifest first; nothing is compiled or unpickled, and no code or weights but the package's are loaded.
    `tokenizer` of the result is the model's, or None where it had none. LoadError for a folder that is not as
    the export left it, holds no such package, or has no config.json.
    """
    folder = Path(folder)
    manifest = checked_manifest(folder)
    rows = {row["name"]: row for row in manifest.get("entries", ())}
    if manifest.get("kind") != "pt2" or not rows.get("decode", {}).get("written") or "prefill" not in rows:
        raise LoadError(
            "has no prefill and decode steps over buffers",
            where=str(folder),
            remedy="export a language model with --format pt2 --capacity TOKENS",
        )
    config, defaults = read_description(folder, manifest["files"])
    with reading(folder):
        tokenizer = tokenizer_in(folder)
    most = _longest_prefill(rows["prefill"], folder)
    given = {row["name"]: row for row in rows["decode"]["inputs"]}
    buffers = [given[name] for name in rows["decode"]["written"]]
    prefill, step = opened_entries(folder, manifest, [rows[name] for name in ("prefill", "decode")])
    dtype = _DTYPES[buffers[0]["dtype"]]
    model = PackagedModel(
        config, _Programs(prefill, step, [row["shape"] for row in buffers], dtype, most), tokenizer
    )
    model.generation_config = defaults
    return model


def _longest_prefill(row: dict[str, Any], folder: Path) -> int | None:
    """How many tokens prefill takes at once, at least 2; None: no bound. LoadError where it is one number."""
    (tokens,) = (given["shape"][1] for given in row["inputs"] if given["name"] == "input_ids")
    if not isinstance(tokens, str):
        raise LoadError(
            f"its prefill takes {show(tokens)} tokens and no other number",
            where=str(folder),
            remedy="export without --static",
        )
    bounds = row["dynamic"].get(tokens, (2, None))
    return None if bounds[1] is None else int(bounds[1])


@dataclass(frozen=True)
class _Programs:
    """The two entry points, and the buffers that a step writes into."""

    prefill: Callable[..., tuple[Tensor, ...]]
    step: Callable[..., tuple[Tensor, ...]]
    shapes: list[list[int]]
    """[1, Hkv, C, D] of keys and values of each layer in turn."""
    dtype: torch.dtype
    most: int | None
    """Tokens that prefill takes at once; None: no bound."""

    @property
    def capacity(self) -> int:
        """Tokens whose keys and values a request may hold."""
        return self.shapes[0][2]


@dataclass
class _Filled:
    """How many tokens the buffers of a request hold."""

    tokens: int = 0


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers may ask of one layer of a `PackageCache`."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, keys: Tensor, values: Tensor, filled: _Filled) -> None:
        super().__init__()
        self.keys, self.values, self._filled = keys, values, filled
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are there."""

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        raise OptionError("the cache of a package is written by its steps alone")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return self._filled.tokens

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class PackageCache(Cache):  # type: ignore[misc]
    """The buffers of one request, key and value [1, Hkv, C, D] of each layer, and how far they are filled.

    `generate()` makes one for each request; one that it returned may be given to the next call, which goes on
    behind it.
    """

    def __init__(self, shapes: list[list[int]], dtype: torch.dtype) -> None:
        self.shapes, self.filled = shapes, _Filled()
        self.buffers = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        pairs = zip(self.buffers[0::2], self.buffers[1::2], strict=True)
        super().__init__(layers=[_Layer(key, value, self.filled) for key, value in pairs])

    def reset(self) -> None:
        """Begin again: what the buffers hold is no longer read."""
        self.filled.tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise OptionError("the cache of a package holds one text: no beam search")


class PackagedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model as two compiled programs: `generate()` is that of transformers, greedy or sampling.

    One text at a time, of at most `capacity` tokens, prompt included. Several requests may take turns: each
    has a cache of its own.
    """

    main_input_name = "input_ids"

    def __init__(self, config: Any, programs: _Programs, tokenizer: Any | None) -> None:
        super().__init__(config)
        self._programs, self.tokenizer = programs, tokenizer
        self._vocabulary = int(config.get_text_config().vocab_size)

    @property
    def capacity(self) -> int:
        """Tokens whose keys and values a request may hold."""
        return self._programs.capacity

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self._programs.dtype

    def new_cache(self) -> PackageCache:
        """An empty cache for one request."""
        return PackageCache(self._programs.shapes, self._programs.dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **given: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last token, [1, 1, V] (of all where the export says so), behind what the cache holds.

        input_ids: int64 [1, S]. attention_mask: ones [1, T], if any. `cache` (of `new_cache`): S rows are
        written into it; a fresh one by default, which comes with the result. OptionError before anything is
        written for other sizes, tokens that the vocabulary has not, masks that hide a token, arguments that
        the package does not follow, and texts that exceed the capacity.
        """
        cache = self._cache_of(given)
        held = cache.filled.tokens
        count = self._checked_count(input_ids, attention_mask, given, held)
        if count > 1 and not held:
            positions = torch.arange(count)[None]
            logits, *rows = self._programs.prefill(input_ids.to(torch.int64).contiguous(), positions)
            for buffer, row in zip(cache.buffers, rows, strict=True):
                buffer[:, :, :count] = row
        else:
            for at in range(count):
                token, position = input_ids[:, at : at + 1].to(torch.int64), torch.tensor([[held + at]])
                (logits,) = self._programs.step(token.contiguous(), position, *cache.buffers)
        cache.filled.tokens = held + count
        return CausalLMOutputWithPast(logits=logits, **({} if use_cache is False else {_CACHE: cache}))

    def _cache_of(self, given: dict[str, Any]) -> PackageCache:
        """The cache among the arguments of a call, taken out of them, or a fresh one."""
        found = cache_in(given)
        given.pop(_CACHE, None)
        if found is None:
            return self.new_cache()
        if not isinstance(found, PackageCache) or found.shapes != self._programs.shapes:
            raise OptionError(
                f"cache = {type(found).__name__}: its buffers are not those of this package",
                remedy="leave it out, or give one that new_cache() or generate() of this model made",
            )
        return found

    def _checked_count(
        self, input_ids: Tensor, attention_mask: Tensor | None, given: dict[str, Any], held: int
    ) -> int:
        """The number of new tokens; OptionError for a call that the programs cannot answer rightly."""
        for name, value in given.items():
            if value is not None and value is not False and (name, value) != ("return_dict", True):
                raise OptionError(f"{name} is given, which the package does not follow")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise OptionError(f"input_ids is {input_ids.dtype}: expected int64")
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
            raise OptionError(
                f"input_ids has the shape {tuple(input_ids.shape)}: the package takes one text, [1, S]",
                remedy="num_beams and num_return_sequences are 1",
            )
        total = held + input_ids.shape[1]
        self._check_room(total)
        most = self._programs.most
        if not held and most is not None and total > most:
            raise OptionError(f"a prompt of {total} tokens: the package's prefill takes at most {most}")
        first, last = (int(n) for n in input_ids.aminmax())
        if first < 0 or last >= self._vocabulary:
            wrong = first if first < 0 else last
            raise OptionError(f"input_ids holds the token {wrong}: expected 0 to {self._vocabulary - 1}")
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            hidden = int((attention_mask != 1).sum())
            raise OptionError(
                f"attention_mask hides {hidden} of {attention_mask.shape[-1]} tokens",
                remedy="the package attends to all: give one text without padding",
            )
        return int(input_ids.shape[1])

    def _check_room(self, tokens: int) -> None:
        """OptionError when the buffers have fewer rows than so many tokens take."""
        if tokens > self.capacity:
            raise OptionError(
                f"the cache has to hold {tokens} tokens: the package has buffers of {self.capacity}",
                remedy="export with a larger --capacity, or ask for fewer new tokens",
            )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """The buffers of a request; whether its text fits is known here, before anything is computed."""
        self._check_room(generation_config.max_length - 1)  # the last token is not written
        if generation_config.use_cache is not False and cache_in(model_kwargs) is None:
            model_kwargs[_CACHE] = self.new_cache()

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, *args: Any) -> None:
        if generation_mode not in _MODES:
            raise OptionError(
                f"generate() by {generation_mode.value}: a package decodes greedily or by sampling",
                remedy="num_beams and penalty_alpha are left out, and there is no assistant",
            )
