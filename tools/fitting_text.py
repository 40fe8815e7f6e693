"""Text that maps for dropped layers are fitted on: pages of every Python, and what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

PAGES = ("objects", "execmodel", "naming", "exceptions")
"""Of `pydoc_data.topics`: what `drop_table --published` measures on, and nothing is fitted on."""
OPENINGS = (
    "Once upon a time, in a small village by the sea,",
    "The history of bread begins",
    "She closed the door behind her and",
    "In this lesson we will learn about the planets.",
    "Dear friend, I am writing to tell you",
    "The river rises in the northern mountains and",
    "A good way to learn to cook is",
    "The old man had worked in the harbour for forty years.",
    "Climate is the average of weather over many years.",
    '"I don\'t believe you," said Anna,',
    "The city council announced on Monday that",
    "To understand how a heart works,",
    "The game was almost over when",
    "Many people think that music",
    "The first thing to know about trees is",
    "It was raining when the train arrived.",
)
"""What the model continues, in one batch."""
TEMPERATURE, TOP_P = 0.9, 0.95
LENGTH = 384
"""Tokens written behind each opening."""


def reference(pages: Sequence[str] = ()) -> str:
    """Python's reference: these pages, or all but PAGES."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in (pages or sorted(set(topics) - set(PAGES))))


@torch.no_grad()
def written(module: Any, tokenizer: Any, tokens: int, seed: int = 0) -> str:
    """At least `tokens` tokens of text that a language model writes, the same for each seed.

    module: a Hugging Face causal language model; tokenizer: its own. Continues OPENINGS over and over.
    """
    ends = tokenizer.eos_token_id
    texts: list[str] = []
    rows = [tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in OPENINGS]
    width = max(map(len, rows))
    ids = torch.tensor([[ends] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    count = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while count < tokens:
            found = module.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=True,
                temperature=TEMPERATURE, top_p=TOP_P, top_k=0, pad_token_id=ends,
            )  # fmt: skip
            for text in tokenizer.batch_decode(found, skip_special_tokens=True):
                texts.append(text)
                count += len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return "\n\n".join(texts)
