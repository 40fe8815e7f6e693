"""What early exits save and cost while decoding: time of a token, layers run, agreement and perplexity.

The text is fixed: the whole model's own greedy answer to each prompt. Both sides decode it token by token
over a static cache of their own, in turns, and the least time per token over all rounds counts.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.generation import CACHE_STEP, generate
from tilewright.frontends.loaders import resolve
from tilewright.runtime.exit_counts import ExitCounts, counting_exits
from tilewright.tools.bench_speculation import PROMPTS, encode


@dataclass
class Side:
    """One way of decoding."""

    step: Any
    seconds: list[float] = field(default_factory=list)
    """Least time of each token."""
    loss: float = 0.0
    choices: list[int] = field(default_factory=list)

    def run(self, model: Any, text: Tensor, prompt: int) -> None:
        """Decode what follows the prompt in `text` [1, S], and keep the least times."""
        from transformers import StaticCache

        room = -(-text.shape[1] // CACHE_STEP) * CACHE_STEP
        cache = StaticCache(config=model.config, max_cache_len=room)
        given = cache_arguments(model, cache)
        model(input_ids=text[:, :prompt], **given)
        times, loss, choices = [], 0.0, []
        for i in range(prompt, text.shape[1] - 1):
            ids, place = text[:, i : i + 1].clone(), torch.tensor([[i]])
            started = time.perf_counter()
            out = self.step(input_ids=ids, position_ids=place, **given)
            times.append(time.perf_counter() - started)
            logits = out.logits[0, -1]
            loss -= float(logits.double().log_softmax(-1)[text[0, i + 1]])
            choices.append(int(logits.argmax()))
        self.seconds = [min(a, b) for a, b in zip(self.seconds or times, times, strict=True)]
        self.loss, self.choices = loss, choices


def compiled(module: Any, pipeline: str) -> Any:
    """The model behind a pipeline, for fixed shapes."""
    options: Any = {"pipeline": pipeline, "replay": False}
    return torch.compile(module, backend="tilewright", options=options, dynamic=False)


def compare(
    model: Any, texts: list[tuple[Tensor, int]], plain: Any, step: Any, rounds: int
) -> tuple[list[float], ExitCounts]:
    """([time ratio, perplexity ratio, agreement of the choices], what was counted in one round)."""
    whole, exits, losses, same, tokens = 0.0, 0.0, [0.0, 0.0], 0, 0
    counts = ExitCounts()
    for text, prompt in texts:
        sides = Side(plain), Side(step)
        for _ in range(rounds + 1):  # the first compiles
            for side in sides:
                with counting_exits() as counts_now:
                    side.run(model.module, text, prompt)
            if not sides[1].seconds:
                continue
        _add(counts, counts_now)
        whole, exits = whole + sum(sides[0].seconds), exits + sum(sides[1].seconds)
        for i, side in enumerate(sides):
            losses[i] += side.loss
        same += sum(a == b for a, b in zip(sides[0].choices, sides[1].choices, strict=True))
        tokens += len(sides[0].choices)
    return [exits / whole, math.exp((losses[1] - losses[0]) / tokens), same / tokens], counts


def _add(counts: ExitCounts, more: ExitCounts) -> None:
    counts.calls, counts.tokens = counts.calls + more.calls, counts.tokens + more.tokens
    counts.layers.update(more.layers)
    for mine, theirs in ((counts.left, more.left), (counts.skipped, more.skipped)):
        for gate, n in theirs.items():
            mine[gate] = mine.get(gate, 0) + n


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_early_exit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", nargs="+", help="options of early-exit: exits=20+25,threshold=0.95")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--base", default="exact", metavar="PIPELINE", help="behind it, and the other side")
    parser.add_argument("--tokens", type=int, default=32, metavar="N")
    parser.add_argument("--prompts", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    given = parser.parse_args(argv)
    model = resolve(given.model)
    module: Any = model.module
    layers = int(module.config.get_text_config().num_hidden_layers)
    texts = []
    for prompt in PROMPTS["chat"][: given.prompts]:
        ids = torch.tensor([encode(model, prompt)])
        texts.append((generate(module, module, ids, given.tokens).tokens, ids.shape[1]))
    plain = compiled(module, given.base)
    for text in given.settings:
        step = compiled(module, f"early-exit{{{text}}},{given.base}")
        (seconds, perplexity, same), counts = compare(model, texts, plain, step, given.rounds)
        left = ", ".join(f"{n / counts.tokens:.0%}" for n in counts.left.values())
        print(
            f"{text}: layers {layers - counts.layers_saved:.1f} of {layers}, gone at each exit {left}; "
            f"time x {seconds:.3f}, perplexity x {perplexity:.3f}, same choice {same:.1%}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
