"""`tilewright windows`: a window table for `sliding-tile-attention`, searched on the model or taken over."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import add_model, load, step

SEARCHED = "toy-video-dit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the table to write, JSON")
    parser.add_argument("--tile", metavar="TxYxX", required=True, help="tokens of a tile")
    parser.add_argument("--nondivisible", choices=("error", "ceil", "balanced"), default="error")
    parser.add_argument(
        "--convert", metavar="FILE", help="take over this flat table {step_layer_head: [wt, wy, wx]}"
    )
    parser.add_argument("--candidates", metavar="W,W,...", help="windows in tiles, such as 1x3x3,2x3x1")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of a request (default 20)")
    parser.add_argument(
        "--dense-steps", type=int, default=0, metavar="N", help="first steps that get the whole grid"
    )
    parser.add_argument("--items", type=int, default=1, metavar="N", help="requests (default 1)")
    parser.add_argument(
        "--weight", type=float, default=0.0, metavar="W", help="of density beside the loss (default 0)"
    )


def run(args: argparse.Namespace) -> Result:
    out = Path(args.out)
    if not out.parent.is_dir() or out.is_dir():
        raise OptionError(f"--out = {args.out!r}: expected a file in a folder that exists")
    tile = _triple("tile", args.tile)
    if args.convert is None:
        windows = [_triple("candidates", text) for text in (args.candidates or "").split(",") if text]
        if args.model != SEARCHED or args.weights:
            raise OptionError(
                f"the command knows how to denoise with {SEARCHED} only, not {args.model!r}",
                remedy="use tilewright.WindowSearch around a loop or a diffusers pipeline of your own",
            )
        if not windows:
            raise OptionError("--candidates is missing: windows in tiles, such as 1x3x3,2x3x1")
        if not 1 <= args.steps <= 200:
            raise OptionError(f"--steps = {args.steps}: expected 1 to 200")
    elif args.candidates:
        raise OptionError("--candidates does not go with --convert: a table has its windows")
    model = load(args)
    table = _converted(model, tile, args) if args.convert else _searched(model.module, tile, windows, args)
    from tilewright.compiler.whole_file import written_whole
    from tilewright.frontends.window_search import density

    kept, counts = density(table, args.nondivisible), Counter(map(tuple, table["windows"].values()))
    with written_whole(out) as file:
        file.write_text(json.dumps(table), encoding="utf-8")
    shown = {"x".join(map(str, window)): n for window, n in counts.most_common()}
    lines = [f"{counts.total()} windows, density {kept:.4f}: {out}"]
    lines += [f"  {name}: {n}" for name, n in shown.items()]
    return Result({"file": str(out), "density": kept, "windows": shown, **table["fingerprint"]}, lines)


def _searched(module: Any, tile: Any, windows: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    from tilewright.frontends.latent_quality import noises, sample, timesteps_of
    from tilewright.frontends.window_search import WindowSearch

    requests = noises(args.items)
    search = WindowSearch(module, tile=tile, candidates=windows, nondivisible=args.nondivisible)
    with step(f"{args.items} requests of {args.steps} steps, {len(windows)} candidates"):
        for noise, prompt in requests:
            with search.runner.request(prompt, timesteps_of(args.steps)):
                sample(search.runner, noise, prompt, args.steps, search.runner.branch)
    return search.table(dense_steps=args.dense_steps, weight=args.weight)


def _converted(model: Any, tile: Any, args: argparse.Namespace) -> dict[str, Any]:
    from tilewright.frontends.window_search import convert_windows

    call = model.example(args.call, length=args.length)
    with step("one forward of the model"):
        return convert_windows(model.module, call, args.convert, tile=tile, nondivisible=args.nondivisible)


def _triple(name: str, text: str) -> Any:
    parts = text.split("x")
    if len(parts) != 3 or not all(p.isascii() and p.isdecimal() and int(p) >= 1 for p in parts):
        raise OptionError(f"--{name} = {text!r}: expected three whole numbers from 1 joined by x (T, Y, X)")
    return tuple(map(int, parts))
