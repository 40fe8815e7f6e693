"""Text helpers that every view of a report shares: numbers with units, safe text, refusals in groups."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tilewright.compiler.diagnostics import printable
from tilewright.compiler.report import Refused

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: `1.23 Gflop`; `unknown` for None."""
    if value is None:
        return "unknown"
    step = 0
    while abs(value) >= 999.5 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    digits = f"{value:.0f}" if step == 0 and value == int(value) else f"{value:.3g}"
    return f"{digits} {_PREFIXES[step]}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Seconds as s, ms or us with three significant digits."""
    if seconds is None:
        return "unknown"
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if abs(seconds) * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def change(before: float, after: float) -> str:
    """How much less or more: `-37.5 %`, `+4 %`, `unchanged`; empty when there is nothing to compare with."""
    if before == after:
        return "unchanged"
    if before <= 0 or not math.isfinite(before) or not math.isfinite(after):
        return ""
    return f"{(after / before - 1) * 100:+.3g} %"


def clean(text: object) -> str:
    """One line of text without control, direction or surrogate characters: they are written as escapes.

    Names come from models, so a terminal must not obey what they hold.
    """
    return printable(str(text))


def short_source(source: str) -> str:
    """`file:line` with the last three parts of the path: long enough to find, short enough to read."""
    parts = source.replace("\\", "/").split("/")
    return source if len(parts) <= 3 else "/".join(parts[-3:])


@dataclass(frozen=True)
class RefusalGroup:
    """Refusals of one rule for one reason."""

    rule: str
    reason: str
    nearest: Refused
    """The one where most of the pattern matched."""
    count: int


def alike(reason: str) -> str:
    """A reason without the numbers of the nodes it names, so that one reason at many nodes is one reason."""
    return re.sub(r"\b([A-Za-z]\w*?)_\d+\b", r"\1", reason)


def group_refusals(refused: Iterable[Refused]) -> list[RefusalGroup]:
    """Refusals with the same rule and reason together; nearest misses first, then the most frequent."""
    groups: dict[tuple[str, str], list[Refused]] = {}
    for item in refused:
        groups.setdefault((item.rule, alike(item.reason)), []).append(item)
    found = []
    for (rule, _), items in groups.items():
        nearest = max(items, key=lambda r: r.depth)
        found.append(RefusalGroup(rule, nearest.reason, nearest, len(items)))
    return sorted(found, key=lambda g: (-g.nearest.depth, -g.count))
