"""The share of a step that dropped layers save, and the text that their stand-ins are fitted on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.loaders import resolve
from tilewright.tools import bench_drop, drop_table, fitting_text


def test_the_share_of_a_layer_is_that_of_its_weights() -> None:
    model = resolve("tiny-llama")
    module: Any = model.module
    layers = module.model.layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    read = sum(sizes) + module.lm_head.weight.numel() + module.model.norm.weight.numel()
    found = bench_drop.shares(model, [[0], list(range(len(layers)))])
    assert found == [sizes[0] / read, sum(sizes) / read]
    with pytest.raises(OptionError, match=r"layers \[0, 0\]: expected different numbers, 0 to "):
        bench_drop.shares(model, [[0, 0]])


def test_a_line_for_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_drop.main(["0", "0+1", "--model", "tiny-llama", "--length", "8", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["tiny-llama, exact", "without 0", "without 0+1"]


@torch.no_grad()
def test_weights_are_watched_without_the_guards_on_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)).eval()
    step, x = bench_drop.compiled(model, "cpu-int4", guards=False), torch.randn(1, 64)
    first = step(x)
    model[0].weight.mul_(-1.0)
    second = step(x)
    assert (first - second).abs().max() > 0.1
    torch._dynamo.reset()
    torch.testing.assert_close(bench_drop.compiled(model, "cpu-int4", guards=True)(x), second)


def test_nothing_is_fitted_on_the_pages_that_are_checked_on() -> None:
    checked, fitted = fitting_text.reference(fitting_text.PAGES), fitting_text.reference()
    assert len(checked) > 20_000
    assert len(fitted) > 200_000
    assert checked[:500] not in fitted


def test_a_model_writes_the_same_text_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve("smollm2")
    monkeypatch.setattr(fitting_text, "LENGTH", 6)
    monkeypatch.setattr(fitting_text, "OPENINGS", fitting_text.OPENINGS[:2])
    state = torch.get_rng_state()
    text, again, other = (fitting_text.written(model.module, model.tokenizer, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert text == again != other
    assert text.count(fitting_text.OPENINGS[0]) == text.count(fitting_text.OPENINGS[1]) >= 1
    tokenizer: Any = model.tokenizer
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= 20


def test_more_of_its_own_than_all_is_refused() -> None:
    with pytest.raises(OptionError, match="--written = 9: expected 0 to --fit, with --rule linear"):
        drop_table.main(["tiny-llama", "--rule", "linear", "--fit", "8", "--written", "9"])
    with pytest.raises(OptionError, match="--written = 1"):
        drop_table.main(["tiny-llama", "--written", "1"])
