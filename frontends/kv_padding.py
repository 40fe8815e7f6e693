"""Where the padding of each sequence ends, from the mask that a model is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import OptionError


def first_tokens(padding: Tensor, prefix: Sequence[int] = ()) -> Tensor | None:
    """int64 [B], where the padding of each sequence ends; None without padding.

    padding: bool or integer [B, S], nonzero for tokens. prefix: of each sequence, the tokens that the cache
    began with; padding stands behind the longest. OptionError for a mask that is more than such padding.
    """
    if bool(padding.all()):
        return None
    begin, padding = max(prefix, default=0), padding.bool()
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
