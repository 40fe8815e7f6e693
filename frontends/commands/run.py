"""`tilewright run`: the main job. Generate from a prompt, or run one denoising forward of a video model."""

from __future__ import annotations

import argparse
import time
from typing import Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import Result
from tilewright.frontends.commands.shared import add_model, add_pipeline, compile_options, load, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.add_argument("--prompt", default="The capital of Italy is", help="text to continue")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to generate (default 32)")
    parser.add_argument("--eager", action="store_true", help="run the model as it is, for comparison")


def run(args: argparse.Namespace) -> Result:
    if not 1 <= args.tokens <= 4096:
        raise OptionError(f"--tokens = {args.tokens}: expected 1 to 4096")
    options = compile_options(args)
    model = load(args)
    if model.kind == "causal-lm":
        return _generate(args, model, options)
    return _forward(args, model, options)


def _generate(args: argparse.Namespace, model: Any, options: dict[str, Any]) -> Result:
    import torch

    from tilewright.frontends.compile import REPORTS
    from tilewright.frontends.generation import generate

    if model.tokenizer is None:
        tokens = torch.arange(3, 11)[None]
    elif not args.prompt:
        raise OptionError("--prompt is empty", remedy="give at least one word")
    else:
        tokens = model.tokenizer(args.prompt, return_tensors="pt")["input_ids"]
    forward = (
        model.module if args.eager else torch.compile(model.module, backend="tilewright", options=options)
    )
    with step("generating (the first token compiles)"):
        out = generate(model.module, forward, tokens, args.tokens)
    text = (
        model.tokenizer.decode(out.tokens[0]) if model.tokenizer is not None else str(out.tokens[0].tolist())
    )
    data = {
        "model": model.name,
        "pipeline": "eager" if args.eager else options["pipeline"],
        "text": text,
        "new_tokens": out.new_tokens,
        "first_token_seconds": out.first_token_seconds,
        "tokens_per_second": out.tokens_per_second,
        "applied": {} if args.eager else _applied(REPORTS),
    }
    lines = [text, ""]
    lines.append(
        f"{out.new_tokens} tokens, {out.tokens_per_second:.1f} tokens/s after a first token of "
        f"{out.first_token_seconds:.1f} s (compilation included)"
    )
    lines += [f"{name}: {count} applied" for name, count in data["applied"].items()]
    return Result(data, lines)


def _applied(reports: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for p in reports[-1].passes if reports else ():
        if p.applied:
            counts[p.name] = counts.get(p.name, 0) + len(p.applied)
    return counts


def _forward(args: argparse.Namespace, model: Any, options: dict[str, Any]) -> Result:
    import torch

    from tilewright.compiler.replay import relative_rms, tensors_in
    from tilewright.frontends.compile import REPORTS

    call_args, call_kwargs = model.example(args.call, length=args.length)
    with step("running eager for comparison"), torch.no_grad():
        want = tensors_in(_tensors(model.module(*call_args, **call_kwargs)))[0]
    forward = (
        model.module if args.eager else torch.compile(model.module, backend="tilewright", options=options)
    )
    with step("compiling and running"), torch.no_grad():
        forward(*call_args, **call_kwargs)
        started = time.perf_counter()
        got = tensors_in(_tensors(forward(*call_args, **call_kwargs)))[0]
        seconds = time.perf_counter() - started
    data = {
        "model": model.name,
        "pipeline": "eager" if args.eager else options["pipeline"],
        "shape": list(got.shape),
        "seconds": seconds,
        "difference_to_eager": relative_rms(got, want),
        "applied": {} if args.eager else _applied(REPORTS),
    }
    lines = [
        f"output {tuple(got.shape)} in {seconds:.3f} s, "
        f"{data['difference_to_eager']:.2g} relative RMS from eager"
    ]
    lines += [f"{name}: {count} applied" for name, count in data["applied"].items()]
    return Result(data, lines)


def _tensors(output: Any) -> Any:
    return tuple(output.values()) if hasattr(output, "values") else output
