"""Writes small model folders in the layouts of compressed-tensors and torchao, from their descriptions.

Codes are packed one by one in Python, so that nothing is shared with the reader under test.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LINEARS = 7
"""Quantized linear layers; the head stays as it is."""


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes [N, K] -> int32 [N, ceil(K bits / 32)]: code + 2^(bits-1), first in the lowest bits."""
    per_word, rows = 32 // bits, []
    for row in codes.tolist():
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for i, code in enumerate(row[start : start + per_word]):
                word |= (code + 2 ** (bits - 1)) << (i * bits)
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Signed codes [N, K] -> int8 [N, K/2]: two's complement nibbles, the even column in the low one."""
    rows = [[(a % 16) | (b % 16) << 4 for a, b in zip(r[::2], r[1::2], strict=True)] for r in codes.tolist()]
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int8)


@dataclass
class Made:
    """A folder's contents before they are written, for tests to break."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    meant: dict[str, torch.Tensor] = field(default_factory=dict)
    """float32 weights of the dequantized model."""

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(
            {k: v.contiguous() for k, v in self.tensors.items()}, folder / "model.safetensors", self.metadata
        )
        return folder

    def reference(self) -> LlamaForCausalLM:
        """The model with its weights dequantized to float32."""
        other = ("architectures", "quantization_config")
        plain = {key: value for key, value in self.config.items() if key not in other}
        model = LlamaForCausalLM(LlamaConfig(**plain, attn_implementation="sdpa")).eval()
        model.load_state_dict(self.meant)
        return model


def _model(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    plain = {key: value for key, value in CONFIG.items() if key != "architectures"}
    state = LlamaForCausalLM(LlamaConfig(**plain)).state_dict()
    return {name: value * 8 if value.dim() == 2 else value for name, value in state.items()}


def _is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight")


def compressed(
    *, bits: int = 4, group: int = 32, symmetric: bool = True, form: str = "pack-quantized",
    activations: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> Made:  # fmt: skip
    """The small model, its projections quantized; group 0: a scale per row."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None,
        "strategy": "group" if group else "channel", "group_size": group or None,
    }  # fmt: skip
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    entry = {"targets": ["Linear"], "weights": weights, "output_activations": None}
    entry["input_activations"] = inputs if activations else None
    quantization = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": entry},
    }  # fmt: skip
    made = Made({**CONFIG, "quantization_config": quantization})
    for name, value in _model(1).items():
        if not _is_quantized(name):
            made.tensors[name] = made.meant[name] = value
            continue
        rows, columns = value.shape
        count, low = columns // (group or columns), -(2 ** (bits - 1))
        codes = torch.randint(low, -low, (rows, columns))
        codes[0, :2] = torch.tensor([low, -low - 1])
        scale = (torch.rand(rows, count) * 0.02 + 0.005).to(dtype)
        zero = torch.randint(low, -low, (rows, count)) if not symmetric else torch.zeros(rows, count).long()
        spread = columns // count
        wide, shift = (part.repeat_interleave(spread, 1) for part in (scale.float(), zero))
        made.meant[name] = wide * (codes - shift).float()
        stem = name.removesuffix(".weight")
        made.tensors[f"{stem}.weight_scale"] = scale
        if form == "pack-quantized":
            made.tensors[f"{stem}.weight_packed"] = pack_words(codes, bits)
            made.tensors[f"{stem}.weight_shape"] = torch.tensor([rows, columns])
        else:
            made.tensors[name] = codes.to(torch.int8)
        if not symmetric:
            packed = form == "pack-quantized"
            made.tensors[f"{stem}.weight_zero_point"] = (
                pack_words(zero.t(), bits).t() if packed else zero.to(torch.int8)
            )
    return made


def torchao(kind: str, *, group: int = 32, activations: bool = False) -> Made:
    """The small model, its projections stored as tensors of torchao."""
    made = Made({**CONFIG, "quantization_config": {"quant_method": "torchao", "quant_type": {}}})
    names = []
    for name, value in _model(2).items():
        names.append(name)
        if not _is_quantized(name):
            made.tensors[name] = made.meant[name] = value
            made.metadata[name] = json.dumps({"_type": "Tensor"})
            continue
        rows, columns = value.shape
        bits, count = 8 if kind == "Int8Tensor" else 4, 1 if kind == "Int8Tensor" else columns // group
        low = -(2 ** (bits - 1))
        codes, scale = torch.randint(low, -low, (rows, columns)), torch.rand(rows, count) * 0.02 + 0.005
        data: dict[str, Any] = {"block_size": [1, columns // count]}
        parts = {"qdata": codes.to(torch.int8), "scale": scale, "zero_point": torch.zeros(rows, count).char()}
        wide = scale.repeat_interleave(columns // count, 1)
        if kind == "Int4Tensor":
            scale = scale.bfloat16()
            wide = scale.float().repeat_interleave(columns // count, 1)
            zero = (torch.randn(rows, count) * 0.05).bfloat16()
            parts = {"qdata": pack_pairs(codes), "scale": scale.t(), "zero_point": zero.t()}
            meant = wide * codes.float() + zero.float().repeat_interleave(columns // count, 1)
        elif kind == "IntxUnpackedToInt8Tensor":
            points = torch.randint(low, -low, (rows, count))
            parts["zero_point"] = points.to(torch.int8)
            meant = wide * (codes - points.repeat_interleave(columns // count, 1)).float()
            data["target_dtype"] = {"_type": "torch.dtype", "_data": "int4"}
        else:
            meant = wide * codes.float()
            row = {"_type": "PerRow", "_data": {"dim": -1}}
            if activations:
                kwargs = {"granularity": row, "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}}
                data["act_quant_kwargs"] = {"_type": "QuantizeTensorToInt8Kwargs", "_data": kwargs}
        made.meant[name] = meant
        stem = name.removesuffix(".weight")
        made.tensors |= {f"{stem}._weight_{part}": tensor for part, tensor in parts.items()}
        made.metadata[name] = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": list(parts)})
    made.metadata["tensor_names"] = json.dumps(names)
    return made
