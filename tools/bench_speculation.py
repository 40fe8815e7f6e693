"""Time speculation beside plain decoding by the same compiled target: both take turns on every prompt, in one
process, and the least time per prompt over all rounds counts (the prompt's own pass is left out).

Prompts: chat (nothing to copy) and code editing (most of the answer stands in the prompt), one by one or so
many in a batch. Every text is also compared with the plain one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

import torch

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
PROMPTS = {"chat": CHAT, "code": CODE}


@dataclass
class Side:
    """One way of decoding a batch of prompts."""

    speculator: Speculator
    seconds: float = float("inf")
    """Least time per token after the first ones."""
    texts: list[list[int]] = field(default_factory=list)

    def run(self, prompts: list[list[int]], count: int) -> None:
        self.texts = self.speculator.generate(prompts, count)
        found = self.speculator.statistics
        self.seconds = min(self.seconds, found.seconds / max(1, found.tokens - len(prompts)))


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
) -> float:
    """Print a line per batch; returns the speed of drafting over plain decoding, all batches together."""
    totals = [0.0, 0.0]
    for prompts in batches:
        tokens, sides = [encode(model, prompt) for prompt in prompts], (Side(plain), Side(drafting))
        for side in sides:
            side.run(tokens, count)
            side.seconds = float("inf")
        for _ in range(rounds):
            for side in sides:
                side.run(tokens, count)
        new = sum(len(text) - len(row) for text, row in zip(sides[0].texts, tokens, strict=True))
        for i, side in enumerate(sides):
            totals[i] += side.seconds * new
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
    return totals[0] / totals[1]


def _difference(a: list[int], b: list[int], prompt: int) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"differs from new token {at - prompt} on"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_speculation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--target", default="exact", metavar="PIPELINE", help="of both sides (default exact)")
    parser.add_argument("--draft", default="cpu-int4", help="a pipeline, or `retrieval` (default cpu-int4)")
    parser.add_argument("--lengths", default="3", metavar="N[,N]", help="tokens drafted a round (default 3)")
    parser.add_argument(
        "--tree", type=int, default=0, metavar="N", help="tokens of a tree, instead of --lengths"
    )
    parser.add_argument(
        "--branches", type=int, default=2, metavar="N", help="tokens that may follow one there"
    )
    parser.add_argument("--prompts", choices=sorted(PROMPTS), default="chat")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts decoded together")
    parser.add_argument("--tokens", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    options = parser.parse_args(argv)
    if not 1 <= options.batch <= len(PROMPTS[options.prompts]):
        parser.error(f"--batch = {options.batch}: expected 1 to {len(PROMPTS[options.prompts])}, the prompts")
    model = resolve(options.model)
    lengths = [int(n) for n in options.lengths.split(",")]
    drafting = speculate(
        model.module,
        options.draft,
        pipeline=options.target,
        lengths=lengths,
        tree=options.tree,
        branches=options.branches,
    )
    plain = Speculator(drafting.target, None, type(drafting.length)([0]))
    prompts = list(PROMPTS[options.prompts])
    batches = [prompts[i : i + options.batch] for i in range(0, len(prompts), options.batch)]
    shape = f"trees of {options.tree}" if options.tree else f"lengths {lengths}"
    threads = torch.get_num_threads()
    print(f"{options.draft} over {options.target}, {shape}, batches of {options.batch}, {threads} threads")
    ratio = measure(model, plain, drafting, batches, options.tokens, options.rounds)
    costs = {n: drafting.length.cost(n) for n in drafting.length.lengths}
    shown = ", ".join(f"{n}: {seconds * 1e3:.1f}" for n, seconds in costs.items() if seconds is not None)
    print(f"all prompts: {ratio:.2f}x; ms of a round by length: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
