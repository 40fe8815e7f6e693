"""The repeated blocks of a model, and rule by rule whether each may be left out or its result reused."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from tilewright.compiler.blocks import BlockStructure, find_blocks
from tilewright.compiler.pipeline import RunOptions
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.frontends.loaders import resolve


def structure_of(model: LoadedModel, call: str | None, length: int | None) -> BlockStructure:
    """The blocks of the model's largest graph in normal form."""
    found: list[tuple[int, BlockStructure]] = []

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, inputs)
        normalize(program, RunOptions(replay=False))
        found.append((len(program.graph.nodes), find_blocks(program.graph, program.inputs)))
        return gm.forward

    args, kwargs = model.example(call, length=length)
    with torch.no_grad():
        torch.compile(model.module, backend=capture, dynamic=False)(*args, **kwargs)
    return max(found, key=lambda f: f[0])[1] if found else BlockStructure(refusal="nothing was captured")


def lines_of(structure: BlockStructure, *, verbose: bool) -> list[str]:
    """One line per layer: kinds of its steps, the rules it breaks; with `verbose` every rule's reason."""
    if structure.refusal:
        return [f"no layers: {structure.refusal}"]
    lines = []
    for layer in structure.layers:
        for block in layer.blocks:
            broken = [v for v in block.legality if not v.ok]
            said = "; ".join(f"{v.rule}: {v.reason}" for v in broken) or "legal by every rule"
            lines.append(f"{layer.index:>3}  {block.name}  [{' '.join(block.kinds)}]  {said}")
            if verbose:
                lines += [f"       {v.rule} {'ok' if v.ok else 'NO'}  {v.reason}" for v in block.legality]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="block_legality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--call", help="which of the model's example calls")
    parser.add_argument("--length", type=int, metavar="N", help="tokens or frames of it")
    parser.add_argument("--verbose", action="store_true", help="the reason of every rule")
    given = parser.parse_args(argv)
    structure = structure_of(resolve(given.model), given.call, given.length)
    print("\n".join(lines_of(structure, verbose=given.verbose)))
    return 1 if structure.refusal else 0


if __name__ == "__main__":
    sys.exit(main())
