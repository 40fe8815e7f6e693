"""A prompt computed in chunks, so that memory and the time between two steps of a batch stay bounded.

The chunk is that of Dynamic SplitFuse, arXiv:2401.08671.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cache_argument import cache_arguments


@torch.no_grad()
def prefill(model: Any, tokens: Tensor, cache: Any, chunk: int) -> None:
    """Store the keys and values of tokens int64 [B, T] behind what `cache` holds, `chunk` tokens at a time.

    The head of the model is not computed. Exact: every token attends to all before it. OptionError for a
    chunk below 1.
    """
    if chunk < 1:
        raise OptionError(f"chunk = {chunk}: expected 1 token or more")
    for part in tokens.split(chunk, dim=1):
        model.base_model(input_ids=part, **cache_arguments(model.base_model, cache))
