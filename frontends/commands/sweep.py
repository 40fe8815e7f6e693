"""`tilewright evaluate toy-video-dit --sweep`: quality of final latents over densities or thresholds."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import load, step

MODEL = "toy-video-dit"


def run_sweep(args: argparse.Namespace) -> Result:
    """One row per system and density, or per policy and threshold."""
    from tilewright.frontends.latent_quality import DENSITIES, attention_quality, noises, reuse_quality

    if args.model != MODEL or args.weights:
        raise OptionError(f"--sweep evaluates {MODEL} with its own weights, not {args.model!r}")
    if args.pipeline != "exact" or args.fact or args.no_kernels:
        raise OptionError(
            "--sweep has its own pipelines", remedy="leave out --pipeline, --fact, --no-kernels"
        )
    attention = args.sweep == "attention"
    other = "thresholds" if attention else "densities"
    if getattr(args, other) is not None:
        raise OptionError(f"--{other} does not go with --sweep {args.sweep}")
    steps = (20 if attention else 50) if args.steps is None else args.steps
    if not 4 <= steps <= 200:
        raise OptionError(f"--steps = {steps}: expected 4 to 200")
    plot = _plot_path(args.plot)
    densities, thresholds = _numbers(args, "densities") or DENSITIES, _numbers(args, "thresholds")
    items = 1 if args.items is None else args.items
    noises(items)  # says now what is wrong with the number
    module = load(args).module
    rows: list[Any] = []
    with step(f"denoising {items} requests of {steps} steps per candidate"):
        if attention:
            rows += attention_quality(module, densities=densities, steps=steps, items=items)
        else:
            rows += reuse_quality(module, thresholds=thresholds, steps=steps, items=items)
    if plot is not None:
        plot.write_text(_chart(rows, attention), encoding="utf-8")
    data = {"model": MODEL, "sweep": args.sweep, "steps": steps, "items": items}
    return Result(
        {**data, "rows": [dataclasses.asdict(row) for row in rows]},
        _attention_lines(rows) if attention else _reuse_lines(rows),
    )


def _numbers(args: argparse.Namespace, name: str) -> tuple[float, ...] | None:
    text = getattr(args, name)
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--{name} = {text!r}: expected numbers joined by commas") from None
    legal = (
        all(0 < v < 1 for v in values) if name == "densities" else all(0 < v < float("inf") for v in values)
    )
    if not legal:
        raise OptionError(f"--{name} = {text!r}: expected more than 0{' and less than 1' * (name[0] == 'd')}")
    return values


def _plot_path(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if path.suffix != ".svg" or not path.parent.is_dir() or path.is_dir():
        raise OptionError(f"--plot = {text!r}: expected an .svg file in a folder that exists")
    return path


def _attention_lines(rows: list[Any]) -> list[str]:
    lines = [
        f"{'system':<20} {'asked':>6} {'density':>8} {'PSNR dB':>8} {'attention time saved':>21} {'steps':>7}"
    ]
    for r in rows:
        saved, steps = f"{r.attention_saved:.0%}", f"{r.sparse_steps}/{r.steps}"
        lines.append(f"{r.system:<20} {r.wanted:>6g} {r.density:>8.3f} {r.psnr:>8.1f} {saved:>21} {steps:>7}")
    return [*lines, "steps: those that run the sparse program, of all; the saving is that of one such step"]


def _reuse_lines(rows: list[Any]) -> list[str]:
    lines = [f"{'policy':<17} {'threshold':>9} {'PSNR dB':>8} {'blocks':>11} {'saved':>6} {'time saved':>11}"]
    for r in rows:
        blocks = f"{r.evaluations}/{r.full}"
        head = f"{r.policy:<17} {r.threshold:>9g} {r.psnr:>8.1f} {blocks:>11}"
        lines.append(f"{head} {r.saved:>6.0%} {r.time_saved:>11.0%}")
    return [
        *lines,
        "blocks: evaluated, of all; time saved: from the medians of calls that compute and that reuse",
    ]


def _chart(rows: list[Any], attention: bool) -> str:
    from tilewright.frontends.curve_plot import svg

    series: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        key, across = (r.system, r.density) if attention else (r.policy, r.saved)
        series.setdefault(key, []).append((across, r.psnr))
    across = "density of the layout" if attention else "share of block evaluations saved"
    return svg("Final latents against dense", across, "PSNR (dB)", series)
