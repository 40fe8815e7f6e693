"""Every pass that claims to be exact, on its own examples: the program stays the same real function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.compiler import registry
from tilewright.compiler.finite_field import ProgramFunction, prove_equal
from tilewright.compiler.log import Fuel
from tilewright.compiler.passes_base import Tensor
from tilewright.compiler.pipeline import RunOptions, run_pass
from tilewright.compiler.stage import Exactness
from tilewright.frontends.capture import from_dynamo, normalize

EXACT = [name for name, cls in registry.load_all().items() if cls.exactness is not Exactness.APPROXIMATE]
BEYOND_RESIDUES = ("writes in place", "dropout in training", "empty_like")
"""What captured graphs may hold before they are normalized; the proof is then declined, not failed."""

MERGED = ("offload-kv", "relay-attention")
"""Their parts of attention are merged by log-sum-exp, whose maximum and -inf of an empty part no residue has:
out of scope then says that float64 sees no difference."""

DONE_BY_CAPTURE = ("dead-code",)
"""Nothing is left for these on their small examples, as functionalization already removed it."""


class Example(nn.Module):
    """An example whose weights are parameters of a module."""

    def __init__(self, model, values, weights):
        super().__init__()
        self.model, self.given, self.weights = model, values, weights
        self.held = nn.ParameterList(nn.Parameter(values[i], requires_grad=False) for i in weights)

    def forward(self, *inputs):
        rest, held = iter(inputs), iter(self.held)
        return self.model(*(next(held) if i in self.weights else next(rest) for i in range(len(self.given))))


def captured(example):
    """[(graph as captured, program in normal form, reports of normalizing)]"""
    found = []

    def backend(gm, inputs):
        program = from_dynamo(gm, inputs)
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(program.graph, {}))
        before = torch.fx.GraphModule(program.module, graph)
        found.append((before, program, normalize(program)))
        return gm.forward

    generator = torch.Generator().manual_seed(0)
    values = [value.make(generator) if isinstance(value, Tensor) else value for value in example.inputs]
    weights = [i for i, value in enumerate(example.inputs) if isinstance(value, Tensor) and value.weight]
    torch._dynamo.reset()
    with torch.no_grad():
        model = Example(example.model, values, weights)
        torch.compile(model, backend=backend)(*(v for i, v in enumerate(values) if i not in weights))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_pass_keeps_the_function(name):
    cls = registry.find(name)
    proved = 0
    for index, (options, example) in enumerate(cls.examples()):
        if example.training:
            continue
        for before, program, reports in captured(example):
            reports.append(run_pass(cls(**options), program, RunOptions(), Fuel(None)))
            program.module.recompile()
            given = list(program.example_inputs)
            proof = prove_equal(before, ProgramFunction(program), lambda draw, given=given: given, draws=2)
            applied = sum(len(report.applied) for report in reports if report.name == name)
            counts = applied > 0 or name in DONE_BY_CAPTURE
            if proof.verdict == "out-of-scope" and name in MERGED and "merge_attention" in proof.detail:
                proved += counts
            elif proof.verdict == "out-of-scope":
                assert any(reason in proof.detail for reason in BEYOND_RESIDUES), (index, proof)
            else:
                assert proof.verdict == "equal", (index, proof)
                proved += counts
    assert proved > 0, f"{name} was never applied in a proved example"
