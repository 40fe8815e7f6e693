"""Environment variables: the one place that reads `TILEWRIGHT_*`, typed, with unknown names refused.

A new variable is one row of `VARIABLES` and one field of `Settings` with the same lower-case name.
Free of torch, so that the command line can check the environment before anything slow is imported.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "TILEWRIGHT_"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class SettingsError(ValueError):
    """An environment variable is unknown or has no legal value; `str()` is one line with the remedy."""

    def __init__(self, message: str, *, remedy: str) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message} ({remedy})")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; `None` or empty where a variable is unset."""

    cache: Path | None = None
    """Folder of the artifact store in place of the per-user cache folder; absolute."""
    dump: Path | None = None
    """Folder that receives the graph before and after each pass."""
    fuel: int | None = None
    """Greatest number of rewrites that may be applied in one pipeline run; further matches are refused."""
    why: tuple[str, ...] = ()
    """Names of passes whose refusals are logged one by one."""


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its legal values in words, what it does, and its parser."""

    name: str
    allowed: str
    meaning: str
    parse: Callable[[str], Any]
    """Text to value; raises ValueError (whose text is not shown) for an illegal one."""


def _folder(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError
    return Path(text).expanduser().absolute()


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(_NAME.fullmatch(name) for name in names):
        raise ValueError
    return names


VARIABLES: tuple[Variable, ...] = (
    Variable("TILEWRIGHT_CACHE", "a folder path", "where the artifact store lies", _folder),
    Variable("TILEWRIGHT_DUMP", "a folder path", "write the graph before and after each pass there", _folder),
    Variable("TILEWRIGHT_FUEL", "a whole number below 10**9", "stop after this many rewrites", _count),
    Variable("TILEWRIGHT_WHY", "pass names separated by commas", "log each refusal of these passes", _names),
)


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Parse every `TILEWRIGHT_*` variable of `environ` (default: this process's environment).

    Raises SettingsError for an unknown name (with the nearest known one) and for an illegal value (with the
    variable, what is allowed and what it got). An empty value is illegal: unset the variable instead.
    """
    source = os.environ if environ is None else environ
    known = {variable.name: variable for variable in VARIABLES}
    values: dict[str, Any] = {}
    for name in sorted(source):
        if not name.startswith(PREFIX):
            continue
        if name not in known:
            raise SettingsError(f"unknown environment variable {name[:80]!r}", remedy=_nearest(name, known))
        variable = known[name]
        try:
            values[name.removeprefix(PREFIX).lower()] = variable.parse(source[name])
        except ValueError:
            raise SettingsError(
                f"environment variable {name} is {source[name][:80]!r}",
                remedy=f"it must be {variable.allowed}; unset it for the default",
            ) from None
    return Settings(**values)


def _nearest(name: str, known: Mapping[str, Variable]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known variables: {', '.join(sorted(known))}"
