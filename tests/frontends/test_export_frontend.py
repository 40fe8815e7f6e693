"""torch.export and torch.compile reach the same normal form."""

import pytest
import torch
from torch import nn

from tilewright.compiler.graph import print_graph, structural_difference
from tilewright.compiler.program import InputKind, Program
from tilewright.compiler.replay import relative_rms, tensors_in
from tilewright.frontends.capture import from_export, normalize
from tilewright.frontends.parity_check import captured_program


def tiny_llama() -> tuple[nn.Module, dict]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=97,
        head_dim=8,
    )
    tokens = torch.randint(0, 97, (1, 7), generator=torch.Generator().manual_seed(1))
    return LlamaForCausalLM(config).eval(), {"input_ids": tokens, "use_cache": False}


def exported_program(module: nn.Module, kwargs: dict) -> Program:
    with torch.no_grad():
        exported = torch.export.export(module, (), kwargs, strict=False)
    program = from_export(exported)
    normalize(program)
    return program


def by_tensor(a: Program, b: Program) -> dict[str, str]:
    """Inputs of a -> inputs of b: weights by identity, the others by position."""
    where = {
        id(v): s.name for s, v in zip(b.inputs, b.example_inputs, strict=True) if isinstance(v, torch.Tensor)
    }
    users = [s.name for s in b.inputs if s.kind is InputKind.USER]
    feed = iter(users)
    return {
        s.name: where[id(v)] if id(v) in where and s.kind is InputKind.WEIGHT else next(feed)
        for s, v in zip(a.inputs, a.example_inputs, strict=True)
        if any(n.name == s.name and n.users for n in a.graph.nodes)
    }


@pytest.fixture
def programs() -> tuple[Program, Program]:
    module, kwargs = tiny_llama()
    torch._dynamo.reset()
    return captured_program(module, (), kwargs), exported_program(module, kwargs)


def test_one_normal_form(programs: tuple[Program, Program]) -> None:
    dynamo, export = programs
    difference = structural_difference(dynamo.module, export.module, by_tensor(dynamo, export))
    assert difference is None, difference


def test_a_changed_constant_is_a_difference(programs: tuple[Program, Program]) -> None:
    dynamo, export = programs
    node = next(n for n in export.graph.nodes if "rms_norm" in str(n.target))
    node.args = (*node.args[:2], 1e-3, *node.args[3:])
    assert structural_difference(dynamo.module, export.module, by_tensor(dynamo, export)) is not None


def test_the_exported_program_computes_the_model() -> None:
    module, kwargs = tiny_llama()
    program = exported_program(module, kwargs)
    with torch.no_grad():
        got = tensors_in(program.module(*program.example_inputs))[0]
        want = module(**kwargs).logits
    assert relative_rms(got, want) < 2e-6
    text = print_graph(program.graph)
    assert text.count("tilewright.attention") == 2
    assert text.count("tilewright.rms_norm") == 5
