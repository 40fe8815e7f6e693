"""What several commands share: model arguments, progress, formatting. No torch at import."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.cache_argument import cache_in

if TYPE_CHECKING:
    from tilewright.frontends.loaded_model import LoadedModel

MODEL_HELP = (
    "a bundled name (smollm2, tiny-llama, tiny-video-dit, toy-video-dit), a Hugging Face folder, "
    "a .gguf file, or module:factory"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to call it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--weights", metavar="FILE", help="a .safetensors file to load over the module's weights"
    )
    parser.add_argument("--call", metavar="KIND", help="which example call: prefill, decode, denoise, call")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens (or latent frames) of the example call"
    )


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """--pipeline and --fact."""
    parser.add_argument(
        "--pipeline",
        default="exact",
        metavar="P",
        help="'name{option=value},name' or a preset (default: exact)",
    )
    parser.add_argument(
        "--fact", action="append", default=[], metavar="NAME=VALUE", help="give a fact; repeatable"
    )
    parser.add_argument("--no-kernels", action="store_true", help="run every op as its definition")


def load(args: argparse.Namespace) -> LoadedModel:
    """The model of the command line."""
    from tilewright.frontends.loaders import resolve

    with step(f"loading {args.model}"):
        return resolve(args.model, weights=args.weights)


def compile_options(args: argparse.Namespace) -> dict[str, Any]:
    """Backend options from the command line; pipeline and options are checked before any model is loaded."""
    from tilewright.frontends.compile import CompileOptions

    options: dict[str, Any] = {"pipeline": args.pipeline, "facts": parse_facts(args.fact)}
    if args.no_kernels:
        options["kernels"] = False
    if getattr(args, "require", None):
        options["require"] = {k: _count(k, v) for k, v in map(_pair, args.require)}
    CompileOptions.parse(options)
    return options


def parse_facts(texts: list[str]) -> dict[str, Any]:
    """`video_grid=6x16x16` -> {"video_grid": (6, 16, 16)}; whole numbers become ints."""
    return {name: _fact_value(value) for name, value in map(_pair, texts)}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise OptionError(f"expected NAME=VALUE, found {text!r}")
    return name, value


def _count(name: str, text: str) -> int:
    if not text.isdigit():
        raise OptionError(f"--require {name}={text}: expected a whole number")
    return int(text)


def _fact_value(text: str) -> Any:
    parts = text.split("x")
    if all(p.isdigit() for p in parts):
        numbers = tuple(int(p) for p in parts)
        return numbers if len(numbers) > 1 else numbers[0]
    return text


@contextmanager
def step(what: str) -> Iterator[None]:
    """A transient progress line with the time gone by, on stderr and only on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what)
        yield


def rewind(kwargs: dict[str, Any], tokens: int) -> None:
    """Take the last tokens back out of a static cache, so that a decode call can be repeated exactly."""
    for layer in getattr(cache_in(kwargs), "layers", ()):
        layer.cumulative_length.sub_(tokens)


def timed(call: Any) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
