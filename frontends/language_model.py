"""A causal language model as `speculate` sees it: the module, what runs single steps, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cache_argument import cache_name
from tilewright.frontends.compile import CompileOptions
from tilewright.frontends.kv_rows import KVRows, RowModel
from tilewright.frontends.watched import Watched

SHAPES = 64
"""Programs that one pipeline may have. Each number of rows, length of a draft and capacity takes one; past
torch's own limit of 8, for target and draft together, steps would run eagerly."""


@dataclass(frozen=True)
class LanguageModel:
    """A Hugging Face causal language model and its compiled form, if any."""

    module: nn.Module
    step: Callable[..., Any]
    compiled: bool

    @classmethod
    def of(cls, model: Any, pipeline: Any) -> LanguageModel:
        """From a module, `torch.compile` of one or itself; `pipeline` compiles it for fixed shapes."""
        if isinstance(model, LanguageModel) and pipeline is None:
            return model
        module = getattr(model, "_orig_mod", model)
        config = getattr(module, "config", None)
        if (
            not isinstance(module, nn.Module)
            or config is None
            or not callable(getattr(module, "generate", None))
        ):
            raise OptionError(
                f"{type(module).__name__} is no Hugging Face causal language model",
                remedy="give a model with `config` and `generate`, or torch.compile of one",
            )
        if getattr(config, "is_encoder_decoder", False):
            raise OptionError(
                f"{type(module).__name__} is an encoder-decoder: expected a causal language model"
            )
        if pipeline is not None:
            options = {"pipeline": pipeline}
            CompileOptions.parse(options)  # a misspelt pass is an error here, not at the first step
            return cls(module, Watched(module, options, SHAPES), True)
        inner = getattr(module.forward, "_torchdynamo_orig_callable", None)
        return cls(module, cast(Callable[..., Any], model), model is not module or inner is not None)

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def stop_tokens(self) -> list[int]:
        """Tokens that end a text."""
        ends = getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)
        return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [int(ends)]

    def is_module(self, module: nn.Module) -> bool:
        """Whether this is that model, compiled or not."""
        return getattr(module, "_orig_mod", module) is self.module

    def shares(self, target: LanguageModel) -> bool:
        """Whether both have the same weights, so that one may read what the other wrote into the cache."""
        return self.module is target.module

    def rows(self, kv: KVRows) -> RowModel:
        """The model over a cache."""
        whole = getattr(self.module.forward, "_torchdynamo_orig_callable", self.module)
        device = next(self.module.parameters()).device
        return RowModel(cast(Callable[..., Any], whole), self.step, kv, device, cache_name(self.module))

    def look(self) -> None:
        """To be called before calls that nobody changes the model between."""
        if isinstance(self.step, Watched):
            self.step.look()

    def check_room(self, tokens: int) -> None:
        """OptionError when the model has no positions for so many tokens."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise OptionError(f"{tokens} tokens, prompt included: the model has {limit} positions")


def check_same_vocabulary(target: LanguageModel, draft: LanguageModel) -> None:
    """OptionError when token numbers cannot mean the same."""
    sizes = [int(m.config.get_text_config().vocab_size) for m in (target, draft)]
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"the draft has a vocabulary of {sizes[1]} tokens, the target of {sizes[0]}",
            remedy="draft with a model of the same tokenizer, with a pipeline of the target, or by retrieval",
        )
