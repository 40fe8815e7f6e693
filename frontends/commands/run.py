"""`tilewright run`: the main job. Generate from a prompt, or run one denoising forward of a video model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cli import Result
from tilewright.frontends.commands.evaluate import read_text
from tilewright.frontends.commands.shared import add_model, add_pipeline, compile_options, load, step
from tilewright.frontends.export.artifact import is_artifact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_pipeline(parser)
    parser.epilog = "MODEL may also be a language model exported with --format pt2 --capacity TOKENS."
    parser.add_argument("--prompt", default="The capital of Italy is", help="text to continue")
    parser.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text to continue, instead of --prompt")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to generate (default 32)")
    parser.add_argument("--eager", action="store_true", help="run the model as it is, for comparison")


def run(args: argparse.Namespace) -> Result:
    if not 1 <= args.tokens <= 4096:
        raise OptionError(f"--tokens = {args.tokens}: expected 1 to 4096")
    options = compile_options(args)
    cached = _is_for_the_cache(args.pipeline)
    prompt = read_text(args.prompt_file) if args.prompt_file else args.prompt
    if not prompt:
        raise OptionError("--prompt is empty", remedy="give at least one word")
    if is_artifact(Path(args.model)):
        return _package(args, prompt)
    model = load(args)
    if model.kind == "causal-lm":
        tokens = _prompt(args, model, prompt)
        return _through_cache(args, model, tokens) if cached else _generate(args, model, options, tokens)
    if cached:
        raise OptionError(f"--pipeline = {args.pipeline!r}: {model.name} keeps no keys and values")
    return _forward(args, model, options)


def _is_for_the_cache(pipeline: str) -> bool:
    """Whether a pipeline is of passes that `tilewright.kv_cache` follows."""
    from tilewright.compiler import Pipeline, Stage

    passes = Pipeline.parse(pipeline).passes
    memory = [p.name for p in passes if p.stage is Stage.MEMORY]
    if memory and len(memory) < len(passes):
        raise OptionError(
            f"--pipeline = {pipeline!r}: {', '.join(memory)} guides a cache, the others a compiled graph",
            remedy="name passes of one kind",
        )
    return bool(memory)


def _prompt(args: argparse.Namespace, model: Any, prompt: str) -> Any:
    """Tokens int64 [1, S] that leave room for those to come."""
    import torch

    if model.tokenizer is None:
        return torch.arange(3, 11)[None]
    tokens = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    most = getattr(model.module.config, "max_position_embeddings", None)
    if most is not None and tokens.shape[1] + args.tokens > most:
        raise OptionError(
            f"the prompt has {tokens.shape[1]} tokens: with --tokens = {args.tokens} at most "
            f"{most - args.tokens} fit {model.name}, which reads {most}"
        )
    return tokens


def _through_cache(args: argparse.Namespace, model: Any, tokens: Any) -> Result:
    """Greedy decoding of the model as it is, with the cache that the pipeline describes."""
    import torch

    from tilewright.frontends.kv_cache import kv_cache
    from tilewright.frontends.kv_spec_cache import SpecTier

    with kv_cache(model.module, args.pipeline) as cache, torch.no_grad(), step("generating"):
        started = time.perf_counter()
        decode = _guessed if isinstance(cache.placement, SpecTier) else _greedy
        tokens, times = decode(args, model, tokens, cache)
        moved = {"held_bytes": cache.nbytes, **cache.statistics()}
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    text = model.tokenizer.decode(tokens[0]) if model.tokenizer is not None else str(tokens[0].tolist())
    data = {
        "model": model.name,
        "pipeline": args.pipeline,
        "text": text,
        "prompt_tokens": tokens.shape[1] - len(times),
        "new_tokens": len(times),
        "first_token_seconds": times[0] - started,
        "tokens_per_second": rate,
        "cache": moved,
    }
    lines = [text[-2000:], ""]
    lines.append(
        f"{len(times)} tokens after {data['prompt_tokens']}, {rate:.1f} tokens/s after a first token of "
        f"{data['first_token_seconds']:.1f} s"
    )
    lines.append(f"keys and values: {moved['held_bytes'] / 2**20:.1f} MiB held")
    if moved.keys() > {"held_bytes"}:
        lines[-1] += _moves(moved)
    return Result(data, lines)


class _Clock:
    """A streamer that notes when tokens come, the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def _package(args: argparse.Namespace, prompt: str) -> Result:
    """Greedy `generate()` of transformers over an exported language model."""
    import torch

    from tilewright.frontends.export.artifact import read_manifest
    from tilewright.frontends.export.language_package import load_language_model
    from tilewright.frontends.loaded_model import LoadedModel

    compiled = {"--pipeline": args.pipeline != "exact", "--fact": args.fact, "--no-kernels": args.no_kernels}
    for option, value in {**compiled, "--eager": args.eager, "--weights": args.weights}.items():
        if value:
            raise OptionError(f"{option}: {args.model} was exported, and is compiled already")
    folder = Path(args.model)
    with step(f"loading {args.model}"):
        module = load_language_model(folder)
    tokens = _prompt(args, LoadedModel(folder.name, "causal-lm", module, module.tokenizer, {}), prompt)
    clock = _Clock()
    with step("generating"):
        text = module.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.tokens, do_sample=False,
            streamer=clock,
        )  # fmt: skip
    begun, first, *_, last = [*clock.times, clock.times[-1]]
    new = len(clock.times) - 1
    words = module.tokenizer.decode(text[0]) if module.tokenizer is not None else str(text[0].tolist())
    data = {
        "model": folder.name,
        "pipeline": read_manifest(folder)["pipeline"]["text"],
        "text": words,
        "prompt_tokens": tokens.shape[1],
        "new_tokens": new,
        "first_token_seconds": first - begun,
        "tokens_per_second": (new - 1) / (last - first) if new > 1 else 0.0,
    }
    lines = [words, ""]
    lines.append(
        f"{new} tokens, {data['tokens_per_second']:.1f} tokens/s after a first token of "
        f"{data['first_token_seconds']:.2f} s"
    )
    return Result(data, lines)


def _ends(args: argparse.Namespace, model: Any, times: list[float], token: Any) -> bool:
    """Whether nothing follows `token`, of which the last of `times` tells when it came."""
    return len(times) == args.tokens or (
        model.tokenizer is not None and int(token) == model.tokenizer.eos_token_id
    )


def _greedy(args: argparse.Namespace, model: Any, tokens: Any, cache: Any) -> tuple[Any, list[float]]:
    """(int64 [1, S + new], when each new token came)."""
    import torch

    from tilewright.frontends.cache_argument import cache_arguments

    times: list[float] = []
    latest, given = tokens, cache_arguments(model.module, cache)
    while True:
        logits = model.module(input_ids=latest, logits_to_keep=1, **given).logits
        latest = logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, latest], 1)
        times.append(time.perf_counter())
        if _ends(args, model, times, latest):
            return tokens, times


def _guessed(args: argparse.Namespace, model: Any, tokens: Any, cache: Any) -> tuple[Any, list[float]]:
    """As `_greedy`, a token and a guess at every step."""
    import torch
    from transformers import GenerationConfig

    from tilewright.frontends.kv_spec_generate import generate_with_guesses

    times: list[float] = []

    def stop(ids: Any, _: None) -> Any:
        times.append(time.perf_counter())
        return torch.tensor([_ends(args, model, times, ids[0, -1])])

    def as_is(_: Any, scores: Any) -> Any:
        return scores

    how = GenerationConfig(do_sample=False)
    return generate_with_guesses(model.module, tokens, as_is, stop, how, past_key_values=cache), times


def _moves(moved: dict[str, Any]) -> str:
    """What went between the tiers of a cache, as the end of a sentence."""
    size = {name: f"{value / 2**20:.1f} MiB" for name, value in moved.items() if name.endswith("bytes")}
    size |= {name: f"{moved[name] / 2**20:.0f} MiB" for name in ("bytes_written", "bytes_read")}
    most = f" of at most {size['fast_bytes']}" if "fast_bytes" in moved else ""
    said = (
        f", {size['resident_bytes']}{most} in memory; {moved['slow_tier']}: {size['bytes_written']} written, "
        f"{size['bytes_read']} read; "
    )
    if "fetches" in moved:
        return f"{said}{moved['late']} of {moved['fetches']} fetches came late"
    return f"{said}{moved['hit_rate']:.0%} of extents were there when asked"


def _generate(args: argparse.Namespace, model: Any, options: dict[str, Any], tokens: Any) -> Result:
    import torch

    from tilewright.frontends.compile import REPORTS
    from tilewright.frontends.generation import generate

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
