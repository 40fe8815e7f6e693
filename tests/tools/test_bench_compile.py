"""Timing first calls: fewer layers of a configuration, and a process with caches of its own for each side."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tilewright.frontends.loaded_model import LoadedModel
from tilewright.tools import bench_compile


def _model() -> LoadedModel:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LoadedModel("tiny", "causal-lm", LlamaForCausalLM(config).eval(), None, {})


def test_other_numbers_of_layers_leave_the_rest_of_the_configuration() -> None:
    model = _model()
    module, (args, kwargs) = bench_compile.with_layers(model, 3)
    assert len(module.model.layers) == 3  # type: ignore[union-attr,arg-type]
    assert model.module.config.num_hidden_layers == 2  # type: ignore[union-attr]
    logits = module(*args, **kwargs).logits
    assert logits.shape == (1, bench_compile.TOKENS, 40)
    torch._dynamo.reset()
    assert bench_compile.first_call(module, (args, kwargs), "tracing", "") > 0.0
    torch._dynamo.reset()


def test_each_side_has_caches_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        seen.append((command, env))
        assert not any(os.path.exists(env[name]) for name in bench_compile.CACHES)
        seconds = 30.0 if "inductor" in command else 9.0
        return subprocess.CompletedProcess(
            command, 0, f'a warning\n{{"seconds": {seconds}, "before": 0.0}}\n'
        )

    used = (SimpleNamespace(ru_utime=float(n), ru_stime=0.0) for n in itertools.count())
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(resource, "getrusage", lambda _: next(used))
    assert bench_compile.main(["smollm2", "--call", "decode"]) == 0
    places = [env[name] for _, env in seen for name in bench_compile.CACHES]
    assert len(set(places)) == len(places) == 6
    assert all("decode" in command for command, _ in seen)
    assert "first call: 0.30 of Inductor's" in capsys.readouterr().out
    seen.clear()
    assert bench_compile.main(["smollm2", "--layers", "2", "24"]) == 0
    assert [c[c.index("--layers") + 1] for c, _ in seen] == ["2", "24", "24"]
    assert "(9.0 - 9.0 s of tracing) / 9.0 = 0.00" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [["3"], ["3", "3"], ["0", "2"]])
def test_bad_numbers_of_layers_are_one_clear_error(layers: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench_compile.main(["smollm2", "--layers", *layers])
    assert "expected two different numbers, 1 or more" in capsys.readouterr().err
