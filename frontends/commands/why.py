"""`tilewright why RULE NODE`: the first failing constraint, expected and found, and the nearest miss."""

from __future__ import annotations

import argparse

from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import add_model, add_pipeline, compile_options, load, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rule", metavar="RULE", help="a pass, such as match-attention")
    parser.add_argument("node", metavar="NODE", help="a node name, or a module path such as model.layers.3")
    add_model(parser)
    add_pipeline(parser)


def run(args: argparse.Namespace) -> Result:
    from tilewright.compiler import registry
    from tilewright.frontends.api import explain
    from tilewright.frontends.report_why import why

    registry.find(args.rule)
    options = compile_options(args)
    model = load(args)
    call_args, call_kwargs = model.example(args.call, length=args.length)
    with step("capturing and rewriting"):
        report = explain(model.module, call_args, kwargs=call_kwargs, name=model.name, **options)
    text = why(report, args.rule, args.node)
    return Result({"rule": args.rule, "node": args.node, "text": text}, text.splitlines())
