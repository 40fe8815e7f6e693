"""`tilewright export`: a model, rewritten, as a folder that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import add_model, add_pipeline, compile_options, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.add_argument("--format", default="onnx", help="onnx (default), pt2 or kernels")
    parser.add_argument(
        "--operators",
        default="standard",
        help="onnx: standard (default) or custom: our kernels, in a library beside the model",
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--dynamic",
        action="append",
        default=[],
        metavar="INPUT.AXIS=NAME",
        help="a size that may change between calls; repeatable",
    )
    parser.add_argument("--static", action="store_true", help="a language model with fixed sizes only")
    parser.add_argument(
        "--capacity",
        type=int,
        metavar="TOKENS",
        help="a language model decodes over buffers of so many tokens: input and output at once (onnx), or"
        " inputs that a step writes into (pt2)",
    )
    parser.add_argument(
        "--logits",
        metavar="WHICH",
        help="a language model's prefill computes those of all tokens or of the last (default of pt2 with"
        " --capacity)",
    )


def run(args: argparse.Namespace) -> Result:
    from tilewright.frontends.export.api import check_request, export
    from tilewright.frontends.export.entries import parse_axes

    options = compile_options(args)
    axes = parse_axes(args.dynamic)
    check_request(args.format, Path(args.output), args.operators, args.capacity, args.logits)
    manifest = export(
        args.model,  # loaded there: its weights leave memory while nothing reads them
        path=args.output,
        format=args.format,
        dynamic=axes,
        static=args.static,
        kind=args.call,
        length=args.length,
        operators=args.operators,
        capacity=args.capacity,
        logits=args.logits,
        weights=args.weights,
        progress=step,
        **options,
    )
    size = sum(record["bytes"] for record in manifest["files"].values())
    lines = [f"{args.output}: {args.format}, {len(manifest['files'])} files, {size / 1e6:.1f} MB"]
    for entry in manifest["entries"]:
        figures = "".join(
            f", {name}: {found['program']:.1e} from the program{_rounding(found)}, "
            f"{found['model']:.1e} from the model"
            for name, found in entry.get("parity", {}).items()
            if isinstance(found, dict)
        )
        lines.append(f"{entry['name']}: {entry['exactness']}{figures}")
    return Result(manifest, lines)


def _rounding(found: dict[str, Any]) -> str:
    """How much of the distance from the program its own steps of few bits explain."""
    return f" (which one rounding a layer moves by {found['rounding']:.1e})" if "rounding" in found else ""
