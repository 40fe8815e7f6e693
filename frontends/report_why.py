"""Why a pass did or did not apply at a node, told from a report."""

from __future__ import annotations

from tilewright.compiler.diagnostics import OptionError, nearest
from tilewright.compiler.report import Application, NodeCost, PassReport, Refused, Report
from tilewright.frontends.report_source import source_lines
from tilewright.frontends.report_text import clean, group_refusals


def why(report: Report, rule: str, node: str) -> str:
    """The story of one pass (or one rule of it) at one node, as text.

    `rule` is a pass name, a rule name, or `pass/rule`; `node` is a node name before or after the rewrites, or
    a module path. OptionError with the nearest name when the report holds neither.
    """
    passes = [p for p in report.passes if _wanted(p, rule)]
    if not passes:
        known = {p.name for p in report.passes} | {
            e.rule for p in report.passes for e in _entries(p) if e.rule
        }
        raise OptionError(f"rule {rule!r} is not in this report", remedy=nearest(rule, known))
    if not _is_known(report, node):
        raise OptionError(f"node {node!r} is not in this report", remedy=nearest(node, _names(report)))
    return "\n\n".join(_story(report, p, rule, node) for p in passes)


def _entries(p: PassReport) -> list[Application | Refused]:
    return [*p.applied, *p.refused]


def _wanted(p: PassReport, rule: str) -> bool:
    return rule == p.name or any(_is_rule(p, e, rule) for e in _entries(p))


def _is_rule(p: PassReport, entry: Application | Refused, rule: str) -> bool:
    return rule == p.name or (bool(entry.rule) and rule in (entry.rule, f"{p.name}/{entry.rule}"))


def _names(report: Report) -> set[str]:
    names = {c.node for c in (*report.costs_before, *report.costs_after)}
    for p in report.passes:
        for entry in _entries(p):
            names.add(entry.node)
            names.update(entry.removed + entry.inserted if isinstance(entry, Application) else [entry.blame])
    return names - {""}


def _is_known(report: Report, node: str) -> bool:
    if node in _names(report):
        return True
    modules = [c.module for c in (*report.costs_before, *report.costs_after)]
    modules += [e.module for p in report.passes for e in _entries(p)]
    return any(_inside(module, node) for module in modules)


def _inside(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def _touches(entry: Application | Refused, node: str) -> bool:
    if entry.node == node or _inside(entry.module, node):
        return True
    if isinstance(entry, Application):
        return node in entry.removed or node in entry.inserted
    return entry.blame == node


def _story(report: Report, p: PassReport, rule: str, node: str) -> str:
    lines = [f"{p.text} ({p.stage.lower()}, {p.exactness}) at {node}"]
    if p.skipped:
        lines.append(f"  the pass was skipped: {p.skipped}")
    applied = [a for a in p.applied if _is_rule(p, a, rule) and _touches(a, node)]
    refused = [r for r in p.refused if _is_rule(p, r, rule) and _touches(r, node)]
    for application in applied:
        lines += _applied(p, application)
    for refusal in sorted(refused, key=lambda r: -r.depth):
        lines += _refused(report, p, refusal)
    if not applied and not refused and not p.skipped:
        lines += _not_looked_at(report, p, node)
    if not applied:
        lines += _nearest_miss(p, node)
    return "\n".join(clean(line) for line in lines)


def _applied(p: PassReport, a: Application) -> list[str]:
    lines = [f"  applied at {a.node}{_place(a)}" + (f", rule {a.rule}" if a.rule else "")]
    lines.append(f"    removed: {', '.join(a.removed) or 'nothing'}")
    lines.append(f"    inserted: {', '.join(a.inserted) or 'nothing'}")
    if a.replay_error is not None:
        lines.append(f"    replayed on random inputs: {a.replay_error:.3g} relative RMS difference")
    else:
        lines.append(f"    not replayed{f': {a.replay_note}' if a.replay_note else ''}")
    return lines


def _refused(report: Report, p: PassReport, r: Refused) -> list[str]:
    lines = [f"  {p.name} did not apply at {r.node}{_place(r)}: {r.reason}"]
    if r.rule and r.rule != p.name:
        lines.append(f"    rule: {r.rule}")
    lines += _text_of(r.source)
    lines.append(f"    pattern calls that matched before this: {r.depth}")
    if r.blame and r.blame != r.node:
        found = _cost_of(report, r.blame)
        what = f", {found.op}" if found is not None else ""
        source = f" ({found.source})" if found is not None and found.source else ""
        lines.append(f"    the reason is about: {r.blame}{what}{source}")
    return lines


def _not_looked_at(report: Report, p: PassReport, node: str) -> list[str]:
    found = _cost_of(report, node)
    if found is None:
        return [f"  {p.name} applied to or refused nothing there: none of its patterns starts to match"]
    return [
        f"  {p.name} neither applied nor refused there: {node} is {found.op}, and no pattern of the pass gets"
        f" far enough from it to count as a near miss{f' ({found.source})' if found.source else ''}",
        *_text_of(found.source),
    ]


def _nearest_miss(p: PassReport, node: str) -> list[str]:
    others = [r for r in p.refused if not _touches(r, node)]
    if not others:
        return []
    best = group_refusals(others)[0].nearest
    return [f"  nearest miss elsewhere: {best.node}{_place(best)}, {best.depth} matched: {best.reason}"]


def _place(entry: Application | Refused) -> str:
    parts = [part for part in (entry.source, entry.module) if part]
    return f" ({', '.join(parts)})" if parts else ""


def _text_of(source: str) -> list[str]:
    """The user's line itself, when its file can be read."""
    return [f"    > {text.strip()}" for line, text in source_lines(source, around=0) if text.strip()]


def _cost_of(report: Report, node: str) -> NodeCost | None:
    return next((c for c in (*report.costs_before, *report.costs_after) if c.node == node), None)
