"""The longest wait between two tokens of sequences that decode while a long prompt comes, by tokens of a
forward: a bundled model, all budgets in turn, the least counts."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_splitfuse import SplitFuse


def waits(model: Any, prompts: list[list[int]], budget: int) -> tuple[float, float]:
    """(longest step, all steps in seconds) of two sequences that decode until the prompt that came after
    their first tokens has its own first token."""
    steps: list[float] = []
    with SplitFuse(model, budget) as engine:
        for prompt in prompts[:2]:
            engine.submit(prompt, 64)
        decoding: set[int] = set()
        while len(decoding) < 2:
            decoding |= engine.step().keys()
        late, arrived = engine.submit(prompts[2], 1), False
        while not arrived:
            start = time.perf_counter()
            arrived = late in engine.step()
            steps.append(time.perf_counter() - start)
    return max(steps), sum(steps)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where the smallest budget waits no less than the greatest."""
    parser = argparse.ArgumentParser(prog="bench_splitfuse", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "tiny-llama"])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt that comes")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    model: Any = BUNDLED[options.model]().module.eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, model.config.vocab_size, (size,), generator=generator).tolist()
        for size in (12, 12, options.prompt)
    ]
    best: dict[int, tuple[float, float]] = {}
    for _ in range(options.rounds):
        for budget in options.budgets:
            longest, total = waits(model, prompts, budget)
            old = best.get(budget, (longest, total))
            best[budget] = min(old[0], longest), min(old[1], total)
    print(f"{options.model}: 2 sequences decode, a prompt of {options.prompt} tokens comes; ms")
    for budget, (longest, total) in best.items():
        print(
            f"budget {budget:>5}: longest wait {longest * 1e3:>8.0f} ms, prompt done {total * 1e3:>8.0f} ms"
        )
    return 0 if best[min(best)][0] < best[max(best)][0] else 1


if __name__ == "__main__":
    sys.exit(main())
