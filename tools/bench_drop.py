"""What a decoding step saves without some layers, over the share of the weights that it no longer reads.

All sides decode one token behind the same prefill, in turns; the median over rounds of the ratio of
their times counts. A step reads every weight once, so that share is what dropping layers can save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from tilewright.compiler.blocks import find_blocks
from tilewright.compiler.diagnostics import CaptureError, OptionError
from tilewright.frontends.commands.shared import rewind, timed
from tilewright.frontends.influence import captured_calls
from tilewright.frontends.loaders import resolve

SETS = ("14+25", "13+14+17+25", "12+13+14+15+16+17+25+26")


def shares(model: Any, sets: Sequence[Sequence[int]]) -> list[float]:
    """Of the weights that a step reads, those of each set of layers."""
    program, _ = captured_calls(model.module, [model.example("prefill", length=16)])
    structure = find_blocks(program.graph, program.inputs)
    if structure.refusal:
        raise CaptureError(f"no layers: {structure.refusal}")
    total = len(structure.layers)
    for layers in sets:
        if len(set(layers)) != len(layers) or not all(0 <= n < total for n in layers):
            raise OptionError(f"layers {list(layers)}: expected different numbers, 0 to {total - 1}")
    read = [{n for block in layer.blocks for n in block.parameters} for layer in structure.layers]
    weights = [sum(n.meta["val"].numel() for n in nodes if n.op == "placeholder") for nodes in read]
    module = model.module
    whole = sum(p.numel() for p in module.parameters())
    looked_up = module.get_input_embeddings().weight
    if looked_up is not module.get_output_embeddings().weight:
        whole -= looked_up.numel()
    return [sum(weights[n] for n in layers) / whole for layers in sets]


def compiled(module: Any, pipeline: str, guards: bool) -> Any:
    """The model behind a pipeline, for fixed shapes."""
    options: dict[str, Any] = {"pipeline": pipeline, "replay": False}
    if not guards:  # nothing here changes a module
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    return torch.compile(module, backend="tilewright", options=options, dynamic=False)


def times(model: Any, pipelines: Sequence[str], length: int, rounds: int, guards: bool) -> list[list[float]]:
    """Seconds of a step of each pipeline in every round."""
    args, kwargs = model.example("decode", length=length)
    steps = [compiled(model.module, pipeline, guards) for pipeline in pipelines]

    def once(step: Any) -> None:
        step(*args, **kwargs)
        rewind(kwargs, 1)

    for step in steps:
        once(step)
    return [[timed(partial(once, step)) for step in steps] for _ in range(rounds)]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_drop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "layers", nargs="*", default=SETS, metavar="A+B", help="sets to drop (default: SmolLM2's)"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--base", default="exact", metavar="PIPELINE", help="behind it, and the other side")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="tokens held")
    parser.add_argument("--rounds", type=int, default=100, metavar="N")
    parser.add_argument(
        "--guards", action="store_true", help="also what Dynamo checks of every module before a step"
    )
    given = parser.parse_args(argv)
    if given.rounds < 1:
        raise OptionError(f"--rounds = {given.rounds}: expected at least 1")
    model = resolve(given.model)
    sets = [[int(n) for n in names.split("+")] for names in given.layers]
    parts = shares(model, sets)
    torch._dynamo.reset()
    drops = [f"drop-layers{{layers={names},max_share=1}},{given.base}" for names in given.layers]
    found = times(model, [given.base, *drops], given.length, given.rounds, given.guards)
    whole = statistics.median(whole for whole, *_ in found)
    print(f"{model.name}, {given.base}: {whole * 1e3:.2f} ms a step with all layers", flush=True)
    for i, (names, share) in enumerate(zip(given.layers, parts, strict=True)):
        ratio = statistics.median(others[i] / whole for whole, *others in found)
        print(
            f"without {names}: time x {ratio:.3f}, {1.0 - ratio:.1%} saved by {share:.1%} of the "
            f"weights: {(1.0 - ratio) / share:.2f} of the share",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
