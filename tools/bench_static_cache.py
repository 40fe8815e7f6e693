"""Time one decode step over transformers' StaticCache as its capacity grows: compiled and eager take turns,
and the least time of each counts.

The batch is padded on the left, so that every row needs the mask. What a step costs should follow from the
tokens held, not from the capacity.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.loaders import resolve

HELD = 64


def step_of(
    module: Any, forward: Callable[..., Any], batch: int, capacity: int
) -> Callable[[], torch.Tensor]:
    """A decode step as a call without arguments: logits [B, 1, V] of the token behind HELD - 1 others."""
    from transformers import StaticCache

    config, generator = module.config, torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (batch, HELD), generator=generator)
    mask = torch.ones(batch, HELD, dtype=torch.long)
    for row in range(batch):
        mask[row, : row * 7 % (HELD // 2)] = 0
    cache = StaticCache(config=config, max_cache_len=capacity)
    cache.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu")
    )
    given = cache_arguments(module, cache)
    with torch.no_grad():
        module(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], **given)
    given |= {"input_ids": ids[:, -1:], "attention_mask": mask, "position_ids": mask.sum(1, True) - 1}

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(HELD - 1)
        with torch.no_grad():
            logits: torch.Tensor = forward(**given).logits
        return logits

    return step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_static_cache", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--pipeline", default="exact", metavar="P")
    parser.add_argument("--batch", type=int, default=4, metavar="N")
    parser.add_argument("--capacity", default="128,4096", metavar="N[,N]", help="tokens, 64 of them held")
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    given = parser.parse_args(argv)
    capacities = [int(n) for n in given.capacity.split(",")]
    if given.batch < 1 or given.rounds < 1 or min(capacities) < HELD:
        parser.error(f"--batch and --rounds: expected 1 or more; --capacity: expected {HELD} or more")
    module: Any = resolve(given.model).module
    sides: dict[tuple[str, int], Callable[[], torch.Tensor]] = {}
    options = {"pipeline": given.pipeline}
    compiled = torch.compile(module, backend="tilewright", options=options, dynamic=False)
    for capacity in capacities:
        for name, forward in ((given.pipeline, compiled), ("eager", module)):
            sides[name, capacity] = step_of(module, forward, given.batch, capacity)
        got, want = (sides[name, capacity]() for name in (given.pipeline, "eager"))
        print(
            f"capacity {capacity}: logits differ by {float((got - want).abs().max() / want.abs().max()):.1e}"
        )
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(given.rounds):
        for side, step in sides.items():
            started = time.perf_counter()
            step()
            best[side] = min(best[side], time.perf_counter() - started)
    print(f"{given.batch} rows, {HELD} tokens held, {torch.get_num_threads()} threads")
    for (name, capacity), seconds in best.items():
        ratio = seconds / best[name, capacities[0]]
        print(f"{name:<10} capacity {capacity:>6}: {seconds * 1e3:7.1f} ms  x {ratio:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
