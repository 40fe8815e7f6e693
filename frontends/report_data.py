"""What the HTML page shows, as compact JSON data: texts once in a table, rows as lists that point into it."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tilewright.compiler.report import NodeCost, PassReport, Report
from tilewright.frontends.report_diff import graph_diff
from tilewright.frontends.report_source import source_lines
from tilewright.frontends.report_text import alike

_DIFF_ROWS = 6000
"""Rows of graph differences in all, shared by the passes."""
_SOURCE_TEXT = 2**19
"""Characters of source lines in all."""
_KERNEL_TEXT = 2**17
"""Characters of one generated source."""
_KERNEL_TEXTS = 2**20
"""Characters of generated source in all."""


class _Texts:
    """A table of distinct texts."""

    def __init__(self) -> None:
        self.table: list[str] = []
        self._index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._index:
            self._index[text] = len(self.table)
            self.table.append(text)
        return self._index[text]


def page_data(report: Report) -> dict[str, Any]:
    """The report as the page's script reads it; numbers that JSON cannot hold become null."""
    texts = _Texts()
    nodes = _nodes(report, texts)
    passes = [_pass(p, texts) for p in report.passes]
    _add_diffs(report, passes)
    data: dict[str, Any] = _finite(
        {
            "model": report.model,
            "pipeline": report.pipeline,
            "origin": report.origin,
            "training": report.training,
            "target": report.target,
            "left_alone": report.left_alone,
            "device": report.device,
            "sizes": report.sizes,
            "totals": [asdict(report.totals_before), asdict(report.totals_after)],
            "costed": bool(report.costs_before or report.costs_after),
            "passes": passes,
            "nodes": nodes,
            "kernels": _kernels(report, texts),
            "facts": report.facts,
            "breaks": [[texts(b.get("source", "")), b.get("reason", "")] for b in report.graph_breaks],
            "errors": report.errors,
            "seconds": report.seconds,
            "versions": report.versions,
            "sources": _sources(report, texts),
            "texts": texts.table,
        }
    )
    return data


def _finite(value: Any) -> Any:
    """The same data with infinities and NaN as their names, which JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _nodes(report: Report, texts: _Texts) -> list[list[Any]]:
    """Every node before and after, once, in the final order with removed nodes where they were.

    Row: [name, op, module, source, before, after, pass that removed it, pass that inserted it]; see `_side`.
    """
    before = {c.node: c for c in report.costs_before}
    after = {c.node: c for c in report.costs_after}
    order = _merged(list(before), list(after))
    index = {name: i for i, name in enumerate(order)}
    removed, inserted = _touched(report)
    rows = []
    for name in order:
        old, new = before.get(name), after.get(name)
        shown = new or old
        assert shown is not None
        rows.append(
            [
                name,
                texts(shown.op),
                texts(shown.module),
                texts(shown.source),
                _side(old, index, texts),
                _side(new, index, texts),
                removed.get(name, -1),
                inserted.get(name, -1),
            ]
        )
    return rows


def _side(cost: NodeCost | None, index: dict[str, int], texts: _Texts) -> list[Any] | int:
    """[op, flops, read, written, launches, us, where, flops number, bytes number, note, inputs] or 0."""
    if cost is None:
        return 0
    return [
        texts(cost.op),
        texts(cost.flops),
        texts(cost.bytes_read),
        texts(cost.bytes_written),
        cost.launches,
        _short(cost.roofline_us),
        texts(cost.where),
        cost.flops_value,
        cost.bytes_value,
        texts(cost.note),
        [index[name] for name in cost.inputs if name in index],
    ]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _merged(before: list[str], after: list[str]) -> list[str]:
    """The names of `after` in order, and each name that is only in `before` behind its old neighbour."""
    kept = set(after)
    behind: dict[str, list[str]] = {}
    neighbour = ""
    for name in before:
        if name in kept:
            neighbour = name
        else:
            behind.setdefault(neighbour, []).append(name)
    order = behind.get("", [])[:]
    for name in after:
        order.append(name)
        if name:
            order += behind.get(name, [])
    return order


def _touched(report: Report) -> tuple[dict[str, int], dict[str, int]]:
    """Index of the last pass that removed, and that inserted, each node."""
    removed: dict[str, int] = {}
    inserted: dict[str, int] = {}
    for i, p in enumerate(report.passes):
        for a in p.applied:
            removed.update(dict.fromkeys(a.removed, i))
            inserted.update(dict.fromkeys(a.inserted, i))
    return removed, inserted


def _pass(p: PassReport, texts: _Texts) -> dict[str, Any]:
    applied = [
        [
            texts(a.rule),
            a.node,
            a.inserted,
            a.removed,
            texts(a.source),
            texts(a.module),
            a.replay_error,
            texts(a.replay_note),
        ]
        for a in p.applied
    ]
    refused = [
        [
            texts(r.rule),
            r.node,
            texts(r.reason),
            r.blame,
            r.depth,
            texts(r.source),
            texts(r.module),
            texts(alike(r.reason)),
        ]
        for r in p.refused
    ]
    plain = ("name", "text", "stage", "exactness", "paper", "notes", "skipped", "seconds")
    return {
        **{name: getattr(p, name) for name in plain},
        "nodes": [p.nodes_before, p.nodes_after],
        "applied": applied,
        "refused": refused,
        "diff": None,
    }


def _add_diffs(report: Report, passes: list[dict[str, Any]]) -> None:
    """Graph difference of each pass that kept its graphs, within the common budget."""
    left = _DIFF_ROWS
    for p, row in zip(report.passes, passes, strict=True):
        if not p.graph_before or not p.graph_after:
            continue
        if p.graph_before == p.graph_after:
            row["diff"] = {"rows": [], "counts": [0, 0, 0], "left_out": 0}
            continue
        diff = graph_diff(p.graph_before, p.graph_after, limit=min(1500, left))
        left -= len(diff.rows)
        counts = [diff.removed, diff.inserted, diff.rewired]
        row["diff"] = {"rows": diff.rows, "counts": counts, "left_out": diff.left_out}


def _kernels(report: Report, texts: _Texts) -> dict[str, Any]:
    """Rows [node, op, what runs it, why no kernel, file, text index or -1] and the distinct texts."""
    sources = _Texts()
    rows = []
    used = 0
    for k in report.kernels:
        text = (k.get("text") or _generated(k.get("source", "")))[:_KERNEL_TEXT]
        known = text in sources.table
        if not known and used + len(text) > _KERNEL_TEXTS:
            text = ""
        used += 0 if known else len(text)
        fields = [texts(k.get(name, "")) for name in ("op", "kernel", "why", "source")]
        rows.append([k.get("node", ""), *fields, sources(text) if text else -1])
    return {"rows": rows, "sources": sources.table}


def _generated(file: str) -> str:
    """Text of a generated source file; empty when it is no regular C++ or Python file that can be read."""
    path = Path(file)
    if path.suffix not in (".cpp", ".h", ".py", ".cu", ".hip") or not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        # The kernel table names the file all the same; the page says that its text is not in the report.
        return ""


def _sources(report: Report, texts: _Texts) -> dict[str, Any]:
    """First line number and lines around each source place, rewrites first, within the budget."""
    places = [a.source for p in report.passes for a in p.applied]
    places += [r.source for p in report.passes for r in p.refused]
    places += [b.get("source", "") for b in report.graph_breaks]
    places += [c.source for c in (*report.costs_after, *report.costs_before)]
    found: dict[str, Any] = {}
    used = 0
    for place in dict.fromkeys(p for p in places if p):
        lines = source_lines(place)
        used += sum(len(text) for _, text in lines)
        if used > _SOURCE_TEXT:
            break
        if lines:
            found[str(texts(place))] = [lines[0][0], [text for _, text in lines]]
    return found
