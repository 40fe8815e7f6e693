"""The benchmark of speculation over a tiny model: a useless draft is compared on equal terms."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tilewright.frontends.loaded_model import LoadedModel
from tilewright.frontends.speculate import speculate
from tilewright.tools import bench_speculation


class _Letters:
    """A tokenizer of letters."""

    def apply_chat_template(self, turn: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 40 for c in turn[0]["content"]]}


@pytest.fixture
def model() -> LoadedModel:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LoadedModel("tiny", "causal-lm", LlamaForCausalLM(config).eval(), _Letters(), {})


def test_both_sides_write_the_same_and_both_ratios_are_of_whole_runs(model: LoadedModel, capsys: Any) -> None:
    draft = bench_speculation.stranger(model.module.config)
    assert draft.config.vocab_size == 40  # type: ignore[union-attr]
    drafting, plain = speculate(model.module, draft, lengths=(2,)), speculate(model.module, None)
    least, whole = bench_speculation.measure(model, plain, drafting, [["ab", "cde"], ["fgh"]], 6, 2)
    assert least > 0.0
    assert whole > 0.0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all("same text" in line for line in said)


def test_a_batch_larger_than_the_prompts_is_one_clear_error(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench_speculation.main(["--prompts", "chat", "code", "--batch", "4"])
    assert "expected 1 to 3, the prompts" in capsys.readouterr().err
