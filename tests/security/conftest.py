"""Small, complete model files of every kind the loaders meet, made by the formats' own libraries."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save

VOCABULARY = 12
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def _llama_tensors() -> dict[str, torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    state = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "dtype"})).state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if name != "lm_head.weight"}


def _gguf_bytes(folder: Path) -> bytes:
    path = folder / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghij", "ab", "bc"])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b", "b c"])
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (VOCABULARY, 32), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32), "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32), "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def field(number: int, wire: int, payload: bytes | int) -> bytes:
    """One protobuf field: wire 0 takes an int below 128, wire 2 takes bytes."""
    tag = varint(number << 3 | wire)
    return tag + (varint(payload) if isinstance(payload, int) else varint(len(payload)) + payload)


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(out)


def onnx_bytes() -> bytes:
    """ModelProto: IR version 10, producer, an empty graph named g, operator set 21."""
    graph = field(2, 2, b"g")
    return field(1, 0, 10) + field(2, 2, b"made") + field(7, 2, graph) + field(8, 2, field(2, 0, 21))


def pt2_bytes(*, payload: bytes = b"x") -> bytes:
    """The members of a torch.export archive; `payload` stands where torch would unpickle."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/models/model.json", "{}")
        archive.writestr("m/data/sample_inputs/model.pt", payload)
        archive.writestr("m/data/weights/weight_0", payload)
    return out.getvalue()


def safetensors_bytes(header: object, buffer: bytes = b"") -> bytes:
    """A file with that header (any JSON value, or raw bytes)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + buffer


@dataclass(frozen=True)
class Samples:
    """Bytes of one good file per format, and a builder of a good model folder."""

    gguf: bytes
    safetensors: bytes
    onnx: bytes
    pt2: bytes

    def folder(self, path: Path, **config: object) -> Path:
        """A loadable Llama folder; `config` overrides entries of config.json."""
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG | config))
        (path / "model.safetensors").write_bytes(self.safetensors)
        return path

    def sharded(self, path: Path) -> Path:
        """The same folder in two shards with an index."""
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG))
        tensors = _llama_tensors()
        names = sorted(tensors)
        parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
        for file, part in parts.items():
            (path / file).write_bytes(save({n: tensors[n] for n in part}, {"format": "pt"}))
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    weights = save(_llama_tensors(), {"format": "pt"})
    return Samples(_gguf_bytes(tmp_path_factory.mktemp("gguf")), weights, onnx_bytes(), pt2_bytes())


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "artifact-store"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that exists only if something out of a model file was run."""
    return tmp_path / "canary"


@pytest.fixture
def pack() -> Callable[..., bytes]:
    """`safetensors_bytes`, for test files (which cannot import this one)."""
    return safetensors_bytes


@pytest.fixture
def make_pt2() -> Callable[..., bytes]:
    return pt2_bytes
