"""A pass proves itself on its own examples: `selftest(PassClass)`; used for every pass, ours and others'."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tilewright.compiler.canonicalize import canonicalize
from tilewright.compiler.functionalize import functionalize
from tilewright.compiler.passes_base import Example, Tensor
from tilewright.compiler.program import InputKind, InputSpec, Program
from tilewright.compiler.rewrite import trace


def capture_example(example: Example, *, seed: int = 0, canonical: bool = True) -> Program:
    """The program of an example: traced on fake inputs, functional, canonical; tensor inputs become placeholders."""
    generator = torch.Generator().manual_seed(seed)
    values = [v.make(generator) if isinstance(v, Tensor) else v for v in example.inputs]
    places = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor)]
    reals = [values[i] for i in places]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(v) for v in reals]

    def run(*tensors: Any) -> Any:
        filled = list(values)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return example.model(*filled)

    module = trace(run, fakes)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    specs = [
        InputSpec(n.name, InputKind.WEIGHT if getattr(example.inputs[i], "weight", False) else InputKind.USER)
        for n, i in zip(placeholders, places, strict=True)
    ]
    written = functionalize(module).mutated
    for spec in specs:
        spec.mutated = spec.name in written
    if canonical:
        canonicalize(module, training=example.training)
    return Program(module, specs, reals, "example", example.training)
