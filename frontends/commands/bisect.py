"""`tilewright bisect`: run the model and its rewritten form in float64 and find the rewrite that parts
them."""

from __future__ import annotations

import argparse
import dataclasses

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import ANSWER_IS_NO, Result
from tilewright.frontends.commands.shared import add_model, add_pipeline, compile_options, load, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.add_argument(
        "--tolerance", type=float, default=1e-9, help="relative RMS in float64 (default 1e-9)"
    )


def run(args: argparse.Namespace) -> Result:
    from tilewright.compiler.bisect import bisect
    from tilewright.compiler.pipeline import Pipeline
    from tilewright.frontends.parity_check import captured_program, float64_check

    if not 0 < args.tolerance < 1:
        raise OptionError(f"--tolerance = {args.tolerance}: expected a number between 0 and 1")
    options = compile_options(args)
    model = load(args)
    call_args, call_kwargs = model.example(args.call, length=args.length)
    with step("capturing"):
        program = captured_program(model.module, call_args, call_kwargs)
    with step("searching"):
        accept = float64_check(program, args.tolerance)
        culprit = bisect(program.clone, Pipeline.parse(options["pipeline"]), accept)
    if culprit is None:
        return Result(
            {"culprit": None}, [f"{args.pipeline}: agrees with the model within {args.tolerance:g}"]
        )
    lines = [
        f"{culprit.pass_name} is the first rewrite that differs: rule {culprit.rule or 'rewrite'!r} at "
        f"{culprit.node} ({culprit.source or 'no source line'}), "
        f"rewrite {culprit.application}, {culprit.runs} runs",
        f"failure: {culprit.failure}",
        "before:",
        culprit.before,
        "after:",
        culprit.after,
    ]
    return Result({"culprit": dataclasses.asdict(culprit)}, lines, ANSWER_IS_NO)
