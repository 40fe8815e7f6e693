"""`tilewright evaluate`: quality and speed of a pipeline beside the model as it is."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import LoadError, OptionError
from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import add_model, add_pipeline, compile_options, load, step

MAX_TEXT_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text for perplexity (default: a bundled page)")
    parser.add_argument(
        "--items", type=int, metavar="N", help="batches of --length tokens (default 4), or requests (1)"
    )
    parser.add_argument(
        "--sweep", choices=("attention", "reuse"), help="toy-video-dit: final latents against dense"
    )
    parser.add_argument(
        "--selectors", action="store_true", help="what rules that choose tokens keep of the attention, at 1/8"
    )
    parser.add_argument("--densities", metavar="D,D", help="of --sweep attention (default 0.5,0.3,0.2,0.1)")
    parser.add_argument("--thresholds", metavar="T,T", help="of --sweep reuse (default: each policy's own)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps of --sweep (default 20, reuse 50)"
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw --sweep as an .svg file")


def run(args: argparse.Namespace) -> Result:
    import torch

    from tilewright.frontends.api import evaluate

    if args.sweep:
        from tilewright.frontends.commands.sweep import run_sweep

        return run_sweep(args)
    for name in ("densities", "thresholds", "steps", "plot"):
        if getattr(args, name) is not None:
            raise OptionError(f"--{name} belongs to --sweep")
    if args.selectors:
        return _selectors(args)
    args.items = 4 if args.items is None else args.items
    if not 1 <= args.items <= 100_000:
        raise OptionError(f"--items = {args.items}: expected 1 to 100000")
    options = compile_options(args)
    text = read_text(args.text)
    model = load(args)
    labels = model.kind == "causal-lm"
    data = _batches(model, text, args) if labels else [model.example(args.call, length=args.length)]
    candidate = torch.compile(model.module, backend="tilewright", options=options)
    with step("compiling"), torch.no_grad():
        candidate(*data[0][0], **data[0][1])
    with step(f"evaluating {len(data)} batches"):
        found = evaluate(model.module, candidate, data, labels=labels)
    row = {"model": model.name, "pipeline": args.pipeline, **dataclasses.asdict(found)}
    lines = [
        f"{found.measure}: baseline {found.baseline:.6g}, candidate {found.candidate:.6g}, "
        f"ratio {found.ratio:.6f}",
        f"time: baseline {found.seconds_baseline:.2f} s, candidate {found.seconds_candidate:.2f} s over "
        f"{found.items} batches",
    ]
    return Result(row, lines)


def _selectors(args: argparse.Namespace) -> Result:
    from tilewright.frontends.selector_table import BUDGET, LENGTH, selector_rows

    if args.pipeline != "exact" or args.text or args.items is not None:
        raise OptionError("--selectors has its own rules and prompts: leave out --pipeline, --text, --items")
    model = load(args)
    with step("attending"):
        rows = selector_rows(model)
    best = sorted(rows, key=lambda r: -r.mass)
    lines = [
        f"{'rule':<26} {'mass':>6} {'least':>6} {'error':>6} {'layers':>6} {'place':>5} {'published':>9}"
    ]
    for r in rows:
        figures = f"{r.mass:>6.3f} {r.least:>6.3f} {r.error:>6.3f} {r.layers:>6} {best.index(r) + 1:>5}"
        lines.append(f"{r.rule:<26} {figures} {r.expected:>9.3f}")
    lines.append(f"{BUDGET} of {LENGTH} tokens, the last query; published: the mass on another prompt")
    data = {"model": model.name, "budget": BUDGET, "length": LENGTH}
    return Result({**data, "rows": [dataclasses.asdict(r) for r in rows]}, lines)


def read_text(path: str | None) -> str:
    """The evaluation text; LoadError when it is no readable UTF-8 file."""
    file = Path(path) if path else Path(__file__).parent.parent / "evaluation_text.txt"
    try:
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise LoadError(f"is larger than {MAX_TEXT_BYTES} bytes", where=str(file))
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except UnicodeDecodeError as error:
        raise LoadError(f"is not UTF-8 text (byte {error.start})", where=str(file)) from error


def _batches(model: Any, text: str, args: argparse.Namespace) -> list[Any]:
    import torch

    length = args.length or 128
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, model.module.config.vocab_size, (length * args.items,), generator=generator)
    else:
        tokens = model.tokenizer(text, return_tensors="pt")["input_ids"][0]
    count = min(args.items, tokens.numel() // length)
    if count < 1:
        raise OptionError(f"the text has {tokens.numel()} tokens, fewer than --length {length}")
    rows = tokens[: count * length].view(count, 1, length)
    return [((), {"input_ids": row.clone(), "use_cache": False}) for row in rows]
