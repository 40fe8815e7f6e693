"""Time speculation beside plain decoding by the same compiled target: both take turns on every prompt, in one
process, and the least time per prompt over all rounds counts (the prompt's own pass is left out). The time of
all rounds together, in which drafts that do not pay are also tried again, is printed beside it.

Prompts: chat (nothing to copy), code editing (most of the answer stands in the prompt) and words without
sense, one by one or so many in a batch. Every text is also compared with the plain one. Several drafts,
prompts and batches give every combination.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tilewright.frontends.language_model import LanguageModel
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.frontends.loaders import resolve
from tilewright.frontends.speculate import Speculator, speculate

CHAT = (
    "Why is the sky blue?",
    "Give me three tips for writing a cover letter.",
    "Explain the French Revolution in one paragraph.",
    "What should I pack for a week of hiking in the mountains?",
)
_SHAPES = """class Rectangle:
    def __init__(self, width, height):
        self.width = width
        self.height = height

    def area(self):
        return self.width * self.height

    def perimeter(self):
        return 2 * (self.width + self.height)
"""
_STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if len(self.items) == 0:
            raise IndexError("pop from an empty stack")
        return self.items.pop()
"""
_READ = """def read_config(path):
    config = {}
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            key, value = line.split("=", 1)
            config[key.strip()] = value.strip()
    return config
"""
CODE = tuple(
    f"{task} Repeat the whole code.\n```python\n{code}```"
    for task, code in (
        ("Rename the class Rectangle to Box.", _SHAPES),
        ("Add a docstring to the class.", _STACK),
        ("Rename the variable config to settings.", _READ),
    )
)
NONSENSE = (
    "ladder quartz yes yes seven marmalade if tractor blue under",
    "9 14 zebra 3 3 81 pillow 7 0 seventeen minus harp",
    "of the the running or violet because spoon at at",
    "Xq lorvash, tin bellow grummet; pahn ostrel vey vey drunt.",
)
PROMPTS = {"chat": CHAT, "code": CODE, "nonsense": NONSENSE}
STRANGER = "stranger"
"""The name of a small model with random weights: a draft of which nothing is kept."""


@dataclass
class Side:
    """One way of decoding a batch of prompts."""

    speculator: Speculator
    seconds: float = float("inf")
    """Least time per token after the first ones."""
    total: float = 0.0
    """Time per token, over all rounds."""
    texts: list[list[int]] = field(default_factory=list)

    def run(self, prompts: list[list[int]], count: int) -> None:
        self.texts = self.speculator.generate(prompts, count)
        found = self.speculator.statistics
        seconds = found.seconds / max(1, found.tokens - len(prompts))
        self.seconds, self.total = min(self.seconds, seconds), self.total + seconds


def encode(model: LoadedModel, prompt: str) -> list[int]:
    """The prompt as the user's turn of a chat."""
    if model.tokenizer is None:
        raise SystemExit(f"{model.name} has no tokenizer")
    turn = [{"role": "user", "content": prompt}]
    found = model.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
    return list(found["input_ids"])


def measure(
    model: LoadedModel,
    plain: Speculator,
    drafting: Speculator,
    batches: list[list[str]],
    count: int,
    rounds: int,
) -> tuple[float, float]:
    """Print a line per batch; returns the speed of drafting over plain decoding, all batches together, by the
    least times and by those of all rounds."""
    totals = [[0.0, 0.0], [0.0, 0.0]]
    for prompts in batches:
        tokens, sides = [encode(model, prompt) for prompt in prompts], (Side(plain), Side(drafting))
        for side in sides:
            side.run(tokens, count)
            side.seconds, side.total = float("inf"), 0.0
        for _ in range(rounds):
            for side in sides:
                side.run(tokens, count)
        new = sum(len(text) - len(row) for text, row in zip(sides[0].texts, tokens, strict=True))
        for i, side in enumerate(sides):
            totals[i][0] += side.seconds * new
            totals[i][1] += side.total * new
        found = drafting.statistics
        rows = zip(tokens, sides[0].texts, sides[1].texts, strict=True)
        other = [_difference(a, b, len(row)) for row, a, b in rows if a != b]
        print(
            f"  {prompts[0][:32]!r:<36} {new:>4} tokens  plain {sides[0].seconds * 1e3:6.1f} ms  drafted "
            f"{sides[1].seconds * 1e3:6.1f} ms  {sides[0].seconds / sides[1].seconds:5.2f}x  "
            f"{found.tokens_per_call:.2f} tokens a call  kept {found.accepted}/{found.drafted}  "
            f"{', '.join(other) or 'same text'}",
            flush=True,
        )
    return totals[0][0] / totals[1][0], totals[0][1] / totals[1][1]


def _difference(a: list[int], b: list[int], prompt: int) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"differs from new token {at - prompt} on"


def stranger(config: Any) -> nn.Module:
    """Two layers of random weights over the same vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    given = config.get_text_config()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    held = {"vocab_size": given.vocab_size, "max_position_embeddings": given.max_position_embeddings}
    module: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, **held)).eval()
    return module


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_speculation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--target", default="exact", metavar="PIPELINE", help="of both sides (default exact)")
    parser.add_argument(
        "--draft",
        nargs="+",
        default=["cpu-int4"],
        help=f"a pipeline, `retrieval`, or `{STRANGER}`, a model of random weights (default cpu-int4)",
    )
    parser.add_argument("--lengths", default="3", metavar="N[,N]", help="tokens drafted a round (default 3)")
    parser.add_argument(
        "--tree", type=int, default=0, metavar="N", help="tokens of a tree, instead of --lengths"
    )
    parser.add_argument(
        "--branches", type=int, default=2, metavar="N", help="tokens that may follow one there"
    )
    parser.add_argument("--prompts", nargs="+", choices=sorted(PROMPTS), default=["chat"])
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="N", help="prompts decoded together"
    )
    parser.add_argument("--tokens", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    options = parser.parse_args(argv)
    fewest = min(len(PROMPTS[name]) for name in options.prompts)
    if not all(1 <= n <= fewest for n in options.batch):
        parser.error(f"--batch = {options.batch}: expected 1 to {fewest}, the prompts")
    model = resolve(options.model)
    # One compiled target for all drafts.
    target = LanguageModel.of(model.module, options.target)
    plain = speculate(target, None)
    for draft in options.draft:
        given = stranger(plain.target.config) if draft == STRANGER else draft
        lengths = [int(n) for n in options.lengths.split(",")]
        drafting = speculate(target, given, lengths=lengths, tree=options.tree, branches=options.branches)
        shape = f"trees of {options.tree}" if options.tree else f"lengths {lengths}"
        for batch, name in itertools.product(options.batch, options.prompts):
            print(
                f"{draft} over {options.target}, {shape}, {name} in batches of {batch}, "
                f"{torch.get_num_threads()} threads"
            )
            prompts = list(PROMPTS[name])
            batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
            least, whole = measure(model, plain, drafting, batches, options.tokens, options.rounds)
            costs = {n: drafting.length.cost(n) for n in drafting.length.lengths}
            shown = ", ".join(f"{n}: {s * 1e3:.1f}" for n, s in costs.items() if s is not None)
            print(
                f"all prompts: {least:.2f}x, all rounds {whole:.2f}x; ms of a round by length: {shown}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
