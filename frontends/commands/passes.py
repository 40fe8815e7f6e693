"""`tilewright passes`: what there is, and what each pass promises."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from tilewright.frontends.cli import ANSWER_IS_NO, OK, Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", help="show this pass with its options, or what this preset stands for"
    )
    parser.add_argument(
        "--self-test", action="store_true", help="run the examples of the pass, or of every pass"
    )


def run(args: argparse.Namespace) -> Result:
    from tilewright.compiler import registry
    from tilewright.compiler.pipeline import Pipeline

    presets = registry.presets()
    if args.name in presets:
        passes = Pipeline.parse(args.name).passes
        classes = {p.name: type(p) for p in passes}
    else:
        classes = {args.name: registry.find(args.name)} if args.name else registry.load_all()
    if args.self_test:
        return _self_test(classes)
    if args.name in presets:
        text = presets[args.name]
        return Result({"preset": args.name, "pipeline": text}, [p.text() for p in passes])
    rows = [describe(cls) for cls in classes.values()]
    if args.name:
        return Result(rows[0], _page(rows[0]))
    width = max(len(r["name"]) for r in rows)
    lines = [f"{r['name']:<{width}}  {r['stage']:<10} {r['exactness']:<11} {r['summary']}" for r in rows]
    lines += ["", "presets:", *(f"{name:<{width}}  {text}" for name, text in presets.items())]
    return Result({"passes": rows, "presets": presets}, lines)


def describe(cls: Any) -> dict[str, Any]:
    """A pass as data."""
    doc = inspect.getdoc(cls) or ""
    options = [
        {
            "name": f.name,
            "type": str(f.type),
            "default": "required" if f.default is dataclasses.MISSING else repr(f.default),
        }
        for f in dataclasses.fields(cls)
    ]
    return {
        "name": cls.name,
        "stage": cls.stage.name.lower(),
        "exactness": cls.exactness.value,
        "paper": cls.paper,
        "training": cls.trains,
        "after": list(cls.after),
        "summary": doc.split("\n", 1)[0],
        "doc": doc,
        "options": options,
    }


def _page(row: dict[str, Any]) -> list[str]:
    lines = [f"{row['name']}  ({row['stage']}, {row['exactness']})", *row["doc"].splitlines()]
    if row["paper"]:
        lines.append(f"paper: {row['paper']}")
    lines += [f"option {o['name']}: {o['type']} = {o['default']}" for o in row["options"]]
    return lines


def _self_test(classes: dict[str, Any]) -> Result:
    from tilewright.compiler.diagnostics import TilewrightError
    from tilewright.compiler.selftest import selftest

    rows: list[dict[str, str]] = []
    for name, cls in classes.items():
        try:
            selftest(cls)
            rows.append({"name": name, "result": "ok", "detail": ""})
        except (TilewrightError, AssertionError) as error:
            rows.append({"name": name, "result": "failed", "detail": str(error)})
    failed = any(r["result"] != "ok" for r in rows)
    lines = [f"{r['name']}: {r['result']} {r['detail']}".rstrip() for r in rows]
    return Result(rows, lines, ANSWER_IS_NO if failed else OK)
