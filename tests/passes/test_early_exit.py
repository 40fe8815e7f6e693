"""Tokens leave where their score says so, alone and in a batch; later tokens find their keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import tilewright.frontends.compile as compile_module
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.exit_scores import certainty, confidence, saturation
from tilewright.frontends.compile import REPORTS, CompileOptions
from tilewright.runtime.exit_counts import counting_exits

LAYERS = 6
PROMPTS = torch.tensor([[5, 9, 3, 5], [7, 1, 2, 8], [4, 4, 30, 11]])
CALLS: list[int] = []


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    CALLS.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def plain_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces run as they are, without Inductor; each counts its linear layers."""

    def plain(gm: Any, *_: Any) -> Any:
        heavy = sum("linear" in str(n.target) for n in gm.graph.nodes)

        def run(*args: Any) -> Any:
            CALLS.append(heavy)
            return gm.forward(*args)

        return run

    monkeypatch.setattr(compile_module, "compile_graph", plain)


def _llama() -> Any:
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def _compiled(model: Any, text: str, **options: Any) -> Any:
    given = {"pipeline": f"early-exit{{{text}}}", "kernels": False, "replay": False, **options}
    return torch.compile(model, backend="tilewright", options=given, dynamic=False)


def _cache(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=32)


@torch.no_grad()
def _steps(model: Any, step: Callable[..., Any], rows: Tensor, cache: Any, count: int = 5) -> list[Tensor]:
    """Logits of greedy steps behind the prompts, which `model` itself runs."""
    logits = model(input_ids=rows, past_key_values=cache, use_cache=True).logits
    found = []
    for i in range(count):
        ids = logits[:, -1:].argmax(-1)
        place = torch.full_like(ids, rows.shape[1] + i)
        logits = step(input_ids=ids, position_ids=place, past_key_values=cache, use_cache=True).logits.clone()
        found.append(logits)
    return found


@contextmanager
def _leaving(model: Any, exits: list[int], measure: str, threshold: float) -> Iterator[list[Tensor]]:
    """The definition, by hooks on the modules: tokens that have left pass through layers unchanged.

    Gives the active tokens [B, S] at each exit, of all calls of one token."""
    seen: list[Tensor] = []
    state: dict[str, Any] = {}

    def behind(number: int) -> Callable[..., Any]:
        def hook(_: Any, args: Any, out: Tensor) -> Tensor:
            x = args[0]
            if x.shape[1] > 1:
                return out
            if number > exits[0]:
                out = torch.where(state["active"][..., None], out, x)
            if number in exits:
                logits = model.lm_head(model.model.norm(out))
                by = {"saturation": lambda: saturation(out, x), "confidence": lambda: confidence(logits)}
                score = by.get(measure, lambda: certainty(logits))()
                before = state["active"] if number > exits[0] else torch.ones_like(score, dtype=torch.bool)
                state["active"] = before & ~(score > threshold)
                seen.append(state["active"])
            return out

        return hook

    hooks = [layer.register_forward_hook(behind(i + 1)) for i, layer in enumerate(model.model.layers)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _check_caches(got: Any, want: Any) -> None:
    for a, b in zip(got.layers, want.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-5)
        assert int(a.cumulative_length) == int(b.cumulative_length)


SETTINGS = {"saturation": 0.73, "confidence": 0.03, "entropy": 0.1}


QUICK = {("saturation", 3, "inductor")}
CASES = [(m, rows, lower) for m in SETTINGS for rows in (1, 3) for lower in ("inductor", "eager")]


@pytest.mark.parametrize(
    ("measure", "rows", "lower"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)
def test_tokens_leave_and_their_keys_come_from_the_state_they_left_with(
    measure: str, rows: int, lower: str, plain_pieces: None
) -> None:
    model, threshold = _llama(), SETTINGS[measure]
    compiled = _compiled(model, f"exits=2+4,measure={measure},threshold={threshold}", lower=lower)
    ours, theirs = _cache(model), _cache(model)
    with counting_exits() as counts:
        got = _steps(model, compiled, PROMPTS[:rows], ours)
    assert not any(r.refused for p in REPORTS[-1].passes if p.name == "early-exit" for r in p.refused)
    with _leaving(model, [2, 4], measure, threshold) as active:
        want = _steps(model, model, PROMPTS[:rows], theirs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    _check_caches(ours, theirs)
    left = [int((~a).sum()) for a in active]
    assert counts.left == {0: sum(left[::2]), 1: sum(left[1::2])}
    assert counts.layers == {0: 2, 1: 2}
    assert counts.skipped == {0: sum(n == rows for n in left[::2]), 1: sum(n == rows for n in left[1::2])}
    assert 0 < sum(left) < len(left) * rows, f"the setting proves nothing: {left}"


@pytest.mark.slow
@pytest.mark.parametrize("exits", ["2+4", "2"])
def test_what_is_left_out_does_not_run(exits: str, plain_pieces: None) -> None:
    """7 linear layers a layer, 2 of them for keys and values, and the head."""
    model = _llama()
    ran = {}
    for threshold in (0.0, 1.0):
        torch._dynamo.reset()
        _steps(model, _compiled(model, f"exits={exits},threshold={threshold}"), PROMPTS[:1], _cache(model), 1)
        ran[threshold] = sum(CALLS)
        CALLS.clear()
    assert ran == {0.0: 2 * 7 + 4 * 2 + 1, 1.0: 6 * 7 + 1}


@pytest.mark.slow
@pytest.mark.parametrize("lower", ["inductor", "eager"])
def test_a_threshold_of_one_is_the_program_bit_for_bit(lower: str, plain_pieces: None) -> None:
    model, found = _llama(), []
    for text in ("exits=2+4,threshold=1.0", "threshold=1.0"):
        torch._dynamo.reset()
        found.append(_steps(model, _compiled(model, text, lower=lower), PROMPTS, _cache(model)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_prompts_run_through_all_layers_unless_asked(plain_pieces: None) -> None:
    model = _llama()
    with torch.no_grad(), counting_exits() as counts:
        _compiled(model, "exits=2")(input_ids=PROMPTS, use_cache=False)
        assert counts.tokens == 0
        refused = [r.reason for p in REPORTS[-1].passes for r in p.refused if p.name == "early-exit"]
        assert refused == ["4 tokens in a call: prompts run through all layers (prompt=true)"]
        torch._dynamo.reset()
        _compiled(model, "exits=2,prompt=true")(input_ids=PROMPTS, use_cache=False)
        assert counts.tokens == PROMPTS.numel()


@pytest.mark.slow
@pytest.mark.parametrize("lower", ["inductor", "eager"])
def test_a_prompt_that_may_leave_gives_what_single_tokens_give(lower: str, plain_pieces: None) -> None:
    """What quality is measured on is what decoding does; the first call makes the cache and returns it."""
    model = _llama()
    options = "exits=2+4,threshold=0.73"
    compiled = _compiled(model, options, lower=lower)
    cache, rows = _cache(model), PROMPTS.repeat(1, 3)
    found = []
    with torch.no_grad():
        for i in range(rows.shape[1]):
            place = torch.full((len(rows), 1), i)
            step = rows[:, i : i + 1].clone()
            got = compiled(input_ids=step, position_ids=place, past_key_values=cache, use_cache=True)
            found.append(got.logits.clone())
            notes = [n for p in REPORTS[-1].passes if p.name == "early-exit" for n in p.notes]
            assert any("no block is ever left out" in n for n in notes) == (i == 0 or lower == "eager")
        torch._dynamo.reset()
        whole = _compiled(model, f"{options},prompt=true", lower="eager")
        want = whole(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exits=3+2", "ascending numbers from 1"),
        ("exits=0", "ascending numbers from 1"),
        ("exits=2;3", "expected numbers joined by"),
        ("threshold=1.5", "expected 0 to 1"),
        ("threshold=nan", "finite number"),
        ("exits=2,measure=policy", "measure=policy needs a file"),
        ("exits=2,policy=x.json", "only measure=policy reads"),
        ("exits=2,measure=feeling", "one of saturation, confidence"),
    ],
)
def test_bad_options_are_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CompileOptions.parse({"pipeline": f"early-exit{{{text}}}"})


@pytest.mark.slow
def test_an_exit_that_the_model_does_not_have(plain_pieces: None) -> None:
    model = _llama()
    with pytest.raises(Exception, match="exit after 6 layers: the model has 6, and the last is no exit"):
        _steps(model, _compiled(model, "exits=6"), PROMPTS, _cache(model), 1)


@pytest.mark.parametrize("prompt", ["false", "true"])
def test_coupled_streams_are_refused_by_name(prompt: str, plain_pieces: None) -> None:
    """Image and text of FLUX go through a layer together."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    text = f"early-exit{{exits=2,threshold=0.1,prompt={prompt}}}"
    compiled: Any = torch.compile(model, backend="tilewright", options={"pipeline": text, "lower": "eager"})
    given = {
        "hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 10), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given)[0], model(**given)[0])
    (reason,) = [r.reason for p in REPORTS[-1].passes for r in p.refused if p.name == "early-exit"]
    assert "transformer_blocks.1" in reason
    assert "coupled streams: tokens leave one stream, behind the last coupled layer" in reason
