"""The block finder against the configuration of every model of the zoo."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler.blocks import BlockStructure, find_blocks
from tilewright.compiler.program import Program
from tilewright.frontends import compile as compiling
from tilewright.tools.zoo_models import entries, select

NAMES = [entry.name for entry in entries()]
QUICK = ("llama", "gpt-neox", "bert", "t5", "swin")
ONE_ADDITION = "its last stage is one block of one addition, which is no stream"
FEWER = {
    "convnext": (2, ONE_ADDITION),
    "convnextv2": (2, ONE_ADDITION),
}
"""Models in which fewer layers are found than there are, how many, and why."""


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_layers_are_those_of_the_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = select([name])
    found: list[BlockStructure] = []
    derive = compiling.derive_facts

    def note(program: Program) -> None:
        found.append(find_blocks(program.graph, program.inputs))
        derive(program)

    monkeypatch.setattr(compiling, "derive_facts", note)
    torch._dynamo.reset()
    args, kwargs = entry.inputs()
    with entry.capturing(), torch.no_grad():
        options = {"lower": "eager", "kernels": False}
        torch.compile(entry.build(), backend="tilewright", options=options)(*args, **kwargs)
    assert found
    assert sum(len(s.layers) for s in found) == FEWER.get(name, (entry.layers, ""))[0]
    for structure in found:
        # What is no layer is said, and each layer is judged rule by rule.
        assert bool(structure.layers) != bool(structure.refusal)
        for block in structure.blocks:
            assert [v.rule for v in block.legality] == ["L1", "L2", "L3", "L4", "L5", "L6", "L7"]
            assert all(v.ok or v.reason for v in block.legality)
