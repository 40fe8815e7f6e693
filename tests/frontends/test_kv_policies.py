"""Caches under a policy: exact while all fits, then what a plain loop over NumPy arrays attends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.frontends.kv_policies import QuestLayer, StreamingLayer
from tilewright.passes.memory.quest_kv import QuestKV
from tilewright.passes.memory.streaming_kv import StreamingKV

V, D = 64, 16


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch)
    ids, mask = torch.randint(3, V, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
    for row, padding in enumerate((0, 3, length - 2)[:batch]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: Any, count: int = 30, **how: Any) -> Any:
    return model.generate(**given, max_new_tokens=count, do_sample=False, **how)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("enough", "short"),
    [
        ("streaming-kv{sinks=4,window=46,dense_layers=0}", "streaming-kv{sinks=1,window=4,dense_layers=0}"),
        ("quest-kv{budget=56,page=8,dense_layers=0}", "quest-kv{budget=24,page=8,dense_layers=0}"),
    ],
)
def test_tokens_are_greedy_where_all_fits(batch: int, enough: str, short: str) -> None:
    model, given = make_model(), prompts(batch, 21)
    want = generate(model, given)
    with tw.kv_cache(model, enough) as cache:
        assert torch.equal(generate(model, given, past_key_values=cache), want)
    with tw.kv_cache(model, short) as cache:
        assert not torch.equal(generate(model, given, past_key_values=cache), want), "the policy does nothing"


def filled(layer: PagedLayer, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v) of the newest token of two sequences, the others stored in a layer one by one."""
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, h, length, D) for h in (4, 2, 2))
    with torch.no_grad():
        layer.update(k[:, :, :-1], v[:, :, :-1])
        layer.dense(q[:, :, :-1], None, 0.25)
        layer._fresh = False
        layer.update(k[:, :, -1:], v[:, :, -1:])
    return q[:, :, -1:], k, v


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
    """Stock attention with a mask. kept: bool [B, Hkv, S]."""
    mask = torch.from_numpy(kept).repeat_interleave(2, 1)[:, :, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.25, enable_gqa=True)


@pytest.mark.parametrize("length", [12, 13, 40, 61])
def test_streaming_attends_sinks_and_window(length: int) -> None:
    policy = StreamingKV(sinks=3, window=9, dense_layers=0)
    layer, first = StreamingLayer(0, 8, lambda: None, policy), torch.tensor([0, 2])
    q, k, v = filled(layer, length)
    kept = np.zeros((2, 2, length), dtype=bool)
    for row, begin in enumerate((0, 2)):
        for at in range(begin, length):
            kept[row, :, at] = at < begin + 3 or at >= length - 9
    assert (~kept[0, 0]).sum() == max(0, length - 12)
    torch.testing.assert_close(layer.attend(q, q, q, first, 0.25), masked(q, k, v, kept))
    # The pages that the next token needs are still there, the others are not.
    held = sum(page * 8 < 3 or page * 8 + 8 > length + 1 - 9 for page in range(-(-length // 8)))
    assert sum(number >= 0 for number in layer.view.tables()[0][0].tolist()) == held


def turned(row: np.ndarray, place: int, theta: float) -> np.ndarray:
    """Rotary embedding of one row, pair by pair, in float64."""
    out, half = np.empty(D), D // 2
    for i in range(half):
        angle = place * theta ** (-2 * i / D)
        out[i] = row[i] * np.cos(angle) - row[i + half] * np.sin(angle)
        out[i + half] = row[i + half] * np.cos(angle) + row[i] * np.sin(angle)
    return out


@pytest.mark.parametrize("length", [5, 12, 13, 40, 61, 301])
@pytest.mark.parametrize("sinks", [0, 3])
def test_streaming_counts_positions_in_the_cache(length: int, sinks: int) -> None:
    """Against a loop that rotates kept keys by their place among them, the query as the last of them."""
    theta, window = 100.0, 9
    policy = StreamingKV(sinks=sinks, window=window, dense_layers=0, positions="cache", theta=theta)
    layer, begins = StreamingLayer(0, 8, lambda: None, policy), (0, 2)
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, h, length, D) for h in (4, 2, 2))
    given = torch.empty_like(k)
    for row, begin in enumerate(begins):
        for head in range(2):
            for at in range(length):
                given[row, head, at] = torch.from_numpy(turned(k[row, head, at].numpy(), at - begin, theta))
    asked, want = torch.empty(2, 4, 1, D), torch.empty(2, 4, 1, D)
    for row, begin in enumerate(begins):
        kept = [at for at in range(begin, length) if at < begin + sinks or at >= length - window]
        for head in range(4):
            query = q[row, head, -1].numpy()
            asked[row, head, 0] = torch.from_numpy(turned(query, length - 1 - begin, theta))
            query = turned(query, len(kept) - 1, theta)
            logits = [
                0.25 * query @ turned(k[row, head // 2, at].numpy(), place, theta)
                for place, at in enumerate(kept)
            ]
            shares = np.exp(np.array(logits) - max(logits))
            rows = v[row, head // 2, kept].double().numpy()
            want[row, head, 0] = torch.from_numpy(shares @ rows / shares.sum())
    with torch.no_grad():
        layer.update(given[:, :, :-1], v[:, :, :-1])
        layer._fresh = False
        layer.update(given[:, :, -1:], v[:, :, -1:])
    got = layer.attend(asked, asked, asked, torch.tensor(begins), 0.25)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_in_the_cache_in_half_precision(dtype: torch.dtype) -> None:
    policy = StreamingKV(sinks=3, window=9, dense_layers=0, positions="cache", theta=100.0)
    torch.manual_seed(0)
    rows, found = [torch.randn(2, h, 301, D).to(dtype) for h in (4, 2, 2)], []
    for kind in (dtype, torch.float64):
        layer = StreamingLayer(0, 8, lambda: None, policy)
        q, k, v = (x.to(kind) for x in rows)
        with torch.no_grad():
            layer.update(k, v)
        found.append(layer.attend(q[:, :, -1:], k, v, None, 0.25))
    assert found[0].dtype == dtype
    torch.testing.assert_close(found[0].double(), found[1], atol=2e-2, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_in_the_cache_are_greedy_where_all_fits(batch: int) -> None:
    model, given = make_model(), prompts(batch, 21)
    want = generate(model, given)
    few = "streaming-kv{dense_layers=0,positions=cache,theta=10000,"
    with tw.kv_cache(model, few + "sinks=4,window=46}") as cache:
        assert torch.equal(generate(model, given, past_key_values=cache), want)
    with tw.kv_cache(model, few + "sinks=4,window=12}") as cache:
        moved = generate(model, given, past_key_values=cache)
    with tw.kv_cache(model, "streaming-kv{dense_layers=0,sinks=4,window=12}") as cache:
        assert not torch.equal(generate(model, given, past_key_values=cache), moved)


@torch.no_grad()
@pytest.mark.parametrize("more", ["", ",positions=cache,theta=10000"])
def test_streaming_chunks_are_a_whole_prompt_then_single_tokens(more: str) -> None:
    """Before the first choice chunks attend everything; behind it they attend as their tokens would."""
    model, given = make_model(), prompts(3, 60)
    ids, mask = given["input_ids"], torch.cat([given["attention_mask"], torch.ones(3, 24).long()], 1)
    ids = torch.cat([ids, ids[:, 17:41]], 1)

    def logits(*stops: int) -> tuple[torch.Tensor, list[int]]:
        found, begin = [], 0
        with tw.kv_cache(model, "streaming-kv{sinks=2,window=9,dense_layers=1" + more + "}", page=8) as cache:
            for end in stops:
                places = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
                part = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
                found.append(model(**part, position_ids=places, past_key_values=cache).logits)
                begin = end
            return torch.cat(found, 1)[:, 59:], [layer.view.pool.used for layer in cache.layers]

    want, held = logits(60, *range(61, 85))
    for stops in ((20, 41, 60, 61, 62, 77, 78, 84), (60, 61, 84)):
        got, holds = logits(*stops)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        assert holds == held
    full, _ = logits(60, 84)
    assert not torch.allclose(full, want, atol=1e-2), "a prompt in two parts"


@torch.no_grad()
def test_positions_in_the_cache_are_as_the_same_text_gets_without_the_middle() -> None:
    """One layer attends as if the tokens that were given up had never been."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, initializer_range=0.3,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), prompts(1, 90)["input_ids"]
    short = torch.cat([ids[:, :4], ids[:, -12:]], 1)
    want = model(short).logits[:, -1]
    with tw.kv_cache(
        model, "streaming-kv{sinks=4,window=12,dense_layers=0,positions=cache,theta=10000}"
    ) as cache:
        model(ids[:, :70], past_key_values=cache)
        for at in range(70, 90):
            got = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [24, 25, 64, 77])
@pytest.mark.parametrize("sink_page", [True, False])
def test_quest_attends_the_pages_of_the_greatest_bounds(length: int, sink_page: bool) -> None:
    policy = QuestKV(budget=24, page=8, sink_page=sink_page, dense_layers=0)
    layer, first = QuestLayer(0, 8, lambda: None, policy), torch.tensor([0, 2])
    q, k, v = filled(layer, length)
    rows, keys, pages = q.numpy(), k.numpy(), -(-length // 8)
    kept = np.zeros((2, 2, length), dtype=bool)
    for row, begin in enumerate((0, 2)):
        for head in range(2):
            bounds = []
            for page in range(pages):
                part = keys[row, head, page * 8 : page * 8 + 8]
                low, high = part.min(0), part.max(0)
                bounds.append(
                    max(np.maximum(h * low, h * high).sum() for h in rows[row, 2 * head : 2 * head + 2, 0])
                )
            bounds[-1] = np.inf
            if sink_page:
                bounds[0] = np.inf
            for page in sorted(range(pages), key=lambda p: -bounds[p])[:3]:
                kept[row, head, page * 8 : page * 8 + 8] = True
        kept[row, :, :begin] = False
    if length == 25:
        assert (~kept[0]).sum(1).tolist() == [8, 8], "one page too many: exactly one page goes"
    torch.testing.assert_close(layer.attend(q, q, q, first, 0.25), masked(q, k, v, kept))


@torch.no_grad()
def test_streaming_holds_a_constant_number_of_pages() -> None:
    model, given = make_model(), prompts(1, 20)
    with tw.kv_cache(model, "streaming-kv{sinks=4,window=20,dense_layers=1}", page=8) as cache:
        generate(model, given, 200, past_key_values=cache)
        used = [layer.view.pool.used for layer in cache.layers]
        assert used[0] == 28
        assert max(used[1:]) <= 5
        with pytest.raises(OptionError, match="cannot come back"):
            cache.crop(-1)


def test_misuse_is_named() -> None:
    model = make_model()
    with pytest.raises(OptionError, match="one pass at most, of .*lessismore-kv, .*quest-kv, .*streaming-kv"):
        tw.kv_cache(model, "drop-layers")
    with pytest.raises(OptionError, match="quest-kv has page=16"):
        tw.kv_cache(model, "quest-kv", page=8)
    for text in (
        "quest-kv{budget=40}",
        "quest-kv{budget=32}",
        "streaming-kv{window=0}",
        "streaming-kv{sinks=-1}",
        "streaming-kv{positions=cache}",
        "streaming-kv{theta=10000}",
        "streaming-kv{positions=cache,theta=500000}",
    ):
        with pytest.raises(OptionError, match="expected"):
            tw.kv_cache(model, text)
    assert model.config._attn_implementation == "sdpa"
