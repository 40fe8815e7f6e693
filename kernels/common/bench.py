"""Interleaved timing: all candidates take turns in one process, the minimum over rounds counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tilewright.kernels.common.family import KernelFamily
from tilewright.kernels.load import build_kernel
from tilewright.runtime.contracts import Refusal, Target

COLD_BYTES = 48 << 20
"""Bytes of weights to rotate over, so that no call finds its weights in a cache."""


@dataclass(frozen=True)
class BenchRow:
    """One line of a kernel benchmark."""

    case: str
    kernel_us: float
    """Microseconds per call of the generated kernel, through its torch op."""
    kernel_gbs: float
    """1e9 bytes of compulsory traffic per second."""
    baseline: str
    baseline_us: float

    @property
    def ratio(self) -> float:
        """Baseline time over kernel time: above 1 the kernel is faster."""
        return self.baseline_us / self.kernel_us


def interleave(
    candidates: Mapping[str, Callable[[int], object]], copies: int, rounds: int, turn_seconds: float = 0.004
) -> dict[str, float]:
    """Seconds per call of each candidate(i), with i walking over `copies`: the least over all its turns.

    A turn is a few milliseconds of calls, so that a disturbance by another process spoils one turn and not
    all; `rounds` counts the times that each candidate walks over all copies.
    """
    best, place, turn = dict.fromkeys(candidates, float("inf")), dict.fromkeys(candidates, 0), {}
    for name, run in candidates.items():
        run(0)
        start = time.perf_counter()
        run(1 % copies)
        turn[name] = max(1, min(copies, int(turn_seconds / (time.perf_counter() - start))))
    while min(place.values()) < rounds * copies:
        for name, run in candidates.items():
            first, calls = place[name], turn[name]
            start = time.perf_counter()
            for i in range(first, first + calls):
                run(i % copies)
            best[name] = min(best[name], (time.perf_counter() - start) / calls)
            place[name] = first + calls
    return best


def against_inductor(
    family: KernelFamily,
    definition: Callable[..., object],
    args: Sequence[object],
    target: Target,
    rounds: int,
) -> BenchRow:
    """The kernel through its op against the whole compiled call of the definition, on the same warm
    inputs."""
    key = family.configure(args, target)
    if isinstance(key, Refusal):
        raise ValueError(f"{family.op}: {key}")
    op, given = build_kernel(family, key).op, family.rewrite_args(key, args)
    constants = [a for a in args if not isinstance(a, torch.Tensor)]
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    compiled = torch.compile(lambda *inputs: definition(*inputs, *constants), fullgraph=True, dynamic=False)
    with torch.inference_mode():
        outputs = op(*given)
        seconds = interleave(
            {"kernel": lambda _: op(*given), "inductor": lambda _: compiled(*tensors)}, 1, rounds
        )
    made = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    traffic = sum(t.numel() * t.element_size() for t in [*tensors, *made])
    case = f"{family.op} {tuple(tensors[0].shape)} {key.dtype}"
    kernel, inductor = seconds["kernel"], seconds["inductor"]
    return BenchRow(case, kernel * 1e6, traffic / kernel / 1e9, "inductor", inductor * 1e6)
