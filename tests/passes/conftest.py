"""Programs of the video transformers of the zoo, captured once."""

from __future__ import annotations

import functools

import pytest
import torch

from tilewright.compiler.facts import derive_facts
from tilewright.compiler.float64 import Float64
from tilewright.compiler.program import Facts, Program
from tilewright.compiler.replay import tensors_in
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.tools import zoo_diffusion


@functools.cache
def _captured(name: str) -> Program:
    entry = next(e for e in zoo_diffusion.entries() if e.name == name)
    programs: list[Program] = []

    def backend(gm, inputs):
        program = from_dynamo(gm, inputs)
        normalize(program)
        programs.append(program)
        return gm.forward

    torch._dynamo.reset()
    args, kwargs = entry.inputs()
    with entry.capturing(), torch.no_grad():
        torch.compile(entry.build(), backend=backend)(*args, **kwargs)
    return max(programs, key=lambda p: len(p.graph.nodes))


@pytest.fixture
def video_program():
    """name of a zoo model -> a fresh copy of its program with its facts."""

    def fresh(name: str) -> Program:
        program = _captured(name).clone()
        program.facts = Facts()
        derive_facts(program)
        return program

    return fresh


@pytest.fixture
def float64_outputs():
    """program -> its outputs in float64."""

    def run(program: Program) -> list[torch.Tensor]:
        program.module.recompile()
        return tensors_in(Float64(program).run_on(program.example_inputs))

    return run
