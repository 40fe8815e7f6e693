"""Block influence of a language model's layers, and perplexity without some of them, on two pieces of a text:
measured on one, checked on the other. Writes the file that `drop-layers{importance=...}` reads.

`--published` prints perplexities of SmolLM2-135M without given layers beside figures that this code did not
measure, on 1,022 positions of Python's own reference (`pydoc_data.topics`: objects, execmodel, naming,
exceptions).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tilewright.compiler.influence import Rule
from tilewright.frontends.api import evaluate
from tilewright.frontends.calibration import token_windows
from tilewright.frontends.commands.evaluate import read_text
from tilewright.frontends.influence import measure_influence, perplexities_without
from tilewright.frontends.loaded_model import Call, LoadedModel
from tilewright.frontends.loaders import resolve

RULES: tuple[Rule, ...] = ("influence", "perplexity", "shifted")
PUBLISHED: dict[tuple[int, ...], float] = {
    (14,): 1.08,
    (14, 25): 1.26,
    (13, 14, 17, 25): 1.63,
    (12, 13, 14, 15, 16, 17, 25, 26): 2.97,
    (27,): 1.34,
    (26, 27): 1.75,
    (24, 25, 26, 27): 1258.0,
}
"""Layers of SmolLM2-135M -> perplexity without them over that of the whole model, 14.1."""


def held_out(model: LoadedModel, calls: Sequence[Call], pipeline: str) -> float:
    """Perplexity ratio of the model behind a pipeline, eager, on other text."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"pipeline": pipeline, "lower": "eager", "kernels": False, "replay": False}
    candidate = torch.compile(model.module, backend="tilewright", options=options, dynamic=False)
    return evaluate(model.module, candidate, calls, labels=True).ratio


def published(model: LoadedModel) -> None:
    """Print the perplexities without the layers of PUBLISHED."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in ("objects", "execmodel", "naming", "exceptions"))
    calls, _ = token_windows(model.tokenizer, text, length=512, samples=2)
    whole = 0.0
    for layers, perplexity in perplexities_without(model.module, calls, PUBLISHED):
        if not layers:
            whole = perplexity
            print(f"whole model: perplexity {whole:.2f} (14.1)", flush=True)
            continue
        names = "+".join(map(str, layers))
        print(f"{names:<26} x {perplexity / whole:.2f} ({PUBLISHED[tuple(layers)]:.2f})", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="drop_table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: a bundled page)")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="samples to measure on")
    parser.add_argument("--check", type=int, default=1, metavar="N", help="samples behind them to check on")
    parser.add_argument("--count", type=int, default=4, metavar="K", help="layers to drop at most")
    parser.add_argument("--pool", type=int, default=12, metavar="N", help="candidates of a greedy step")
    parser.add_argument("--rule", choices=RULES, help="only this rule (default: all)")
    parser.add_argument("--write", metavar="FILE", help="where the importance data goes")
    parser.add_argument(
        "--published", action="store_true", help="only known sets of SmolLM2's layers, beside known figures"
    )
    given = parser.parse_args(argv)
    model = resolve("smollm2" if given.published else given.model)
    if model.tokenizer is None:
        raise SystemExit(f"{model.name} has no tokenizer")
    if given.published:
        published(model)
        return 0
    text, used = read_text(given.text), given.length * given.samples
    calls, source = token_windows(model.tokenizer, text, length=given.length, samples=given.samples)
    rules = [rule for rule in RULES if given.rule in (None, rule)]
    found = measure_influence(
        model.module, calls, count=given.count, rules=rules, pool=given.pool, source=source,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    print("block influence: " + " ".join(f"{v:.3f}" for v in found.influence))
    print(f"perplexity {found.perplexity:.2f} on {source}")
    with TemporaryDirectory() as folder:
        path = Path(given.write or Path(folder) / "importance.json")
        found.save(path)
        other: list[Call] = []
        if given.check:
            other, where = token_windows(
                model.tokenizer, text, length=given.length, samples=given.check, first=used
            )
            print(f"held out: {where}")
        for rule in rules:
            for k in range(1, given.count + 1):
                layers, ratio = found.chosen(k, rule)
                line = f"{rule:<10} k={k}  {'+'.join(map(str, sorted(layers))):<16} x {ratio:.3f}"
                if other and k in (1, 2, given.count):
                    how = f"count={k},rule={rule},importance={path},max_share=1,max_ppl_ratio=1e9"
                    line += f"  held out x {held_out(model, other, f'drop-layers{{{how}}}'):.3f}"
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
