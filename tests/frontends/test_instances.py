"""Repeated blocks are compiled once and give the results of the whole graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import tilewright.frontends.compile as compile_module
from tilewright.frontends.compile import REPORTS

LAYERS = 5


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def compiled_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Node counts of the graphs handed to Inductor."""
    sizes: list[int] = []
    original = compile_module.compile_graph

    def counted(module, *args):  # type: ignore[no-untyped-def]
        sizes.append(len(module.graph.nodes))
        return original(module, *args)

    monkeypatch.setattr(compile_module, "compile_graph", counted)
    return sizes


@torch.no_grad()
def test_decode_with_state_compiles_one_block(compiled_sizes: list[int]) -> None:
    torch._dynamo.reset()
    model = _llama()
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    prompt = torch.arange(6)[None]
    for cache in caches:
        model(prompt, past_key_values=cache, use_cache=True)
    compiled = torch.compile(model, backend="tilewright", fullgraph=True)
    for token in (7, 8, 9):
        ids = torch.tensor([[token]])
        want = model(ids, past_key_values=caches[0], use_cache=True).logits
        got = compiled(ids, past_key_values=caches[1], use_cache=True).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
    pieces = REPORTS[-1].pieces
    assert max(pieces) >= LAYERS - 1, pieces
    chains = {row["kernel"] for row in REPORTS[-1].kernels if row["kernel"].startswith("chain_")}
    assert len(compiled_sizes) + max(1, len(chains)) == len(pieces) <= 4


@torch.no_grad()
def test_generate_with_a_static_cache_gives_the_same_tokens() -> None:
    torch._dynamo.reset()
    model = _llama()
    arguments = dict(max_new_tokens=6, do_sample=False, cache_implementation="static", pad_token_id=0)
    prompt = torch.arange(7)[None] + 1
    want = model.generate(prompt, **arguments)
    REPORTS.clear()
    model.forward = torch.compile(model.forward, backend="tilewright")  # type: ignore[method-assign]
    assert torch.equal(model.generate(prompt, **arguments), want)
    assert all(max(report.pieces) >= LAYERS - 1 for report in REPORTS)
    assert any(row["kernel"].startswith("chain_") for row in REPORTS[-1].kernels)


@torch.no_grad()
def test_replaced_parameter_of_one_block_is_seen() -> None:
    torch._dynamo.reset()
    model = _llama()
    compiled = torch.compile(model, backend="tilewright", fullgraph=True)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    down = model.model.layers[2].mlp.down_proj
    down.weight = nn.Parameter(down.weight * 1.5)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    down.weight.mul_(0.5)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_dynamic_lengths_share_one_compilation(compiled_sizes: list[int]) -> None:
    torch._dynamo.reset()
    model = _llama()
    compiled = torch.compile(model, backend="tilewright", fullgraph=True)
    for length in (7, 11, 30):
        ids = torch.arange(length)[None]
        torch._dynamo.mark_dynamic(ids, 1)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(REPORTS[-1].pieces) == len(compiled_sizes) > 0


class _Stack(nn.Module):
    """Blocks that keep every intermediate, and return one of them, an input and a view."""

    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for layer in self.layers:
            y = torch.sin(layer(x)) * torch.cos(x) + torch.tanh(x).sum(-1, keepdim=True)
            x = x + torch.relu(y) * torch.sigmoid(y - 1) - torch.exp(-y * y)
            kept.append(x)
        return x, kept[2], x.reshape(-1), torch.stack(kept)


@torch.no_grad()
def test_intermediate_results_survive() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = _Stack()
    x = torch.randn(3, 8)
    got = torch.compile(model, backend="tilewright", fullgraph=True)(x)
    assert REPORTS[-1].pieces
    for a, b in zip(got, model(x), strict=True):
        torch.testing.assert_close(a, b)


def test_training_is_compiled_whole() -> None:
    torch._dynamo.reset()
    model = _Stack()
    x = torch.randn(3, 8)
    torch.compile(model, backend="tilewright", fullgraph=True)(x)[0].sum().backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert REPORTS[-1].pieces == []
    model.zero_grad()
    model(x)[0].sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-3)
