"""Errors: one class per kind, each with a code (its name), fields, a message and a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TilewrightError(Exception):
    """Base of every error a user can meet. `str()` is one line: message, then the remedy in parentheses."""

    def __init__(self, message: str, *, remedy: str = "", where: str = "") -> None:
        self.message = message
        self.remedy = remedy
        self.where = where
        super().__init__(self.line())

    @property
    def code(self) -> str:
        """The class name: stable, searchable, printed by the command line."""
        return type(self).__name__

    def line(self) -> str:
        """The whole error as one line of text that a terminal can be given."""
        text = f"{self.where}: {self.message}" if self.where else self.message
        return printable(" ".join((f"{text} ({self.remedy})" if self.remedy else text).split()))


class PassDefinitionError(TilewrightError):
    """A pass file is wrong; raised when the pass is imported, for its author."""


class ProofError(TilewrightError):
    """A pass that claims to be exact is not: names the example, the rule and a counterexample."""


class OptionError(TilewrightError):
    """An option of a pass, of the backend or of the command line has no legal value."""


class PipelineError(TilewrightError):
    """A pipeline cannot be built: unknown pass, wrong order, two owners of one slot."""


class CaptureError(TilewrightError):
    """A model could not be captured as one program."""


class FactError(TilewrightError):
    """A fact that was asked for is absent or contradicts the program."""


class VerifyError(TilewrightError):
    """A program broke a contract: names the rule, the node and the pass that last touched it."""


class ParityError(TilewrightError):
    """Two results that must agree do not."""


class LoweringError(TilewrightError):
    """No kernel fits: lists the candidates and why each was not taken."""


class BuildError(TilewrightError):
    """A compiler (C++, Triton) refused generated source."""


class ExportError(TilewrightError):
    """A program cannot be written in the format asked for, or its files cannot be written."""


class LoadError(TilewrightError):
    """A model or artifact file cannot be read: truncated, foreign, malicious or absent."""


def printable(text: str) -> str:
    """The text with control, direction and surrogate characters written as escapes.

    Names come from models and from command lines: neither may steer a terminal or add a line to a graph.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


SHOWN = 80
"""Characters of a value or name that an error repeats."""


def shown(value: object) -> str:
    """A value as an error shows it: its `repr`, cut in the middle when it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 8]} ... {text[-3:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`-style remedy for a misspelt name, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known names: {shown}" if names else "none are known"
