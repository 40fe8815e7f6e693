"""What a loader gives: the module, its tokenizer and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewright.compiler.diagnostics import OptionError, nearest

if TYPE_CHECKING:
    from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""(positional, keyword) arguments of one call of a module."""
Examples = dict[str, Callable[[int | None], Call]]
"""Kind of call -> builder of its arguments for a length (None: the kind's default)."""

_LENGTH_CAP = 1 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be captured: float32 unless its factory says otherwise, in eval mode, on the CPU."""

    name: str
    """What the user wrote, shortened to the last part of a path."""
    kind: str
    """`causal-lm`, `dit` or `module`."""
    module: nn.Module
    tokenizer: Any | None
    examples: Examples
    """The first kind is the default."""

    def example(self, kind: str | None = None, *, length: int | None = None) -> Call:
        """Seeded arguments of one call, batch 1.

        `kind`: for causal-lm `prefill` (default) or `decode` (one token after a real prefill of `length`
        tokens into a static cache); for dit `denoise`; for other modules `call`.
        `length`: tokens (causal-lm) or latent frames (dit); None for the kind's default.
        Raises OptionError for a kind this model has not or an illegal length.
        """
        chosen = next(iter(self.examples)) if kind is None else kind
        if chosen not in self.examples:
            message = f"model {self.name} has no example call {chosen!r}"
            raise OptionError(message, remedy=nearest(chosen, self.examples))
        if length is not None and (type(length) is not int or not 1 <= length <= _LENGTH_CAP):
            raise OptionError(
                f"example length is {length!r}", remedy=f"a whole number from 1 to {_LENGTH_CAP}"
            )
        return self.examples[chosen](length)
