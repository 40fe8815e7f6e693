"""The terminal view of a report: tables on a terminal, plain lines in a pipe."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tilewright.compiler.report import NodeCost, PassReport, Report
from tilewright.frontends.report_text import (
    change,
    clean,
    duration,
    group_refusals,
    number,
    short_source,
)

_RIGHT = {
    "applied",
    "refused",
    "nodes",
    "seconds",
    "count",
    "flops",
    "bytes",
    "us",
    "before",
    "after",
    "change",
}
_REFUSALS_SHOWN = 5


@dataclass
class Section:
    """One table: a title, column names and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""
    """One line under the table."""


def sections(report: Report, top: int = 10) -> Iterator[Section]:
    """The tables of a report, in reading order; empty ones are left out."""
    for section in (
        _summary(report),
        _passes(report),
        _refusals(report),
        _kernels(report),
        _nodes(report, top),
        _errors(report),
        _facts(report),
        _breaks(report),
        _seconds(report),
    ):
        if section.rows:
            yield section


def show(report: Report, console: Console, top: int = 10) -> None:
    """Write the report to a console: tables when it is a terminal, plain lines otherwise.

    `top` is how many kinds of node the list of the most expensive ones has.
    """
    heading = _heading(report)
    if not console.is_terminal:
        for line in plain_lines(report, top):
            console.print(Text(line), soft_wrap=True)
        return
    console.print(Text(heading, style="bold"))
    for line in _left_alone(report):
        console.print(Text(line))
    for section in sections(report, top):
        table = Table(title=Text(section.title, style="bold"), title_justify="left", expand=False)
        for name in section.columns:
            table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        if section.note:
            table.caption, table.caption_justify = Text(clean(section.note)), "left"
        console.print()
        console.print(table)


def lines_for(report: Report, stream: TextIO, top: int = 10) -> list[str]:
    """The lines that `show` writes to such a stream: tables on a terminal, plain lines elsewhere."""
    if not stream.isatty():
        return plain_lines(report, top)
    width = Console(file=stream).width
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with console.capture() as capture:
        show(report, console, top)
    return capture.get().rstrip("\n").split("\n")


def plain_lines(report: Report, top: int = 10) -> list[str]:
    """The report as lines: a title, then `column=value` rows under it; made for grep and for logs."""
    lines = [_heading(report), *_left_alone(report)]
    for section in sections(report, top):
        lines.append("")
        lines.append(f"{section.title}:")
        for row in section.rows:
            cells = (f"{n}={clean(c)}" for n, c in zip(section.columns, row, strict=True) if c)
            lines.append("  " + "  ".join(cells))
        if section.note:
            lines.append(f"  note: {clean(section.note)}")
    return lines


def _heading(report: Report) -> str:
    parts = [report.model or "model", f"captured by {report.origin}" if report.origin else "", report.target]
    parts.append("training" if report.training else "")
    text = " | ".join(clean(p) for p in parts if p)
    return f"{text} | pipeline: {clean(report.pipeline) or '(empty)'}"


def _left_alone(report: Report) -> list[str]:
    """One line when the graph was handed on unchanged."""
    return [f"left as it was: {clean(report.left_alone)}"] if report.left_alone else []


def _summary(report: Report) -> Section:
    before, after = report.totals_before, report.totals_after
    section = Section("What it saved", ("what", "before", "after", "change"))
    if not report.costs_before and not report.costs_after:
        return section
    rows = (
        ("arithmetic", before.flops, after.flops, "flop"),
        ("memory traffic", before.bytes, after.bytes, "B"),
        ("launches", before.launches, after.launches, ""),
    )
    for what, old, new, unit in rows:
        section.rows.append((what, number(old, unit), number(new, unit), change(old, new)))
    device = f" on {report.device}" if report.device else ""
    old_ms, new_ms = before.roofline_ms, after.roofline_ms
    texts = (duration(old_ms / 1e3), duration(new_ms / 1e3), change(old_ms, new_ms))
    section.rows.append((f"roofline time{device}", *texts))
    notes = [
        "before is the normal form",
        "each node reads its inputs once and writes its result once; fusion by Inductor is not counted",
    ]
    if report.sizes:
        notes.append("numbers at " + ", ".join(f"{k} = {v}" for k, v in sorted(report.sizes.items())))
    if after.unknown:
        notes.append(f"{after.unknown} nodes without a known size are left out")
    section.note = "; ".join(notes)
    return section


def _passes(report: Report) -> Section:
    section = Section(
        "Passes", ("pass", "stage", "exactness", "applied", "refused", "nodes", "seconds", "remark")
    )
    for p in report.passes:
        nodes = f"{p.nodes_before} -> {p.nodes_after}"
        remark = "; ".join([f"skipped: {p.skipped}"] if p.skipped else p.notes)
        counts = (str(len(p.applied)), str(len(p.refused)))
        section.rows.append(
            (p.text, p.stage.lower(), p.exactness, *counts, nodes, duration(p.seconds), remark)
        )
    total = sum(p.seconds for p in report.passes)
    section.note = f"{sum(len(p.applied) for p in report.passes)} rewrites in {duration(total)}"
    return section


def _refusals(report: Report) -> Section:
    section = Section("Refused, nearest miss first", ("pass", "count", "reason", "nearest miss", "source"))
    for p in report.passes:
        section.rows.extend(_refusal_rows(p))
    if section.rows:
        section.note = "tilewright why PASS NODE tells the whole story of one node"
    return section


def _refusal_rows(p: PassReport) -> Iterator[tuple[str, ...]]:
    groups = group_refusals(p.refused)
    for group in groups[:_REFUSALS_SHOWN]:
        rule = f"{p.name}/{group.rule}" if group.rule and group.rule != p.name else p.name
        near = group.nearest
        where = f"{near.node} (matched {near.depth})" if near.depth else near.node
        yield rule, str(group.count), group.reason, where, short_source(near.source)
    rest = groups[_REFUSALS_SHOWN:]
    if rest:
        total = sum(g.count for g in rest)
        yield (
            p.name,
            str(total),
            f"{len(rest)} more reasons; all of them are in the JSON and HTML views",
            "",
            "",
        )


def _kernels(report: Report) -> Section:
    section = Section("What runs where", ("op", "runs on", "count", "no generated kernel because"))
    entries = [(k.get("op", ""), k.get("kernel", ""), k.get("why", "")) for k in report.kernels]
    for (op, kernel, reason), count in Counter(entries).most_common():
        section.rows.append((op, kernel, str(count), reason))
    counts: Counter[str] = Counter()
    for c in report.costs_after:
        counts[c.where] += c.launches
    launches = [(where, count) for where, count in counts.most_common() if where and count]
    notes = []
    if launches:
        notes.append("launches: " + ", ".join(f"{where} {count}" for where, count in launches))
    if report.pieces:
        notes.append(f"{len(report.pieces)} compiled pieces serve {sum(report.pieces)} calls")
    notes += [f"not one function: {clean(reason)}" for reason in report.chains]
    section.note = "; ".join(notes)
    return section


def _nodes(report: Report, top: int) -> Section:
    columns = ("module", "op", "where", "count", "flops", "bytes", "us", "share", "source")
    section = Section("Most expensive, the same module of all layers together", columns)
    groups: dict[tuple[str, str, str], list[NodeCost]] = {}
    for c in report.costs_after:
        if c.launches:
            groups.setdefault((_layer_free(c), c.op, c.where), []).append(c)
    ranked = sorted(groups.items(), key=lambda item: -_sum(c.roofline_us for c in item[1]))
    total = report.totals_after.roofline_ms * 1e3
    for (module, op, where), costs in ranked[:top]:
        us = _sum(c.roofline_us for c in costs)
        flops, moved = _sum(c.flops_value for c in costs), _sum(c.bytes_value for c in costs)
        share = f"{us / total:.1%}" if total else ""
        numbers = (str(len(costs)), number(flops), number(moved, "B"), f"{us:.3g}", share)
        section.rows.append((module, op, where, *numbers, short_source(costs[0].source)))
    if len(ranked) > top:
        section.note = f"{len(ranked) - top} more kinds of node; all nodes are in the JSON and HTML views"
    return section


def _layer_free(cost: NodeCost) -> str:
    """The module path with layer numbers as `*`, or the node's name where there is no path."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", cost.module) or cost.node


def _sum(values: Iterable[float | None]) -> float:
    return sum(v for v in values if v is not None)


def _errors(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [(name, f"{value:.3g}") for name, value in sorted(report.errors.items())]
    return Section("Error against a float64 run", ("what", "value"), rows)


def _facts(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [
        (f.get("name", ""), _cut(f.get("value", "")), f.get("origin", "")) for f in report.facts
    ]
    return Section("Facts", ("fact", "is", "origin"), rows)


def _cut(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _breaks(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [(b.get("source", ""), b.get("reason", "")) for b in report.graph_breaks]
    return Section("Graph breaks", ("source", "reason"), rows)


def _seconds(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [(name, duration(value)) for name, value in report.seconds.items()]
    return Section("Time spent", ("phase", "seconds"), rows)
