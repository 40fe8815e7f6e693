"""`tilewright bench`: both sides in one process, interleaved round by round; ratios of the minima."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import (
    add_model,
    add_pipeline,
    compile_options,
    load,
    rewind,
    step,
    timed,
)

SIDES = ("eager", "inductor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.add_argument(
        "--against", default="eager,inductor", metavar="SIDES", help="eager, inductor or both (default both)"
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="interleaved rounds (default 10)")


def run(args: argparse.Namespace) -> Result:
    import torch

    sides = [s for s in args.against.split(",") if s]
    for side in sides:
        if side not in SIDES:
            raise OptionError(f"--against = {side!r}: expected one of {', '.join(SIDES)}")
    if not 1 <= args.rounds <= 10_000:
        raise OptionError(f"--rounds = {args.rounds}: expected 1 to 10000")
    options = compile_options(args)
    model = load(args)
    call_args, call_kwargs = model.example(args.call, length=args.length)
    tokens = int(call_kwargs["input_ids"].shape[1]) if "past_key_values" in call_kwargs else 0
    forwards: dict[str, Callable[..., Any]] = {"tilewright": _compiled(model, "tilewright", options)}
    for side in sides:
        forwards[side] = model.module if side == "eager" else _compiled(model, "inductor", None)

    def once(name: str) -> None:
        forwards[name](*call_args, **call_kwargs)
        rewind(call_kwargs, tokens)

    first: dict[str, float] = {}
    with torch.no_grad():
        for name in forwards:
            with step(f"first call of {name}"):
                first[name] = timed(lambda name=name: once(name))
                once(name)
        times: dict[str, list[float]] = {name: [] for name in forwards}
        with step(f"{args.rounds} rounds"):
            for _ in range(args.rounds):
                for name in forwards:
                    times[name].append(timed(lambda name=name: once(name)))
    return _result(args, model.name, times, first)


def _compiled(model: Any, backend: str, options: dict[str, Any] | None) -> Callable[..., Any]:
    import torch

    return torch.compile(model.module, backend=backend, options=options)


def _result(
    args: argparse.Namespace, name: str, times: dict[str, list[float]], first: dict[str, float]
) -> Result:
    ours = min(times["tilewright"])
    rows = {
        side: {
            "milliseconds_min": 1e3 * min(values),
            "milliseconds_median": 1e3 * statistics.median(values),
            "first_call_seconds": first[side],
            "speedup_of_tilewright": min(values) / ours,
        }
        for side, values in times.items()
    }
    baseline = (
        "inductor" if "inductor" in times else next((s for s in times if s != "tilewright"), "tilewright")
    )
    data = {
        "model": name,
        "pipeline": args.pipeline,
        "call": args.call,
        "rounds": args.rounds,
        "sides": rows,
        "baseline": baseline,
        "ratio": ours / min(times[baseline]),
    }
    lines = [
        f"{side:<11} min {r['milliseconds_min']:9.2f} ms  median {r['milliseconds_median']:9.2f} ms  "
        f"first call {r['first_call_seconds']:6.1f} s  "
        f"tilewright is {r['speedup_of_tilewright']:.2f}x as fast"
        for side, r in rows.items()
    ]
    lines.append(
        f"ratio tilewright / {baseline}: {data['ratio']:.3f} (time, minimum of {args.rounds} rounds)"
    )
    return Result(data, lines)
