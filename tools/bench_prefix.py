"""Time to the first token of a prompt whose prefix is held, against computing all of it: sides in turn.

The prompt is `--prefix` random tokens and `--question` others; a side is one forward of a bundled model up to
the logits of the last token. Sides: stock (the model's own cache), paged (an empty paged cache), held (a
prefix cache that knows the prefix) and loaded (a prefix cache read from a snapshot just before, the reading
timed). The next token must be the same on all sides.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tilewright as tw
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.kv_prefix import PrefixCache

GOAL = 8.0
"""Least ratio of stock to held, for a prefix of 2,048 tokens."""


def first_token(model: Any, ids: torch.Tensor, **given: Any) -> int:
    """The token that follows ids [1, T]."""
    return int(model(input_ids=ids, logits_to_keep=1, **given).logits[0, -1].argmax())


def sides(model: Any, prompt: list[int], known: PrefixCache, folder: Path) -> dict[str, Callable[[], int]]:
    """What is timed, by name; each gives the next token."""
    ids = torch.tensor([prompt])

    def paged() -> int:
        with tw.kv_cache(model) as cache:
            return first_token(model, ids, **cache_arguments(model, cache))

    def held(source: PrefixCache = known) -> int:
        begun = source.begin([prompt])
        with begun["past_key_values"] as cache:
            rest = begun["input_ids"][:, cache.get_seq_length() :]
            given = cache_arguments(model, cache)
            return first_token(model, rest, attention_mask=begun["attention_mask"], **given)

    def loaded() -> int:
        fresh = tw.prefix_cache(model, known.tree.capacity)
        fresh.load(folder, "random")
        return held(fresh)

    return {"stock": lambda: first_token(model, ids), "paged": paged, "held": held, "loaded": loaded}


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when the goal is missed or a side gives another token."""
    parser = argparse.ArgumentParser(prog="bench_prefix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "tiny-llama"])
    parser.add_argument("--prefix", type=int, default=2048, help="tokens held")
    parser.add_argument("--question", type=int, default=32, help="tokens behind them")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    model: Any = BUNDLED[options.model]().module.eval()
    generator = torch.Generator().manual_seed(0)
    size = options.prefix + options.question
    prompt = torch.randint(3, model.config.vocab_size, (size,), generator=generator).tolist()
    known = tw.prefix_cache(model, size)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        known.add(prompt[: options.prefix])
        known.save(Path(folder) / "kv", "random")
        timed = sides(model, prompt, known, Path(folder) / "kv")
        tokens, seconds = {name: run() for name, run in timed.items()}, dict.fromkeys(timed, float("inf"))
        for _ in range(options.rounds):
            for name, run in timed.items():
                start = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    print(f"{options.model}: {options.prefix} tokens held, {options.question} new; next tokens {tokens}")
    for name, spent in seconds.items():
        print(f"{name:<8} {spent * 1e3:>9.1f} ms {seconds['stock'] / spent:>7.2f} x")
    missed = options.prefix == 2048 and seconds["stock"] / seconds["held"] < GOAL
    print(f"goal: held {GOAL:.0f} x{' MISSED' if missed else ''}")
    return 1 if missed or len(set(tokens.values())) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
