"""Difference of two printed graphs, blind to node numbers: inserting one node leaves later lines alone."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from difflib import SequenceMatcher

_NUMBER = re.compile(r"%(\d+)")
_EXACT_UP_TO = 600
"""Lines without an anchor up to which every line is compared with every other one."""


@dataclass
class GraphDiff:
    """Rows to show: (kind, text). Kinds: ` ` kept, `-` removed, `+` inserted, `~` kept but reads another
    value, `@` a number of unchanged lines left out."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    removed: int = 0
    inserted: int = 0
    rewired: int = 0
    left_out: int = 0
    """Changed lines beyond the limit."""


def graph_diff(before: str, after: str, context: int = 2, limit: int = 1500) -> GraphDiff:
    """Compare two graphs printed one node a line with `%number` names.

    `context` unchanged lines are kept around a change; `limit` caps the rows.
    """
    old, new = before.split("\n"), after.split("\n")
    pairs = _pairs([_NUMBER.sub("%", x) for x in old], [_NUMBER.sub("%", x) for x in new])
    rows = _rows(old, new, pairs)
    kinds = [kind for kind, _ in rows]
    diff = GraphDiff(removed=kinds.count("-"), inserted=kinds.count("+"), rewired=kinds.count("~"))
    diff.rows = _with_context(rows, context)
    if len(diff.rows) > limit:
        diff.left_out = sum(kind in "-+~" for kind, _ in diff.rows[limit:])
        diff.rows = diff.rows[:limit]
    return diff


def _pairs(old: list[str], new: list[str]) -> list[tuple[int, int]]:
    """Lines that correspond, in order: lines that occur once in both first, then what lies between them."""
    pairs: list[tuple[int, int]] = []
    i = j = 0
    for at_old, at_new in [*_anchors(old, new), (len(old), len(new))]:
        pairs += _between(old, new, (i, at_old), (j, at_new))
        if at_old < len(old):
            pairs.append((at_old, at_new))
        i, j = at_old + 1, at_new + 1
    return pairs


def _anchors(old: list[str], new: list[str]) -> list[tuple[int, int]]:
    """Longest increasing run of lines that occur exactly once on both sides (patience difference)."""
    once_old, once_new = _once(old), _once(new)
    candidates = sorted((once_old[text], once_new[text]) for text in once_old.keys() & once_new.keys())
    ends: list[int] = []
    at: list[int] = []
    back: list[int] = []
    for index, (_, position) in enumerate(candidates):
        place = bisect_left(ends, position)
        back.append(at[place - 1] if place else -1)
        ends[place : place + 1] = [position]
        at[place : place + 1] = [index]
    found: list[tuple[int, int]] = []
    index = at[-1] if at else -1
    while index >= 0:
        found.append(candidates[index])
        index = back[index]
    return found[::-1]


def _once(lines: list[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    repeated: set[str] = set()
    for i, text in enumerate(lines):
        if text in places:
            repeated.add(text)
        places[text] = i
    return {text: i for text, i in places.items() if text not in repeated}


def _between(
    old: list[str], new: list[str], left: tuple[int, int], right: tuple[int, int]
) -> list[tuple[int, int]]:
    """Pairs inside one gap: common ends first, then difflib, which drops frequent lines in a large gap."""
    (i, end_i), (j, end_j) = left, right
    head: list[tuple[int, int]] = []
    while i < end_i and j < end_j and old[i] == new[j]:
        head.append((i, j))
        i, j = i + 1, j + 1
    tail: list[tuple[int, int]] = []
    while i < end_i and j < end_j and old[end_i - 1] == new[end_j - 1]:
        end_i, end_j = end_i - 1, end_j - 1
        tail.append((end_i, end_j))
    large = max(end_i - i, end_j - j) > _EXACT_UP_TO
    matcher = SequenceMatcher(None, old[i:end_i], new[j:end_j], autojunk=large)
    middle = [(i + b.a + k, j + b.b + k) for b in matcher.get_matching_blocks() for k in range(b.size)]
    return head + middle + tail[::-1]


def _rows(old: list[str], new: list[str], pairs: list[tuple[int, int]]) -> list[tuple[str, str]]:
    """Every line with its kind; a kept line whose operands are not the same nodes is `~`."""
    rows: list[tuple[str, str]] = []
    renamed: dict[str, str] = {}
    i = j = 0
    for at_old, at_new in [*pairs, (len(old), len(new))]:
        rows += [("-", text) for text in old[i:at_old]]
        rows += [("+", text) for text in new[j:at_new]]
        i, j = at_old + 1, at_new + 1
        if at_old == len(old):
            break
        was, now = _NUMBER.findall(old[at_old]), _NUMBER.findall(new[at_new])
        defines = old[at_old].startswith("%")
        if defines:
            renamed[was[0]] = now[0]
        first = 1 if defines else 0
        same = [renamed.get(name) for name in was[first:]] == now[first:]
        rows.append((" " if same else "~", new[at_new]))
    return rows


def _with_context(rows: list[tuple[str, str]], context: int) -> list[tuple[str, str]]:
    """Changed rows with their neighbours; runs of unchanged rows become one `@` row with their number."""
    near = [False] * len(rows)
    for i, (kind, _) in enumerate(rows):
        if kind != " ":
            for k in range(max(0, i - context), min(len(rows), i + context + 1)):
                near[k] = True
    shown: list[tuple[str, str]] = []
    skipped = 0
    for keep, row in zip(near, rows, strict=True):
        if keep and skipped:
            shown.append(("@", str(skipped)))
            skipped = 0
        if keep:
            shown.append(row)
        else:
            skipped += 1
    if skipped and shown:
        shown.append(("@", str(skipped)))
    return shown
