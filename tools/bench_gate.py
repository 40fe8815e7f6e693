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

from tilewright.compiler.ops.measured_copy import measured_copy
from tilewright.compiler.ops.step_reuse import enter, leave
from tilewright.kernels.table import host_target, select_for_node
from tilewright.runtime.contracts import Measure, Refusal
from tilewright.runtime.step_probe import Kept
from tilewright.runtime.step_reuse import FAST_30, Accumulated, FirstBlock, Policy, StepReuse

CALLS = 200
"""In a round: short, so that some rounds are not interrupted."""
FEW = 1 << 16
"""Elements from which a call is long enough to be timed by itself."""
STEPS = 1 << 40


def gate(policy: Policy, entry: Tensor, exit_: Tensor, measure: Measure) -> Callable[[], None]:
    """One step of a running request through one gate."""
    reuse, steps = StepReuse(policy), itertools.count()
    reuse.begin("r", STEPS)

    def step() -> None:
        with reuse.call("r", "", next(steps)):
            begun = enter(entry, entry, 0, measure)
            leave(exit_, begun, begun, 0, measure)

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
    measure, kept = kernel_for(entry), Kept(entry, None, measured_copy.definition)
    return {
        "modulated (TeaCache), reused": gate(Accumulated(1e9), entry, exit_, measure),
        "modulated (TeaCache), computed": gate(Accumulated(0.0), entry, exit_, measure),
        "first-block, reused": gate(FirstBlock(1.0), entry, exit_, measure),
        "first-block, computed": gate(FirstBlock(0.0), entry, exit_, measure),
        "residual (AdaCache)": gate(FAST_30, entry, exit_, measure),
        "a call without a gate": outside(),
        "its measure and copy": lambda: Kept(exit_, kept, measure),
        "the same by torch's ops": lambda: Kept(exit_, kept, measured_copy.definition),
        "exit - entry": lambda: exit_ - entry,
        "entry + residual": lambda: entry + exit_,
    }


def kernel_for(entry: Tensor) -> Measure:
    """What measures in a compiled program: the kernel, or the definition where there is none."""
    choice = select_for_node("measured_copy", [entry] * 3, host_target(), training=False)
    return measured_copy.definition if isinstance(choice, Refusal) else choice.op


def measure(timed: dict[str, Callable[[], object]], rounds: int, calls: int = CALLS) -> dict[str, float]:
    """Least seconds of a call by name."""
    least = dict.fromkeys(timed, math.inf)
    for _ in range(rounds):
        for name, call in timed.items():
            started = time.perf_counter()
            for _ in range(calls):
                call()
            least[name] = min(least[name], (time.perf_counter() - started) / calls)
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
    calls = CALLS if math.prod(shape) <= FEW else 1
    found = measure(sides(torch.randn(shape).to(getattr(torch, given.dtype))), given.rounds, calls)
    print(f"{shape} {given.dtype}, {given.threads} threads, us of a step:")
    for name, seconds in found.items():
        print(f"  {name:<32} {seconds * 1e6:7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
