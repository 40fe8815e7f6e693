"""`tilewright calibrate`: what a model's linear layers read on sample text, or when its answer is sure, saved
for other passes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import Result
from tilewright.frontends.commands.evaluate import read_text
from tilewright.frontends.commands.shared import add_model, load, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the statistics file to write")
    parser.add_argument(
        "--pipeline", default="", metavar="P", help="passes that come before those that use the statistics"
    )
    parser.add_argument("--text", metavar="FILE", help="UTF-8 sample text (default: a bundled page)")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="windows of --length (default 4)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="first token of the text to use")
    parser.add_argument("--hessian", action="store_true", help="also second moments, for GPTQ and plans")
    parser.add_argument(
        "--scratch", metavar="DIR", help="a folder on a disk for what is not worked on (default /var/tmp)"
    )
    parser.add_argument("--means", action="store_true", help="also means, for prune-width-for-decode")
    parser.add_argument(
        "--exits", metavar="N+N", help="train the policy of early-exit for leaving after so many layers"
    )


def run(args: argparse.Namespace) -> Result:
    from tilewright.compiler.paging import SCRATCH
    from tilewright.compiler.pipeline import Pipeline
    from tilewright.frontends.calibration import calibrate

    if not 1 <= args.samples <= 100_000:
        raise OptionError(f"--samples = {args.samples}: expected 1 to 100000")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise OptionError(f"--out = {args.out}: there is no folder {out.parent}")
    Pipeline.parse(args.pipeline or [])
    text = read_text(args.text)
    exits = _exits(args)
    model = load(args)
    calls, source = _calls(model, text, args)
    if exits:
        return _train(model, calls, source, exits, out)
    with step(f"calibrating on {len(calls)} samples"):
        found = calibrate(
            model.module,
            calls,
            pipeline=args.pipeline,
            source=source,
            hessian=args.hessian,
            means=args.means,
            scratch=args.scratch or SCRATCH,
        )
    found.save(out)
    rows: list[dict[str, Any]] = [
        {
            "layer": path,
            "after": layer.basis,
            "tokens": layer.tokens,
            "largest": float(layer.absmax.max()),
            "typical": float(layer.absmax.median()),
        }
        for path, layer in found.layers.items()
    ]
    data = {"model": model.name, "file": str(out), "fingerprint": found.fingerprint, "layers": rows}
    worst = sorted(rows, key=lambda r: -r["largest"] / max(r["typical"], 1e-30))[:5]
    lines = [f"{len(rows)} layers, {found.samples} samples, {source or 'example calls'}: {out}"]
    lines += [f"  {r['layer']}: largest channel {r['largest']:.3g}, median {r['typical']:.3g}" for r in worst]
    return Result(data, lines)


def _exits(args: argparse.Namespace) -> list[int]:
    """The exits a policy is wanted for; none without --exits."""
    if args.exits is None:
        return []
    if args.pipeline or args.hessian or args.means:
        raise OptionError("--exits: takes neither --pipeline, --hessian nor --means")
    if not re.fullmatch(r"\d{1,6}(\+\d{1,6})*", args.exits):
        raise OptionError(f"--exits = {args.exits!r}: expected numbers joined by +, such as 15+20")
    return [int(n) for n in args.exits.split("+")]


def _train(model: Any, calls: list[Any], source: str, exits: list[int], out: Path) -> Result:
    from tilewright.frontends.exit_policy import train_exit_policy

    with step(f"training on {len(calls)} samples"):
        found = train_exit_policy(model.module, calls, exits, source=source)
    found.save(out)
    data = {"model": model.name, "file": str(out), "fingerprint": found.fingerprint, "exits": exits}
    names = "+".join(map(str, exits))
    return Result(data, [f"exits {names}, {source or 'example calls'}: {out}"])


def _calls(model: Any, text: str, args: argparse.Namespace) -> tuple[list[Any], str]:
    from tilewright.frontends.calibration import token_windows

    if model.tokenizer is None:
        return [model.example(args.call, length=args.length)], ""
    return token_windows(
        model.tokenizer, text, length=args.length or 512, samples=args.samples, first=args.first
    )
