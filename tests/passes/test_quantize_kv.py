"""quantize-kv: what a StaticCache holds afterwards, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.passes_base import Example
from tilewright.compiler.pipeline import Pipeline, RunOptions
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.selftest import capture_example
from tilewright.frontends.compile import REPORTS

SHAPE = (2, 3, 5, 16)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def _keys(cache: Any, tokens: int) -> list[torch.Tensor]:
    return [x[:, :, :tokens] for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_is_within_half_a_step_and_on_few_levels(bits: int) -> None:
    x = drawn(*SHAPE) * 3 + 1
    got = ops.kv_round(x, bits, 0)
    step = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / (2**bits - 1)
    # the zero point is rounded too: a value at an end of the range may move by a whole step
    assert bool(((got - x).abs() <= 1.0001 * step[..., None]).all())
    inner = (x > x.amin(-1, True) + step[..., None]) & (x < x.amax(-1, True) - step[..., None])
    assert bool(((got - x).abs() <= 0.5001 * step[..., None])[inner].all())
    levels = (got / step[..., None]).round()
    torch.testing.assert_close(got, levels * step[..., None])
    assert int(levels.amax() - levels.amin()) < 2 * 2**bits
    assert all(len(row.unique()) <= 2**bits for row in levels.flatten(0, 2))


def test_each_group_has_its_own_scale_and_zeros_stay_zero() -> None:
    x = drawn(*SHAPE)
    x[..., 8:] *= 1000
    whole, grouped = ops.kv_round(x, 4, 0), ops.kv_round(x, 4, 8)
    assert relative_rms(grouped[..., :8], x[..., :8]) < 0.15
    assert relative_rms(whole[..., :8], x[..., :8]) > 0.5
    torch.testing.assert_close(ops.kv_round(x[..., 8:], 4, 8), grouped[..., 8:], rtol=0, atol=0)
    zeros = torch.zeros(SHAPE)
    torch.testing.assert_close(ops.kv_round(zeros, 4, 4, True), zeros, rtol=0, atol=0)


def test_a_rotation_spreads_a_channel_that_stands_out() -> None:
    x = drawn(*SHAPE)
    x[..., 3] += 40
    errors = [relative_rms(ops.kv_round(x, 4, 0, turn)[..., 4:], x[..., 4:]) for turn in (False, True)]
    assert errors[1] < 0.9 * errors[0]
    assert ops.kv_round(x.bfloat16(), 4, 0, True).dtype == torch.bfloat16


@torch.no_grad()
def test_a_cache_holds_rounded_keys_and_values_and_later_calls_read_them() -> None:
    torch._dynamo.reset()
    model = _llama()
    caches = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]  # type: ignore[arg-type]
    for cache in caches:
        cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    prompt, token = torch.arange(7)[None] + 3, torch.tensor([[9]])
    options = {"pipeline": "quantize-kv{bits=4}", "lower": "eager"}
    compiled = torch.compile(model, backend="tilewright", options=options, dynamic=False)
    want = model(prompt, past_key_values=caches[0], use_cache=True).logits
    got = compiled(prompt, past_key_values=caches[1], use_cache=True).logits
    report = next(p for p in REPORTS[-1].passes if p.name == "quantize-kv")
    assert len(report.applied) == 2
    assert any("no memory is saved" in note for note in report.notes)
    assert 1e-3 < relative_rms(got, want) < 0.3
    # the first layer's keys and values are those of the model as it is, rounded; the rest of it is empty
    for plain, stored in zip(_keys(caches[0], 7)[:2], _keys(caches[1], 7)[:2], strict=True):
        torch.testing.assert_close(stored, ops.kv_round(plain, 4, 0), rtol=1e-4, atol=1e-5)
    before = [x.clone() for x in _keys(caches[1], 7)]
    compiled(token, past_key_values=caches[1], use_cache=True)
    for old, now, row in zip(before, _keys(caches[1], 7), _keys(caches[1], 8), strict=True):
        torch.testing.assert_close(now, old, rtol=0, atol=0)
        torch.testing.assert_close(row[:, :, 7:], ops.kv_round(row[:, :, 7:], 4, 0), rtol=1e-4, atol=1e-6)


def test_bad_options_twice_and_a_cache_of_transposed_axes_are_refused() -> None:
    for text in ("bits=5", "group=-1"):
        with pytest.raises(OptionError, match=text.split("=")[0]):
            Pipeline.parse(f"quantize-kv{{{text}}}")

    def run(pipeline: str, model: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
        return Pipeline.parse(pipeline).run(capture_example(Example(model, inputs)), RunOptions())

    def decode(keys: Any, values: Any, k: Any, q: Any, at: Any) -> Any:
        return ops.attention(q, ops.kv_update(keys, k, at, 2), ops.kv_update(values, k, at, 2))

    cache, new, at = drawn(1, 2, 6, 8), drawn(1, 2, 1, 8), torch.tensor([2])
    reports = run("quantize-kv,quantize-kv{bits=4}", decode, (cache, cache + 1, new, new, at))
    assert [len(r.applied) for r in reports[-2:]] == [2, 0]
    assert all("rounded already" in r.reason for r in reports[-1].refused)

    def transposed(keys: Any, values: Any, k: Any, q: Any, at: Any) -> Any:
        turned = ops.kv_update(keys, k.transpose(2, 3), at, 3)
        return ops.attention(q, turned.transpose(2, 3), ops.kv_update(values, k, at, 2))

    (report,) = run("quantize-kv", transposed, (cache.mT.contiguous(), cache, new, new, at))[-1:]
    assert len(report.applied) == 1
    assert len(report.refused) == 1


def test_a_pass_that_did_nothing_says_one_reason() -> None:
    """That nothing was there to look at, or else what it noted itself."""
    program = capture_example(Example(lambda x: x + 1, (drawn(2, 8),)))
    said = {
        "quantize-kv": "no candidate: the program has no tilewright::attention that starts to match",
        "quantize-kv{bits=16}": "16 bits: keys and values stay as they are",
        "drop-layers": "no layer is named: every layer stays",
    }
    for text, note in said.items():
        assert Pipeline.parse(text).run(program, RunOptions())[-1].notes == [note]
    early = Pipeline.parse("early-exit").run(program, RunOptions())[-1].notes
    assert len(early) == 1
    assert early[0].startswith("no layers: ")
