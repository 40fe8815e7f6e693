"""Decode over buffers of fixed size, bound as input and output at once: a step writes its own rows only."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.weight_format import WeightFormat
from tilewright.frontends.example_calls import causal_lm_examples
from tilewright.frontends.export.onnx_file import session
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.kernels.table import host_target

needs_kernels = pytest.mark.skipif(host_target().arch == "generic", reason="no kernels for this CPU")
SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 97, "head_dim": 16, "max_position_embeddings": 200,
}  # fmt: skip


def small(window: int | None = None) -> LoadedModel:
    torch.manual_seed(0)
    if window is None:
        module: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        module = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))
    return LoadedModel("small", "causal-lm", module.eval(), None, causal_lm_examples(module))


def follow(folder: Path, manifest: dict[str, Any], model: LoadedModel, start: int, steps: int) -> None:
    """Decode `steps` tokens behind `start` random ones and compare every step with the model's own cache."""
    import onnxruntime

    rows = {row["name"]: row for row in manifest["entries"]}
    decode = rows["decode"]
    library = folder / decode["library"] if decode.get("library") else None
    opened = session(folder / "decode.onnx", library=library, threads=1)
    first = rows["prefill"].get("library")
    prefill = session(folder / "prefill.onnx", library=folder / first if first else None, threads=1)
    tokens = torch.randint(0, 97, (1, start + steps))
    given = {"input_ids": tokens[:, :start].numpy(), "position_ids": np.arange(start)[None]}
    held = dict(zip(prefill_outputs(rows), prefill.run(None, given), strict=True))
    binding, buffers = opened.io_binding(), {}
    for past, present in decode["shared"].items():
        shape = next(row["shape"] for row in decode["inputs"] if row["name"] == past)
        values = np.full(shape, 1e4, np.float32)  # what is behind the tokens held must not matter
        values[:, :, :start] = held[present]
        buffers[past] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
        binding.bind_ortvalue_input(past, buffers[past])
        binding.bind_ortvalue_output(present, buffers[past])
    binding.bind_output("logits")
    for at in range(start, start + steps):
        binding.bind_cpu_input("input_ids", tokens[:, at : at + 1].numpy())
        binding.bind_cpu_input("position_ids", np.array([[at]]))
        opened.run_with_iobinding(binding)
        got = torch.from_numpy(binding.get_outputs()[-1].numpy())
        with torch.no_grad():
            want = model.module(input_ids=tokens[:, : at + 1]).logits[:, -1:]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    binding.bind_cpu_input("position_ids", np.array([[held_tokens(decode)]]))
    with pytest.raises(RuntimeError, match=r"invalid ind|allocated shapes match|cos_cache"):
        opened.run_with_iobinding(binding)
    assert (buffers["past.0.key"].numpy()[:, :, start + steps :] == 1e4).all(), "one row a step"


def held_tokens(decode: dict[str, Any]) -> int:
    """The capacity: the first position that the buffers do not have."""
    return int(next(row["shape"][2] for row in decode["inputs"] if row["name"].startswith("past.")))


def prefill_outputs(rows: dict[str, Any]) -> list[str]:
    return [row["name"] for row in rows["prefill"]["outputs"]]


@pytest.mark.slow
@pytest.mark.parametrize("operators", ["standard", pytest.param("custom", marks=needs_kernels)])
def test_steps_over_shared_buffers(tmp_path: Path, operators: str) -> None:
    model = small()
    manifest = tw.export(model, pipeline="exact", path=tmp_path / "out", operators=operators, capacity=48)
    decode = manifest["entries"][1]
    assert not decode["dynamic"]
    assert "Attention" not in decode["operators"]
    name = "paged_attention" if operators == "custom" else "com.microsoft::GroupQueryAttention"
    assert sum(n for found, n in decode["operators"].items() if name in found) == 2
    assert decode["operators"].get("ScatterND", 0) == (4 if operators == "custom" else 0)
    follow(tmp_path / "out", manifest, model, start=41, steps=7)


@pytest.mark.slow
def test_steps_of_one_product_for_all_three(tmp_path: Path) -> None:
    """Quantized, queries, keys and values are one value, which onnxruntime splits and turns itself."""
    model = small()
    form = WeightFormat(8, 32)
    with torch.no_grad():
        for layer in model.module.modules():
            if isinstance(layer, torch.nn.Linear):  # on the grid already: quantizing changes nothing
                layer.weight.copy_(form.round_weight(layer.weight))
    pipeline = "gqa-unrepeat,quantize-linear{group=32},fuse-add-rmsnorm,fuse-projections"
    manifest = tw.export(model, pipeline=pipeline, path=tmp_path / "out", capacity=48)
    counts = manifest["entries"][1]["operators"]
    assert counts["com.microsoft::GroupQueryAttention"] == 2
    assert counts["com.microsoft::SkipSimplifiedLayerNormalization"] == 4
    assert counts["com.microsoft::MatMulNBits"] == 8
    assert counts["Split"] == 2, "of gate and up"
    assert not {"RotaryEmbedding", "Reshape", "Add", "Cos"} & {n for n, count in counts.items() if count > 2}
    follow(tmp_path / "out", manifest, model, start=41, steps=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operators", "window", "capacity"),
    [
        pytest.param("custom", 9, 32, marks=needs_kernels),
        pytest.param("custom", None, 33, marks=needs_kernels),
        ("standard", 9, 33),
    ],
)
def test_what_only_a_mask_says(tmp_path: Path, operators: str, window: int | None, capacity: int) -> None:
    model = small(window)
    folder = tmp_path / "out"
    manifest = tw.export(model, pipeline="exact", path=folder, operators=operators, capacity=capacity)
    decode = manifest["entries"][1]
    name = "tilewright::attention" if operators == "custom" else "Attention"
    assert sum(n for found, n in decode["operators"].items() if found.startswith(name)) == 2
    assert decode["operators"]["ScatterND"] == 4
    if operators == "custom":
        reason = "mask is not of all keys up to the position" if window else "pages of 8 do not divide"
        assert reason in decode["standard"]["paged_attention"]
    follow(folder, manifest, model, start=20, steps=5)


def test_capacities_that_make_no_sense(tmp_path: Path) -> None:
    model = small()
    for capacity in (0, 13, 201):
        with pytest.raises(
            OptionError, match=f"capacity = {capacity}.*at least 14 and at most the model's 200"
        ):
            tw.export(model, pipeline="exact", path=tmp_path / "out", capacity=capacity)
    with pytest.raises(OptionError, match="formats onnx and pt2, not kernels"):
        tw.export(model, pipeline="exact", path=tmp_path / "out", format="kernels", capacity=32)
    axes = {"input_ids": {1: "length"}}
    with pytest.raises(OptionError, match="the prefill and decode of a language model"):
        tw.export(model, pipeline="exact", path=tmp_path / "out", dynamic=axes, capacity=32)
    with pytest.raises(OptionError, match="not a module"):
        tw.export(torch.nn.Linear(3, 4), (torch.randn(2, 3),), path=tmp_path / "out", capacity=32)
    assert not (tmp_path / "out").exists()
