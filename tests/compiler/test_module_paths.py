"""Module paths and source lines: one form for every capture."""

from __future__ import annotations

import os

import pytest
import torch
from torch import fx, nn

from tilewright.compiler.module_paths import (
    module_path,
    module_stack,
    module_visit,
    normalise_path,
    source_line,
)

SITE = os.path.dirname(os.path.dirname(torch.__file__))


@pytest.mark.parametrize(
    ("spelling", "path"),
    [
        ("L['self'].model.layers.2.self_attn", "model.layers.2.self_attn"),
        ('L["s"].model.layers.2', "model.layers.2"),
        ("L['self'].__dict__['_modules']['transformer_blocks'].0", "transformer_blocks.0"),
        ("L['self']._modules['blocks']._modules['3'].attn", "blocks.3.attn"),
        ("L['self']['blocks'][3]", "blocks.3"),
        ("L['args'][0].model.layers.2", "model.layers.2"),
        ("L['args'][0]._modules['model']._parameters['weight']", "model._parameters.weight"),
        ("L['args'][0]", ""),
        ("L['args'][1]", "1"),
        ("L['models'][0].layers.2", "0.layers.2"),
        ("G['m'].f", "f"),
        ("G['m']", ""),
        ("L['self']", ""),
        ("model.layers.2", "model.layers.2"),
        ("", ""),
    ],
)
def test_spellings_of_a_path(spelling: str, path: str) -> None:
    assert normalise_path(spelling) == path


def node_with(**meta) -> fx.Node:
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta.update(meta)
    return node


def test_stack_keys_carry_the_visit_and_the_root_counts_as_nothing() -> None:
    stack = {"L__self__": ("", "M"), "14001@2": ("L['self'].layers.0", nn.Linear)}
    node = node_with(nn_module_stack=stack)
    assert module_stack(node) == [("", 0), ("layers.0", 2)]
    assert module_path(node) == "layers.0"
    assert module_visit(node) == 2
    assert module_path(node_with()) == ""
    assert module_visit(node_with()) == 0


def test_the_users_frame_wins_over_library_frames() -> None:
    frames = [
        ("app.py", 3),
        (f"{SITE}/transformers/models/llama.py", 40),
        (f"{SITE}/torch/nn/modules/linear.py", 125),
    ]
    text = "".join(f'  File "{file}", line {line}, in f\n    code\n' for file, line in frames)
    assert source_line(node_with(stack_trace=text)) == "app.py:3"
    library = text.split("\n", 2)[2]
    assert source_line(node_with(stack_trace=library)) == f"{frames[1][0]}:40"
    inner = "\n".join(library.split("\n")[2:])
    assert source_line(node_with(stack_trace=inner)) == f"{frames[2][0]}:125"
    assert source_line(node_with()) == ""


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        for _ in range(2):
            x = self.layers[0](x)
        return torch.relu(x)


def linears_of(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if "linear" in str(n.target) and n.op == "call_function"]


def test_export_and_dynamo_agree_on_a_module_that_runs_twice() -> None:
    graphs = [torch.export.export(Shared(), (torch.randn(2, 4),), strict=False).graph]

    def backend(gm, _):
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Shared(), backend=backend)(torch.randn(2, 4))
    assert len(graphs) == 2
    for graph in graphs:
        linears = linears_of(graph)
        assert [module_path(n) for n in linears] == ["layers.0", "layers.0"]
        assert [module_visit(n) for n in linears] == [0, 1]
        assert all(source_line(n).rpartition(":")[0] == __file__ for n in linears)
