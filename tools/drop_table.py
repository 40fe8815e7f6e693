"""Block influence of a language model's layers, and perplexity without some of them, on two pieces of a text:
measured on one, checked on the other and on texts of their own. Writes the file that
`drop-layers{importance=...}` reads. `--rule linear` drops exactly --count layers and fits what stands in for
them on --fit samples, --written of which the model writes itself; those of --samples choose. --reference:
the text is Python's own reference, and what is checked on besides are the pages of it that --published takes
and the bundled page.

`--published` prints perplexities of SmolLM2-135M without given layers beside figures that this code did not
measure, on 1,022 positions of Python's own reference (`pydoc_data.topics`: objects, execmodel, naming,
exceptions).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.influence import Rule
from tilewright.frontends.api import next_token_loss
from tilewright.frontends.calibration import token_windows
from tilewright.frontends.commands.evaluate import read_text
from tilewright.frontends.influence import logits_in, measure_influence, perplexities_without
from tilewright.frontends.loaded_model import Call, LoadedModel
from tilewright.frontends.loaders import resolve
from tilewright.frontends.stand_ins import measure_stand_ins
from tilewright.tools.fitting_text import PAGES, reference, written

RULES: tuple[Rule, ...] = ("influence", "perplexity", "shifted")
Texts = dict[str, tuple[Sequence[Call], float]]
"""What to check on: name -> samples, and the whole model's perplexity on them."""
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


def held_out(model: LoadedModel, texts: Texts, pipeline: str) -> str:
    """Perplexity ratios of the model behind a pipeline, eager, on other text."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"pipeline": pipeline, "lower": "eager", "kernels": False, "replay": False}
    candidate = torch.compile(model.module, backend="tilewright", options=options, dynamic=False)
    ratios = {name: perplexity(candidate, calls) / whole for name, (calls, whole) in texts.items()}
    return "  ".join(f"{name} x {ratio:.3f}" for name, ratio in ratios.items())


@torch.no_grad()
def perplexity(model: Any, calls: Sequence[Call]) -> float:
    """Of next tokens, over all samples."""
    total, count = 0.0, 0
    for args, kwargs in calls:
        loss, seen = next_token_loss(logits_in(model(*args, **kwargs)), kwargs["input_ids"])
        total, count = total + loss, count + seen
    return math.exp(min(total / count, 700.0))


def published(model: LoadedModel) -> None:
    """Print the perplexities without the layers of PUBLISHED."""
    calls, _ = token_windows(model.tokenizer, reference(PAGES), length=512, samples=2)
    whole = 0.0
    for layers, perplexity in perplexities_without(model.module, calls, PUBLISHED):
        if not layers:
            whole = perplexity
            print(f"whole model: perplexity {whole:.2f} (14.1)", flush=True)
            continue
        names = "+".join(map(str, layers))
        print(f"{names:<26} x {perplexity / whole:.2f} ({PUBLISHED[tuple(layers)]:.2f})", flush=True)


def linear(model: LoadedModel, text: str, given: argparse.Namespace, texts: Texts, file: Path) -> None:
    """Fit, choose and check the maps of rule `linear`."""
    layers = [int(n) for n in given.layers.split("+")] if given.layers else []
    count = given.fit + given.samples - given.written
    calls, source = token_windows(
        model.tokenizer, text, length=given.length, samples=count, every=given.every
    )
    if given.written:
        own = written(model.module, model.tokenizer, given.length * given.written)
        more, _ = token_windows(model.tokenizer, own, length=given.length, samples=given.written)
        calls, source = [*calls, *more], f"{source}, {given.written} samples of its own"
    # Every so many samples one is held out: it is of the same text, not of its end.
    held = {round((i + 0.5) * len(calls) / given.samples) for i in range(given.samples)}
    parts = [[c for i, c in enumerate(calls) if (i in held) == wanted] for wanted in (False, True)]
    found = measure_stand_ins(
        model.module, [*parts[0], *parts[1]], held=len(parts[1]), count=given.count, layers=layers,
        pool=given.pool, source=source, progress=said,
    )  # fmt: skip
    found.save(file)
    names = "+".join(map(str, found.dropped()))
    count = len(found.dropped())
    print(f"linear     k={count}  {names:<16} x {found.ratio:.3f}  ridge {found.ridge:g}  {source}")
    how = f"count={count},rule=linear,importance={file},max_share=1,max_ppl_ratio=1e9"
    print(f"           held out: {held_out(model, texts, f'drop-layers{{{how}}}')}", flush=True)


def ordered(model: LoadedModel, text: str, given: argparse.Namespace, texts: Texts, file: Path) -> None:
    """Measure and check the other rules."""
    calls, source = token_windows(
        model.tokenizer, text, length=given.length, samples=given.samples, every=given.every
    )
    rules = [rule for rule in RULES if given.rule in (None, rule)]
    found = measure_influence(
        model.module, calls, count=given.count, rules=rules, pool=given.pool, source=source, progress=said
    )
    print("block influence: " + " ".join(f"{v:.3f}" for v in found.influence))
    print(f"perplexity {found.perplexity:.2f} on {source}")
    found.save(file)
    for rule in rules:
        for k in range(1, given.count + 1):
            layers, ratio = found.chosen(k, rule)
            line = f"{rule:<10} k={k}  {'+'.join(map(str, sorted(layers))):<16} x {ratio:.3f}"
            if texts and (k in (1, given.count) or k % 2 == 0):
                how = f"count={k},rule={rule},importance={file},max_share=1,max_ppl_ratio=1e9"
                line += f"  held out: {held_out(model, texts, f'drop-layers{{{how}}}')}"
            print(line, flush=True)


def said(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def checks(model: LoadedModel, text: str, given: argparse.Namespace) -> Texts:
    """The texts to check on: what is behind the samples of the text, and other files."""
    fitted = given.fit - given.written if given.rule == "linear" else 0
    used = given.length * given.every * (given.samples + fitted)
    places = [("the same text", text, used)] if given.check else []
    if given.reference:
        places = [("reference pages", reference(PAGES), 0), ("bundled page", read_text(None), 0)]
    places += [(Path(file).stem, read_text(file), 0) for file in given.others]
    found: Texts = {}
    tokenizer: Any = model.tokenizer
    for name, held, first in places:
        most = (len(tokenizer(held, add_special_tokens=False)["input_ids"]) - first) // given.length
        samples = max(1, min(given.check, most))
        calls, where = token_windows(model.tokenizer, held, length=given.length, samples=samples, first=first)
        found[name] = calls, perplexity(model.module, calls)
        print(f"checked on {name}, perplexity {found[name][1]:.2f}: {where}", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="drop_table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="UTF-8 text (default: a bundled page)")
    source.add_argument("--reference", action="store_true", help="Python's own reference as the text")
    parser.add_argument(
        "--others",
        nargs="*",
        default=[],
        metavar="FILE",
        help="other texts to check on",
    )
    parser.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="samples to measure on")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth window is a sample")
    parser.add_argument("--fit", type=int, default=32, metavar="N", help="samples that `linear` is fitted on")
    parser.add_argument(
        "--written", type=int, default=0, metavar="N", help="so many of --fit are written by the model itself"
    )
    parser.add_argument(
        "--check", type=int, default=1, metavar="N", help="at most so many samples of a text to check on"
    )
    parser.add_argument("--count", type=int, default=4, metavar="K", help="layers to drop at most")
    parser.add_argument("--layers", default="", metavar="A+B", help="for `linear` (default: the best run)")
    parser.add_argument("--pool", type=int, default=12, metavar="N", help="candidates of a greedy step")
    parser.add_argument(
        "--rule", choices=(*RULES, "linear"), help="only this rule (default: all that go by an order)"
    )
    parser.add_argument("--write", metavar="FILE", help="where the importance data goes")
    parser.add_argument(
        "--published", action="store_true", help="only known sets of SmolLM2's layers, beside known figures"
    )
    given = parser.parse_args(argv)
    if not 0 <= given.written <= (given.fit if given.rule == "linear" else 0):
        raise OptionError(f"--written = {given.written}: expected 0 to --fit, with --rule linear")
    model = resolve("smollm2" if given.published else given.model)
    if model.tokenizer is None:
        raise SystemExit(f"{model.name} has no tokenizer")
    if given.published:
        published(model)
        return 0
    text = reference() if given.reference else read_text(given.text)
    with TemporaryDirectory() as folder:
        measure = linear if given.rule == "linear" else ordered
        texts = checks(model, text, given)
        measure(model, text, given, texts, Path(given.write or Path(folder) / "importance"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
