"""How a Hugging Face model is given a cache: as `cache` from transformers 5.24 on, else `past_key_values`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_NAMES = ("cache", "past_key_values")


def cache_name(module: nn.Module) -> str:
    """What `module.forward` calls its cache."""
    new, old = _NAMES
    return new if new in inspect.signature(module.forward).parameters else old


def cache_arguments(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword arguments with which `module` reads and writes `cache`."""
    return {cache_name(module): cache, "use_cache": True}


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call; None where there is none."""
    return next((kwargs[name] for name in _NAMES if name in kwargs), None)
