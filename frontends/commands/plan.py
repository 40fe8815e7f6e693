"""`tilewright plan`: a format for each linear layer under a budget, as a TOML file for `quantize-plan`."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import add_model, load, step

DEFAULT = ("int8.0.symmetric.none.blocks8", "int4.32.float-zero.none.blocks8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--statistics", metavar="FILE", required=True, help="what `tilewright calibrate --hessian` wrote"
    )
    parser.add_argument(
        "--pipeline", default="", metavar="P", help="passes that come before, as they did for the statistics"
    )
    parser.add_argument(
        "--format",
        action="append",
        metavar="F",
        help="a format that layers may get beside their own (packed as blocks8 for a CPU, as rows for a GPU "
        f"and small floats); may repeat (default {', '.join(DEFAULT)})",
    )
    parser.add_argument("--max-error", type=float, metavar="E", help="largest mean share of output energy")
    parser.add_argument(
        "--margin",
        type=float,
        metavar="S",
        help="share of --max-error that is kept for data unlike the samples (default 0.1)",
    )
    parser.add_argument(
        "--max-share", type=float, metavar="S", help="largest size of the layers over their present size"
    )
    parser.add_argument("--out", metavar="FILE", help="the TOML file to write (default: only show the plan)")


def run(args: argparse.Namespace) -> Result:
    from tilewright.compiler.calibration import Statistics
    from tilewright.compiler.float_format import parse_format
    from tilewright.compiler.pipeline import Pipeline
    from tilewright.compiler.precision_plan import MARGIN, choose, plan_of
    from tilewright.frontends.calibration import layer_choices

    _check(args)
    formats = args.format or list(DEFAULT)
    for text in formats:
        parse_format(text)
    Pipeline.parse(args.pipeline or [])
    statistics = Statistics.load(Path(args.statistics))
    model = load(args)
    with step(f"measuring {len(formats)} formats"):
        call = model.example(args.call, length=args.length or (16 if model.tokenizer else None))
        layers = layer_choices(model.module, call, statistics, formats, pipeline=args.pipeline)
    before = sum(layer.choices[0].bytes for layer in layers)
    if args.max_error is None:
        budget = f"max_share {args.max_share:g}"
        decisions = choose(layers, max_bytes=int(args.max_share * before))
    else:
        margin = MARGIN if args.margin is None else args.margin
        budget = f"max_error {args.max_error:g} with a margin of {margin:g}"
        decisions = choose(layers, max_error=(1.0 - margin) * args.max_error)
    after, error = sum(d.choice.bytes for d in decisions), sum(d.choice.error for d in decisions)
    plan = plan_of(decisions, fingerprint=statistics.fingerprint, budget=budget)
    if args.out is not None:
        plan.save(Path(args.out))
    rows = [{"layer": d.path, "format": d.choice.format, "reason": d.reason} for d in decisions]
    data = {
        "model": model.name,
        "file": args.out,
        "budget": budget,
        "bytes": {"before": before, "after": after},
        "mean_error": error / len(decisions),
        "layers": rows,
    }
    share = f"{after / before:.3f} of {before / 1e6:.1f} MB, mean error {error / len(decisions):.3g}"
    lines = [f"{len(rows)} layers within {budget}: {share}" + (f": {args.out}" if args.out else "")]
    lines += [f"  {count:>4} {name}" for name, count in Counter(d.choice.format for d in decisions).items()]
    if args.out is None:
        lines += [f"  {row['layer']}: {row['format']} ({row['reason']})" for row in rows]
    return Result(data, lines)


def _check(args: argparse.Namespace) -> None:
    """What can be said before a model is loaded."""
    if (args.max_error is None) == (args.max_share is None):
        raise OptionError("give either --max-error or --max-share")
    if args.max_share is not None and not 0.0 < args.max_share <= 1.0:
        raise OptionError(f"--max-share = {args.max_share:g}: expected more than 0, at most 1")
    if args.max_error is not None and not args.max_error >= 0.0:
        raise OptionError(f"--max-error = {args.max_error:g}: expected 0 or more")
    if args.margin is not None and (args.max_error is None or not 0.0 <= args.margin < 1.0):
        raise OptionError(f"--margin = {args.margin:g}: expected 0 or more, below 1, and --max-error")
    if args.out is not None and not Path(args.out).parent.is_dir():
        raise OptionError(f"--out = {args.out}: there is no folder {Path(args.out).parent}")
