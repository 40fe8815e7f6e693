"""Decode steps of a package that write keys and values into the caller's buffers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import ParityError
from tilewright.frontends.example_calls import causal_lm_examples
from tilewright.frontends.export import pt2_export
from tilewright.frontends.export.package import load_package
from tilewright.frontends.export.package_weights import Weights
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.kernels.table import host_target

needs_kernels = pytest.mark.skipif(host_target().arch == "generic", reason="no kernels for this CPU")
AGAIN = """
import sys, torch
from transformers import StaticCache
from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.compile import REPORTS
from tilewright.frontends.export.package import load_package
sys.path.insert(0, sys.argv[2])
from test_pt2_held import CAPACITY, deep
load_package(sys.argv[1], "decode")
module = deep().module
options = {"pipeline": "exact", "lower": "eager"}
compiled = torch.compile(module, backend="tilewright", options=options, dynamic=False)
given = cache_arguments(module, StaticCache(config=module.config, max_cache_len=CAPACITY))
with torch.no_grad():
    module(input_ids=torch.tensor([[5]]), **given)
    compiled(input_ids=torch.tensor([[6]]), position_ids=torch.tensor([[1]]), **given)
assert any(row["kernel"].startswith("chain_") for row in REPORTS[-1].kernels)
print("both ran")
"""
"""The backend builds a chain that the package brought: loading it twice would end the process."""
CAPACITY, START, STEPS = 48, 41, 6


def deep() -> LoadedModel:
    """Layers enough for a decode step to run in chains."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=97, head_dim=16, max_position_embeddings=200,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    return LoadedModel("deep", "causal-lm", module, None, causal_lm_examples(module))


@needs_kernels
@pytest.mark.slow
def test_steps_write_into_the_buffers_of_each_session(tmp_path: Path) -> None:
    model = deep()
    manifest = tw.export(model, pipeline="exact", path=tmp_path / "out", format="pt2", capacity=CAPACITY)
    row = manifest["entries"][1]
    assert row["written"] == [f"past.{i}.{part}" for i in range(4) for part in ("key", "value")]
    assert [made["name"] for made in row["outputs"]] == ["logits"]
    assert row["parity"]["example"]["program"] < 1e-5
    assert any("chain_" in name for name in row["operators"])
    step, prefill = (load_package(tmp_path / "out", name) for name in ("decode", "prefill"))
    torch.manual_seed(1)
    texts = [torch.randint(0, 97, (1, START + STEPS)) for _ in range(2)]
    held = [buffers_after(prefill, tokens) for tokens in texts]
    for at in range(START, START + STEPS):
        for tokens, buffers in zip(texts, held, strict=True):  # sessions take turns
            (got,) = step(tokens[:, at : at + 1].contiguous(), torch.tensor([[at]]), *buffers)
            with torch.no_grad():
                want = model.module(input_ids=tokens[:, : at + 1]).logits[:, -1:]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for tokens, buffers in zip(texts, held, strict=True):
        for got, want in zip(buffers, prefill(tokens, torch.arange(START + STEPS)[None])[1:], strict=True):
            torch.testing.assert_close(got[:, :, : START + STEPS], want, rtol=1e-4, atol=1e-5)
            assert bool((got[:, :, START + STEPS :] == 1e4).all()), "one row a step"
    again = [sys.executable, "-c", AGAIN, str(tmp_path / "out"), str(Path(__file__).parent)]
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "both ran"), done.stderr[-2000:]
    before = [b.clone() for b in held[0]]
    with pytest.raises(RuntimeError):
        step(torch.tensor([[3]]), torch.tensor([[CAPACITY]]), *held[0])
    assert all(torch.equal(a, b) for a, b in zip(before, held[0], strict=True))


def buffers_after(prefill: Any, tokens: Tensor) -> list[Tensor]:
    """Buffers that hold the first tokens; what is behind them must not matter."""
    _, *past = prefill(tokens[:, :START].contiguous(), torch.arange(START)[None])
    return [torch.nn.functional.pad(t, (0, 0, 0, CAPACITY - START), value=1e4) for t in past]


@pytest.mark.slow
def test_a_package_that_writes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parity check looks at what is written: right logits are not enough."""
    opened = pt2_export.open_package

    def spoiling(package: Path, operators: list[Path], weights: Weights) -> Any:
        step = opened(package, operators, weights)

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            made = step(*tensors)
            if len(tensors) > 2:
                tensors[3][:, :, 0] += 1.0
            return made

        return call

    monkeypatch.setattr(pt2_export, "open_package", spoiling)
    with pytest.raises(ParityError, match="decode: the export differs from the program"):
        tw.export(deep(), pipeline="exact", path=tmp_path / "out", format="pt2", capacity=CAPACITY)
    assert not (tmp_path / "out").exists()
