"""drop-layers is deleting the modules, bit for bit, with and without a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.compile import REPORTS

SMALL: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def _llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_key_value_heads=2, use_cache=False, **SMALL
    )
    return LlamaForCausalLM(config).eval()


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=6, n_head=4, use_cache=False)).eval()


def _bert() -> nn.Module:
    return BertModel(BertConfig(hidden_size=32, intermediate_size=48, **SMALL)).eval()


MODELS = {
    "llama": (_llama, lambda m: m.model.layers),
    "gpt2": (_gpt2, lambda m: m.transformer.h),
    "bert": (_bert, lambda m: m.encoder.layer),
}


def _compiled(model: nn.Module, pipeline: str) -> Any:
    options = {"pipeline": pipeline, "lower": "eager", "kernels": False}
    return torch.compile(model, backend="tilewright", fullgraph=True, options=options)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        (name, dropped) if dropped == (2, 3, 4) else pytest.param(name, dropped, marks=pytest.mark.slow)
        for name in MODELS
        for dropped in ((3,), (1, 2), (2, 3, 4))
    ],
)
def test_equal_to_deleting_the_modules(name: str, dropped: tuple[int, ...]) -> None:
    build, layers_of = MODELS[name]
    model = build()
    ids = torch.arange(7)[None] + 3
    text = "+".join(map(str, dropped))
    shorter = copy.deepcopy(model)
    for i in reversed(dropped):
        del layers_of(shorter)[i]
    plain = _first(_compiled(shorter, "dead-code")(ids))
    torch._dynamo.reset()
    got = _first(_compiled(model, f"drop-layers{{layers={text},max_share=0.5}}")(ids))
    assert torch.equal(got, plain)
    assert len(REPORTS[-1].passes[-1].applied) == len(dropped)
    assert not torch.equal(got, _first(model(ids)))


@torch.no_grad()
def test_half_layers() -> None:
    model = _llama()
    ids = torch.arange(7)[None] + 3
    for part, module in (("attention", "self_attn"), ("mlp", "mlp")):
        torch._dynamo.reset()
        silent = copy.deepcopy(model)
        block = getattr(silent.model.layers[2], module)  # type: ignore[union-attr,index]
        last = block.o_proj if part == "attention" else block.down_proj
        last.weight.zero_()
        got = _compiled(model, f"drop-layers{{layers=2,part={part}}}")(ids).logits
        torch.testing.assert_close(got, silent(ids).logits, rtol=1e-5, atol=1e-6)
        assert len(REPORTS[-1].passes[-1].applied) == 1


@torch.no_grad()
def test_a_dropped_layer_leaves_its_cache_alone() -> None:
    model = _llama()
    cache = StaticCache(config=model.config, max_cache_len=12)  # type: ignore[arg-type]
    prompt, token = torch.arange(5)[None] + 3, torch.tensor([[9]])
    model(prompt, past_key_values=cache, use_cache=True)
    before = [layer.keys.clone() for layer in cache.layers]  # type: ignore[union-attr]
    _compiled(model, "drop-layers{layers=3}")(token, past_key_values=cache, use_cache=True)
    changed = [not torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True)]  # type: ignore[arg-type]
    assert changed == [True, True, True, False, True, True]


@torch.no_grad()
def test_impossible_choices_are_errors() -> None:
    model, ids = _llama(), torch.arange(4)[None]
    for text, message in (
        ("layers=6", "the model has 6 layers"),
        ("layers=1+2+3", "more than max_share"),
        ("layers=1-2", "numbers joined by"),
        ("layers=1+1", "named twice"),
        ("layers=1,max_share=2", "expected 0 to 1"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message) as caught:
            _compiled(model, f"drop-layers{{{text}}}")(ids)
        chain = [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
        assert any(isinstance(e, OptionError) for e in chain)
