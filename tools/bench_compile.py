"""Time the first call of a model where nothing is compiled yet: our pieces, compiled once for all blocks that
are alike, beside whole-graph Inductor. Each side runs in a process and with caches of its own.

`--layers 1 24` instead: models of so many layers with random weights of MODEL's configuration, and what
tracing alone takes with the most layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import fx, nn

from tilewright.compiler.pipeline import RunOptions
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.frontends.loaded_model import Call, LoadedModel
from tilewright.frontends.loaders import resolve

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TILEWRIGHT_CACHE")
SIDES = ("tilewright", "inductor", "tracing")
TOKENS = 32
"""Of a call with `--layers`."""


def traced(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that brings a graph into normal form and runs it as it was."""
    normalize(from_dynamo(gm, inputs), RunOptions(replay=False))
    return gm.forward


def with_layers(model: LoadedModel, layers: int) -> tuple[nn.Module, Call]:
    """A causal language model of the same configuration but so many layers, random weights, and a call."""
    from transformers import AutoModelForCausalLM

    config: Any = copy.deepcopy(model.module.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * layers
    torch.manual_seed(0)
    module: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(config.vocab_size, (1, TOKENS))
    return module, ((), {"input_ids": ids, "use_cache": False})


def first_call(module: nn.Module, call: Call, side: str, pipeline: str) -> float:
    """Seconds of the first call."""
    backends: dict[str, dict[str, Any]] = {
        "tilewright": {"backend": "tilewright", "options": {"pipeline": pipeline}},
        "inductor": {"backend": "inductor"},
        "tracing": {"backend": traced},
    }
    args, kwargs = call
    with torch.no_grad():
        started = time.perf_counter()
        torch.compile(module, dynamic=False, **backends[side])(*args, **kwargs)
        return time.perf_counter() - started


def in_a_process(given: argparse.Namespace, side: str, layers: int) -> tuple[float, float]:
    """(seconds of the first call, processor seconds of the process and what it waited for), empty caches."""
    with TemporaryDirectory() as folder:
        env = {**os.environ, **{name: os.path.join(folder, name.lower()) for name in CACHES}}
        if given.compile_threads:
            env["TORCHINDUCTOR_COMPILE_THREADS"] = str(given.compile_threads)
        command = [sys.executable, "-m", "tilewright.tools.bench_compile", given.model, "--only", side]
        command += ["--pipeline", given.pipeline]
        command += ["--layers", str(layers)] if layers else []
        command += ["--call", given.call] if given.call else []
        command += ["--length", str(given.length)] if given.length else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["seconds"]), busy - float(found["before"])


def only(given: argparse.Namespace) -> None:
    """Print what one side takes, as JSON."""
    model = resolve(given.model)
    layers = given.layers[0] if given.layers else 0
    module, call = with_layers(model, layers) if layers else (model.module, _example(model, given))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = first_call(module, call, given.only, given.pipeline)
    print(json.dumps({"seconds": seconds, "before": used.ru_utime + used.ru_stime}))


def _example(model: LoadedModel, given: argparse.Namespace) -> Call:
    return model.example(given.call, length=given.length)


def compare(given: argparse.Namespace) -> None:
    """Print the sides and how they compare."""
    if given.layers:
        few, many = min(given.layers), max(given.layers)
        rows = [("tilewright", few), ("tilewright", many), ("tracing", many)]
    else:
        rows = [("tilewright", 0), ("inductor", 0)]
    times = []
    for side, layers in rows:
        times.append(in_a_process(given, side, layers))
        name = f"{side}, {layers} layers" if layers else side
        print(f"{name:<24} first call {times[-1][0]:7.1f} s  processor {times[-1][1]:7.1f} s", flush=True)
    for i, what in enumerate(("first call", "processor")):
        values = [t[i] for t in times]
        if given.layers:
            print(f"{what}: ({values[1]:.1f} - {values[2]:.1f} s of tracing) / {values[0]:.1f}", end="")
            print(f" = {(values[1] - values[2]) / values[0]:.2f}")
        else:
            print(f"{what}: {values[0] / values[1]:.2f} of Inductor's")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_compile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--pipeline", default="exact", help="of our side (default exact)")
    parser.add_argument("--call", help="which of the model's example calls")
    parser.add_argument("--length", type=int, metavar="N", help="tokens or frames of it")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[], metavar="N", help="see above; two numbers"
    )
    parser.add_argument(
        "--compile-threads", type=int, default=0, metavar="N", help="of both sides (default torch's)"
    )
    parser.add_argument("--only", choices=SIDES, help="this side, in here")
    given = parser.parse_args(argv)
    if given.only:
        only(given)
        return 0
    if given.layers and (len(set(given.layers)) != 2 or min(given.layers) < 1):
        parser.error(f"--layers = {given.layers}: expected two different numbers, 1 or more")
    compare(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
