"""`tilewright explain`: what a pipeline does to a model, as tables, JSON or one HTML page."""

from __future__ import annotations

import argparse
import sys

from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import add_model, add_pipeline, compile_options, load, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.add_argument("--html", metavar="FILE", help="also write one self-contained HTML page")
    parser.add_argument("--error", action="store_true", help="also measure the error against a float64 run")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="OP=N",
        help="fail unless N of OP are found; repeatable",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows per table (default 10)")


def run(args: argparse.Namespace) -> Result:
    from tilewright.frontends.api import explain
    from tilewright.frontends.report_html import check_writable, write_html
    from tilewright.frontends.report_terminal import lines_for

    options = compile_options(args)
    if args.html:
        check_writable(args.html)
    model = load(args)
    call_args, call_kwargs = model.example(args.call, length=args.length)
    with step("capturing and rewriting"):
        report = explain(
            model.module, call_args, kwargs=call_kwargs, measure=args.error, name=model.name, **options
        )
    lines = lines_for(report, sys.stdout, top=args.top)
    if args.html:
        lines.append(f"wrote {write_html(report, args.html)}")
    return Result(report.to_dict(), lines)
