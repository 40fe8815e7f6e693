"""Time what a gate of `reuse-step-residual` costs by itself: a call inside a request, begin and end around a
stretch that takes no time. All sides take turns in one process, and the least time over all rounds counts.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tilewright.compiler.ops.step_reuse import enter, leave
from tilewright.runtime.step_probe import Kept
from tilewright.runtime.step_reuse import FAST_30, Accumulated, FirstBlock, Policy, StepReuse

CALLS = 200
"""In a round: short, so that some rounds are not interrupted."""
STEPS = 1 << 40


def gate(policy: Policy, entry: Tensor, exit_: Tensor) -> Callable[[], None]:
    """One step of a running request through one gate."""
    reuse, steps = StepReuse(policy), itertools.count()
    reuse.begin("r", STEPS)

    def step() -> None:
        with reuse.call("r", "", next(steps)):
            begun = enter(entry, entry, 0)
            leave(exit_, begun, begun, 0)

    return step


def outside() -> Callable[[], None]:
    """A call that meets no gate."""
    reuse, steps = StepReuse(FirstBlock(0.0)), itertools.count()
    reuse.begin("r", STEPS)

    def step() -> None:
        with reuse.call("r", "", next(steps)):
            pass

    return step


def sides(entry: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    exit_ = entry + torch.randn_like(entry)
    old = Kept(entry)
    new = Kept(exit_, old)
    return {
        "modulated (TeaCache), reused": gate(Accumulated(1e9), entry, exit_),
        "modulated (TeaCache), computed": gate(Accumulated(0.0), entry, exit_),
        "first-block, reused": gate(FirstBlock(1.0), entry, exit_),
        "first-block, computed": gate(FirstBlock(0.0), entry, exit_),
        "residual (AdaCache)": gate(FAST_30, entry, exit_),
        "a call without a gate": outside(),
        "its measure": lambda: new.change(old),
        "its copy": lambda: Kept(exit_, old),
        "entry + residual": lambda: entry + exit_,
    }


def measure(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of a call by name."""
    least = dict.fromkeys(timed, math.inf)
    for _ in range(rounds):
        for name, call in timed.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.perf_counter() - started) / CALLS)
    return least


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="1x1x576", metavar="BxSxC", help="of the stream (default 1x1x576)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=60, metavar="N")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    shape = [int(n) for n in given.shape.split("x")]
    found = measure(sides(torch.randn(shape).to(getattr(torch, given.dtype))), given.rounds)
    print(f"{shape} {given.dtype}, {given.threads} threads, us of a step:")
    for name, seconds in found.items():
        print(f"  {name:<32} {seconds * 1e6:7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
