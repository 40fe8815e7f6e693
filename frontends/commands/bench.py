"""`tilewright bench`: both sides in one process, interleaved round by round; ratios of the minima."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cache_argument import cache_in
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
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.add_argument(
        "--against", default="eager,inductor", metavar="SIDES", help="eager, inductor or both (default both)"
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="interleaved rounds (default 10)")
    parser.add_argument(
        "--memory", action="store_true", help="compare peak resident memory instead, a process for each side"
    )
    parser.add_argument(
        "--offload-weights", action="store_true", help="with --memory: ours moves the weights to a file first"
    )
    parser.add_argument("--only", choices=("tilewright", *SIDES), help="with --memory: this side, in here")


def run(args: argparse.Namespace) -> Result:
    import torch

    sides = [s for s in args.against.split(",") if s]
    for side in sides:
        if side not in SIDES:
            raise OptionError(f"--against = {side!r}: expected one of {', '.join(SIDES)}")
    if not 1 <= args.rounds <= 10_000:
        raise OptionError(f"--rounds = {args.rounds}: expected 1 to 10000")
    if args.only and not args.memory:
        raise OptionError(f"--only = {args.only!r}: expected together with --memory")
    if args.offload_weights and not args.memory:
        raise OptionError("--offload-weights: expected together with --memory")
    if args.memory and not CLEAR.exists():
        raise OptionError("--memory: expected Linux, where a process can read its peak resident memory")
    options = compile_options(args)
    if args.memory and not args.only:
        return _memory(args, ["tilewright", *sides])
    model = load(args)
    call_args, call_kwargs = model.example(args.call, length=args.length)
    tokens = 0 if cache_in(call_kwargs) is None else int(call_kwargs["input_ids"].shape[1])
    forwards: dict[str, Callable[..., Any]] = {
        side: _compiled(model, side, options)
        for side in ([args.only] if args.only else ["tilewright", *sides])
    }

    def once(name: str) -> None:
        forwards[name](*call_args, **call_kwargs)
        rewind(call_kwargs, tokens)

    if args.only:
        with torch.no_grad():
            moved = model.module if args.offload_weights and args.only == "tilewright" else None
            return _peaks(args.only, lambda: once(args.only), args.rounds, moved)
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


def _compiled(model: Any, side: str, options: dict[str, Any]) -> Callable[..., Any]:
    import torch

    if side == "eager":
        return model.module  # type: ignore[no-any-return]
    return torch.compile(model.module, backend=side, options=options if side == "tilewright" else None)


def _peaks(side: str, once: Callable[[], None], rounds: int, moved: Any) -> Result:
    """Peak resident bytes of this process: from the loaded model to the second call, and in later calls,
    before which the weights of the module `moved`, if any, go to a file."""
    CLEAR.write_text("5")
    once()
    once()
    compiling = _peak_resident()
    if moved is not None:
        from tilewright.frontends.weight_offload import offload_weights

        offload_weights(moved)
    CLEAR.write_text("5")
    for _ in range(rounds):
        once()
    data = {"side": side, "peak_bytes_with_compilation": compiling, "peak_bytes_of_calls": _peak_resident()}
    return Result(data, [f"{name}: {value}" for name, value in data.items()])


def _peak_resident() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _words(args: argparse.Namespace) -> list[str]:
    """The command line that gives these arguments again."""
    words = ["bench", args.model, "--memory", f"--rounds={args.rounds}", f"--pipeline={args.pipeline}"]
    given = {name: getattr(args, name) for name in ("weights", "call", "length")}
    words += [f"--{name}={value}" for name, value in given.items() if value is not None]
    words += [f"--fact={fact}" for fact in args.fact]
    words += ["--offload-weights"] if args.offload_weights else []
    return words + (["--no-kernels"] if args.no_kernels else [])


def _memory(args: argparse.Namespace, sides: list[str]) -> Result:
    """Each side in a fresh process, one after the other; processes that compile for it are not counted."""
    rows = {}
    for side in sides:
        command = [sys.executable, "-m", "tilewright.frontends.cli", *_words(args), "--only", side, "--json"]
        with step(f"memory of {side}"):
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OptionError(f"{side} did not run: {done.stderr.strip().splitlines()[-1]}")
        rows[side] = json.loads(done.stdout)
    baseline = "inductor" if "inductor" in rows else sides[-1]
    names = ("peak_bytes_with_compilation", "peak_bytes_of_calls")
    ratios = {name: rows["tilewright"][name] / rows[baseline][name] for name in names}
    lines = [
        f"{side:<11} peak {row[names[0]] / 2**20:8.0f} MiB with compilation, "
        f"{row[names[1]] / 2**20:8.0f} MiB during calls"
        for side, row in rows.items()
    ]
    lines.append(f"ratio tilewright / {baseline}: {ratios[names[0]]:.3f} and {ratios[names[1]]:.3f} (bytes)")
    data = {"model": args.model, "pipeline": args.pipeline, "call": args.call, "sides": rows}
    return Result({**data, "baseline": baseline, "ratios": ratios, "ratio": ratios[names[0]]}, lines)


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
