"""How many drafted tokens SmolLM2-135M keeps, draft by draft, beside a reference not measured by this code.

Four chat prompts, 48 greedy tokens each: every one of the 192 places is the start of a draft of 6 tokens.
The rounds of a draft length are then walked as a generation would walk them. p1 is the share of starts whose
first token is right; a cell is accepted/drafted. `shared` drafts read what the target wrote for the text so
far, `separate` ones what they wrote themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.frontends.drafters import ModelDrafter, RetrievalDrafter
from tilewright.frontends.kv_rows import KVRows
from tilewright.frontends.language_model import LanguageModel
from tilewright.frontends.loaders import resolve
from tilewright.frontends.sampling import Sampling
from tilewright.frontends.speculate import Speculator, speculate
from tilewright.tools.bench_speculation import encode

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that returns the nth Fibonacci number.",
    "Give me three tips for writing a cover letter.",
    "Explain the French Revolution in one paragraph.",
)
STARTS, DRAFTED, LENGTHS = 48, 6, (2, 3, 4, 5, 6)
TOLERANCE = 0.05
_LEAST_INFLUENCE = (14, 25, 13, 17, 12, 26, 15, 16, 3, 9, 11, 6)
"""SmolLM2's layers in ascending order of block influence."""


@dataclass(frozen=True)
class Row:
    """A draft and what was measured elsewhere: p1, then accepted/drafted for each of LENGTHS."""

    name: str
    pipeline: str | None
    """None drafts from the text itself."""
    shared: bool
    expected: tuple[float, ...]


def _drop(count: int, part: str = "all") -> str:
    layers = "+".join(map(str, sorted(_LEAST_INFLUENCE[:count])))
    return f"drop-layers{{layers={layers},part={part},max_share=0.5}}"


def _exit(layer: int) -> str:
    return f"drop-layers{{layers={'+'.join(map(str, range(layer, 30)))},max_share=0.5}}"


def _bits(weight: str) -> str:
    return f"quantize-linear{{weight={weight},group=32}}"


ROWS = (
    Row("drop 1", _drop(1), True, (0.901, 0.84, 0.81, 0.75, 0.71, 0.67)),
    Row("drop 2", _drop(2), True, (0.766, 0.75, 0.64, 0.55, 0.57, 0.51)),
    Row("drop 4", _drop(4), True, (0.656, 0.54, 0.46, 0.40, 0.35, 0.29)),
    Row("drop 6", _drop(6), True, (0.589, 0.47, 0.35, 0.29, 0.24, 0.21)),
    Row("drop 8", _drop(8), True, (0.500, 0.38, 0.30, 0.24, 0.20, 0.18)),
    Row("drop 12", _drop(12), True, (0.453, 0.32, 0.23, 0.19, 0.15, 0.13)),
    Row("drop 1, separate", _drop(1), False, (0.750, 0.63, 0.60, 0.51, 0.46, 0.45)),
    Row("drop 2, separate", _drop(2), False, (0.661, 0.54, 0.46, 0.41, 0.36, 0.32)),
    Row("drop 4, separate", _drop(4), False, (0.589, 0.47, 0.40, 0.33, 0.28, 0.24)),
    Row("drop 6, separate", _drop(6), False, (0.458, 0.35, 0.26, 0.21, 0.17, 0.14)),
    Row("drop 8, separate", _drop(8), False, (0.417, 0.30, 0.22, 0.18, 0.15, 0.12)),
    Row("drop 12, separate", _drop(12), False, (0.141, 0.08, 0.06, 0.04, 0.04, 0.03)),
    Row("exit after 28", _exit(28), True, (0.542, 0.40, 0.34, 0.29, 0.24, 0.21)),
    Row("exit after 25", _exit(25), True, (0.365, 0.24, 0.19, 0.15, 0.12, 0.10)),
    Row("exit after 20", _exit(20), True, (0.109, 0.06, 0.04, 0.03, 0.03, 0.02)),
    Row("exit after 15", _exit(15), True, (0.062, 0.03, 0.02, 0.02, 0.01, 0.01)),
    Row("int4", _bits("int4"), True, (0.807, 0.72, 0.60, 0.57, 0.56, 0.51)),
    Row("int4, drop 1", f"{_drop(1)},{_bits('int4')}", True, (0.755, 0.68, 0.57, 0.48, 0.46, 0.42)),
    Row("int4, drop 2", f"{_drop(2)},{_bits('int4')}", True, (0.667, 0.55, 0.46, 0.37, 0.33, 0.29)),
    Row("int3", _bits("int3"), True, (0.578, 0.43, 0.35, 0.26, 0.23, 0.20)),
    Row("attention of 2", _drop(2, "attention"), True, (0.870, 0.80, 0.77, 0.77, 0.74, 0.67)),
    Row("attention of 4", _drop(4, "attention"), True, (0.812, 0.74, 0.69, 0.67, 0.60, 0.56)),
    Row("attention of 8", _drop(8, "attention"), True, (0.693, 0.56, 0.52, 0.40, 0.35, 0.29)),
    Row("MLP of 2", _drop(2, "mlp"), True, (0.786, 0.73, 0.63, 0.55, 0.51, 0.45)),
    Row("MLP of 4", _drop(4, "mlp"), True, (0.714, 0.62, 0.50, 0.44, 0.38, 0.32)),
    Row("MLP of 8", _drop(8, "mlp"), True, (0.458, 0.33, 0.24, 0.19, 0.15, 0.13)),
    Row("prompt lookup", None, True, (0.094, 0.05, 0.03, 0.02, 0.02, 0.02)),
)


def right_tokens(drafts: Sequence[Sequence[int]], text: Sequence[int]) -> list[int]:
    """How many tokens of each draft agree with the text: draft i begins at text[i]."""
    found = []
    for start, draft in enumerate(drafts):
        right = 0
        while right < len(draft) and draft[right] == text[start + right]:
            right += 1
        found.append(right)
    return found


def walk(right: Sequence[int], length: int) -> tuple[int, int, int]:
    """(tokens accepted, drafted, calls of the target) of a text written in rounds of `length` drafts."""
    at = accepted = drafted = calls = 0
    while at < len(right):
        proposed = min(length, len(right) - at)  # none behind the end of the text
        kept = min(right[at], proposed)
        at, accepted, drafted, calls = at + kept + 1, accepted + kept, drafted + proposed, calls + 1
    return accepted, drafted, calls


def spread(one: KVRows, many: KVRows, held: Sequence[int]) -> None:
    """Row b of `many` holds the first held[b] tokens of the only row of `one`."""
    many.clear()
    many.length = max(held)
    many.held = list(held)
    many.used = torch.arange(many.capacity)[None] < torch.tensor(held)[:, None]
    for source, target in zip(one.cache.layers, many.cache.layers, strict=True):
        if not target.is_initialized:
            target.lazy_initialization(
                *(t.expand(len(held), *t.shape[1:]) for t in (source.keys, source.values))
            )
        target.keys[:, :, : many.length] = source.keys[:, :, : many.length]
        target.values[:, :, : many.length] = source.values[:, :, : many.length]


class Table:
    """The texts of one model, and what drafts make of them."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.prompts = model, prompts
        plain = speculate(model, None, lengths=())
        self.texts = [self._text(plain, prompt) for prompt in prompts]
        self.width = max(len(text) for text in self.texts)
        room = self.width + DRAFTED
        self.one, self.many = (KVRows(model.config, batch, room) for batch in (1, STARTS))

    @staticmethod
    def _text(plain: Speculator, prompt: Sequence[int]) -> list[int]:
        return plain.generate([prompt], STARTS + DRAFTED + 1, stop_tokens=())[0]

    def measure(self, row: Row) -> tuple[float, list[tuple[int, int, int]]]:
        """(p1, walk() summed over the texts for each of LENGTHS)."""
        draft = None
        if row.pipeline is not None:
            torch._dynamo.reset()
            options: dict[str, Any] = {
                "pipeline": row.pipeline,
                "lower": "eager",
                "kernels": False,
                "replay": False,
            }
            draft = LanguageModel.of(
                torch.compile(self.model, backend="tilewright", options=options, dynamic=False), None
            )
        first, sums = 0, [[0, 0, 0] for _ in LENGTHS]
        for prompt, text in zip(self.prompts, self.texts, strict=True):
            # the prompt's own pass gives the first new token: drafts begin behind it
            ends = [len(prompt) + 1 + i for i in range(STARTS)]
            drafts = self._drafts(draft, row.shared, text, ends)
            right = right_tokens(drafts, text[ends[0] :])
            first += sum(n > 0 for n in right)
            for total, length in zip(sums, LENGTHS, strict=True):
                total[:] = map(sum, zip(total, walk(right, length), strict=True))
        return first / (STARTS * len(self.texts)), [(a, b, c) for a, b, c in sums]

    def _drafts(
        self, draft: LanguageModel | None, shared: bool, text: Sequence[int], ends: Sequence[int]
    ) -> list[list[int]]:
        rows = [list(text[:end]) for end in ends]
        if draft is None:
            found = []
            for row in rows:
                lookup = RetrievalDrafter(1, None, 1, 3)
                found.append(lookup.propose([row], [DRAFTED])[0].tokens)
            return found
        writer = LanguageModel.of(self.model, None) if shared else draft
        self.one.clear()
        writer.rows(self.one).feed([list(text)], self.width)
        spread(self.one, self.many, [end - 1 for end in ends])
        drafter = ModelDrafter(draft.rows(self.many), Sampling.of(0.0, 0, 1.0, None), shared=shared)
        return [d.tokens for d in drafter.propose(rows, [DRAFTED] * len(rows))]


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns 0 when every cell lies within the tolerance of the reference, else 1."""
    parser = argparse.ArgumentParser(prog="acceptance_table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", action="append", metavar="NAME", help="only this row; may repeat")
    given = parser.parse_args(argv)
    known = {row.name: row for row in ROWS}
    unknown = sorted(set(given.row or ()) - set(known))
    if unknown:
        parser.error(f"--row {unknown[0]!r}: expected one of {', '.join(known)}")
    loaded = resolve("smollm2")
    table = Table(loaded.module, [encode(loaded, prompt) for prompt in PROMPTS])
    print(f"{'draft':<20} p1 (reference)  " + "".join(f"length {n}: kept, a call  " for n in LENGTHS))
    cells = near = 0
    for name in given.row or known:
        row = known[name]
        first, sums = table.measure(row)
        shares = [first, *(accepted / drafted for accepted, drafted, _ in sums)]
        within = [abs(a - b) <= TOLERANCE for a, b in zip(shares, row.expected, strict=True)]
        cells, near = cells + len(within), near + sum(within)
        line = "".join(
            f"{share:.2f} ({want:.2f}) {1 + accepted / calls:.2f}  "
            for share, want, (accepted, _, calls) in zip(shares[1:], row.expected[1:], sums, strict=True)
        )
        print(f"{name:<20} {first:.3f} ({row.expected[0]:.3f})  {line}", flush=True)
    print(f"{near} of {cells} shares within {TOLERANCE} of the reference; standard error of p1 about 0.03")
    return 0 if near == cells else 1


if __name__ == "__main__":
    sys.exit(main())
