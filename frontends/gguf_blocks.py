"""Block-quantized weights of GGUF files, kept as they are: no rounding, no float32 copy when the model runs.

Q4_1 is int4 in float-zero groups of 32, Q4_0 and Q8_0 are symmetric groups of 32 (ggml's block layouts: the
float16 scale, for Q4_1 the float16 minimum, then the codes; byte i of a 4-bit block holds elements i and
i + 16). Q4_K is int4 in float-zero groups of 32, whose scales and minima are 6-bit multiples of two float16
numbers for 256 elements: their products are held in float32. Only how the codes lie changes, from ggml's
blocks to those of the kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import LoadError
from tilewright.compiler.quantizers import Activation, Quantized
from tilewright.compiler.weight_format import WeightFormat
from tilewright.frontends.gguf_check import GgufTensor, check_gguf
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.frontends.model_files import model_file, open_model_file, show

FORMATS = {
    "Q4_0": WeightFormat(4, 32, "symmetric"),
    "Q4_1": WeightFormat(4, 32, "float-zero"),
    "Q8_0": WeightFormat(8, 32, "symmetric"),
    "Q4_K": WeightFormat(4, 32, "float-zero", grid="wide"),
}
_BLOCK, _SUPER = 32, 256
_LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's matrices: in GGUF, in transformers' decoders."""


class QuantizedLinear(nn.Module):
    """x W^T + b with a packed weight: a torch.nn.Linear that holds no float weight."""

    packed: Tensor
    bias: Tensor | None

    def __init__(
        self, packed: Tensor, rows: int, columns: int, bias: Tensor | None, form: WeightFormat
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = columns, rows, form.text
        self.register_buffer("packed", packed)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return cast(Tensor, ops.quantized_linear(x, self.packed, self.bias, self.out_features, self.format))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


def read_blocks(data: bytes, tensor: GgufTensor) -> Quantized:
    """The codes and grids of one tensor of a type in `FORMATS`, from its bytes; a matrix [N, K]."""
    rows, columns = tensor.shape
    block = _SUPER if tensor.type == "Q4_K" else _BLOCK
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, columns // block, -1)

    def number(at: int) -> Tensor:
        return raw[..., at : at + 2].contiguous().view(torch.float16)[..., 0].float()

    scale = number(0)
    if tensor.type == "Q4_K":
        return _super_blocks(raw, scale, number(2), columns)
    if tensor.type == "Q8_0":
        codes, offset = raw[..., 2:] ^ 128, -128 * scale
    else:
        nibbles = raw[..., 4 if tensor.type == "Q4_1" else 2 :]
        codes = torch.cat((nibbles & 15, nibbles >> 4), -1)
        offset = number(2) if tensor.type == "Q4_1" else -8 * scale
    return Quantized(codes.reshape(rows, columns), scale, offset, _BLOCK)


def _super_blocks(raw: Tensor, scale: Tensor, minimum: Tensor, columns: int) -> Quantized:
    """Q4_K: raw [N, blocks of 256, 144]. Bytes 4 to 15 hold eight scales and eight minima of 6 bits, the
    upper bits of the last four of each in the two top bits of the first eight bytes; then, for each 64
    elements, 32 bytes of codes, the lower halves first."""
    first, second, rest = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), -1)
    minima = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), -1)
    pairs = raw[..., 16:].view(*raw.shape[:2], -1, _BLOCK)
    codes = torch.stack((pairs & 15, pairs >> 4), 3)
    grids = [n[..., None] * m for n, m in ((scale, scales), (-minimum, minima))]
    scale, offset = (g.reshape(len(raw), columns // _BLOCK) for g in grids)
    return Quantized(codes.reshape(len(raw), columns), scale, offset, _BLOCK)


def block_weights(path: Path) -> Iterator[tuple[GgufTensor, Quantized]]:
    """The matrices of a checked GGUF file that are stored in blocks of a type in `FORMATS`."""
    info = check_gguf(path)
    with open_model_file(model_file(path)) as (file, _):
        for tensor in info.tensors.values():
            if tensor.type in FORMATS and len(tensor.shape) == 2:
                file.seek(tensor.offset)
                yield tensor, read_blocks(file.read(tensor.size), tensor)


def keep_quantized(model: LoadedModel, path: Path, activation: Activation = "none") -> LoadedModel:
    """Replace the linear layers of a model read from a GGUF file by the file's own blocks.

    model: what `load_gguf(path)` gave; its module is changed in place. activation: how the activations of
    these layers are quantized at run time. Every replaced weight must mean, bit for bit, what the float32
    model holds: LoadError naming the tensor otherwise.
    """
    found = 0
    for tensor, blocks in block_weights(path):
        name = _module_name(tensor.name)
        if name is None:
            continue
        parent, _, leaf = name.rpartition(".")
        layer = model.module.get_submodule(name)
        if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != tensor.shape:
            raise LoadError(f"tensor {show(tensor.name)} is not the weight of {name}", where=str(path))
        order = _row_order(blocks, layer.weight, tensor.name, path)
        blocks = dataclasses.replace(
            blocks, codes=blocks.codes[order], scale=blocks.scale[order], offset=blocks.offset[order]
        )
        form = dataclasses.replace(FORMATS[tensor.type], activation=activation)
        bias = None if layer.bias is None else layer.bias.data
        made = QuantizedLinear(form.pack(blocks), layer.out_features, layer.in_features, bias, form)
        setattr(model.module.get_submodule(parent), leaf, made)
        found += 1
    if not found:
        raise LoadError(f"has no linear layer in blocks of {', '.join(FORMATS)}", where=str(path))
    return model


def _module_name(tensor: str) -> str | None:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj`; None for what is no layer's matrix."""
    parts = tensor.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] != "weight" or parts[2] not in _LAYERS:
        return None
    return f"model.layers.{parts[1]}.{_LAYERS[parts[2]]}"


def _row_order(blocks: Quantized, weight: Tensor, name: str, path: Path) -> Tensor:
    """Rows of the file in the model's order. ggml keeps the rows of Q and K in pairs for its rotary
    embedding, head by head; the head size under which the file holds the model's weights is found."""
    want, rows = blocks.dequantize(), weight.shape[0]
    straight = torch.arange(rows)
    if torch.equal(want, weight.data):
        return straight
    for head in (rows // heads for heads in range(1, rows // 2 + 1) if rows % (2 * heads) == 0):
        order = straight.view(-1, head // 2, 2).transpose(1, 2).reshape(-1)
        if torch.equal(want[order], weight.data):
            return order
    raise LoadError(f"tensor {show(name)} does not hold the weights of the model", where=str(path))
