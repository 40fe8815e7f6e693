"""Checkpoints whose safetensors hold tensors of torchao: the layout that torchao writes since 0.14.

Source: torchao.prototype.safetensors. The metadata of a file has, for each tensor T = `module.weight`, a JSON
object `{"_type", "_data", "_tensor_data_names"}`; its parts are the tensors `module._weight_PART`. Read are

    Int4Tensor                qdata [N, K / 2], the even column in the low nibble, both signed; scale and
                              zero_point floats [G, N]; w = scale * code + zero_point
    Int8Tensor                qdata int8 [N, K], scale [N, G]; w = scale * (code - zero_point)
    IntxUnpackedToInt8Tensor  the same with codes of 2, 3, 4 or 8 bits

The settings of quantization_config are not consulted: the files say what each tensor is. Older checkpoints of
torchao are pickles (.bin), which are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import LoadError, OptionError
from tilewright.compiler.quantizers import groups
from tilewright.frontends.model_files import parse_json_object, show
from tilewright.frontends.stored_linear import FLOATS, Checkpoint, StoredLinear, make_form, nibbles

KINDS = ("Int4Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
_BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}
_PARTS = ("qdata", "scale", "zero_point")


def torchao_linears(files: Checkpoint, linears: Mapping[str, tuple[int, int]]) -> list[StoredLinear]:
    """The quantized layers of a checkpoint, all tensors checked by their headers, their values not yet.

    linears: name -> [N, K] of the model's linear layers. Raises LoadError naming the tensor.
    """
    metadata = files.metadata()
    if "tensor_names" not in metadata:
        remedy = "save it again with torchao 0.14 or later; other files of torchao are pickles"
        raise LoadError(
            "its safetensors do not say which tensors are torchao's", where=files.where, remedy=remedy
        )
    layers = []
    for name, text in metadata.items():
        if "." not in name:
            continue
        at = f"{files.where}: metadata of {show(name)}"
        entry = parse_json_object(text.encode(), at)
        if entry.get("_type") == "Tensor":
            continue
        if entry.get("_type") not in KINDS:
            raise LoadError(
                f"_type is {show(entry.get('_type'))}", where=at, remedy=f"read: {', '.join(KINDS)}"
            )
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or module not in linears:
            raise LoadError(f"tensor {show(name)} belongs to no linear layer of the model", where=files.where)
        layers.append(_layer(module, linears[module], entry, files, at))
    if not layers:
        raise LoadError(
            "none of its tensors is quantized, though quantization_config is set", where=files.where
        )
    return layers


def _layer(
    name: str, shape: tuple[int, int], entry: Mapping[str, Any], files: Checkpoint, at: str
) -> StoredLinear:
    kind, data, parts = entry["_type"], entry.get("_data"), entry.get("_tensor_data_names")
    if not isinstance(data, dict) or not isinstance(parts, list):
        raise LoadError("_data or _tensor_data_names is absent", where=at)
    if extra := sorted(str(part) for part in parts if part not in _PARTS):
        raise LoadError(f"part {show(extra[0])} is not read", where=at, remedy=f"read: {', '.join(_PARTS)}")
    block, bits = data.get("block_size"), 4 if kind == "Int4Tensor" else 8
    if kind == "IntxUnpackedToInt8Tensor":
        target = data.get("target_dtype")
        stated = target.get("_data") if isinstance(target, dict) else None
        if not isinstance(stated, str) or stated not in _BITS:
            raise LoadError(f"target_dtype is {show(stated)}", where=at, remedy=f"read: {', '.join(_BITS)}")
        bits = _BITS[stated]
    whole_tensor = block == list(shape) and kind == "Int8Tensor" and shape[0] > 1
    first, size = block if isinstance(block, list) and len(block) == 2 else (None, None)
    if type(size) is not int or size < 1 or shape[1] % size or (first != 1 and not whole_tensor):
        remedy = f"[1, G] with G a divisor of {shape[1]} columns"
        raise LoadError(f"block_size is {show(block)}", where=at, remedy=remedy)
    offset = kind != "Int8Tensor" and "zero_point" in parts
    try:
        form = make_form(bits, size, shape[1], offset=offset, activation=_activation(data, at))
    except OptionError as error:
        raise LoadError(error.message, where=at) from None
    layer = _Layer(name, shape, bits, groups(shape[1], form.group), kind, "zero_point" in parts, whole_tensor)
    return StoredLinear(name, shape, form, layer.check(files), layer.codes, layer.grids)


def _activation(data: Mapping[str, Any], at: str) -> str:
    """How the layer's activations are quantized; LoadError for a way that has no kernel."""
    for entry in ("activation_quantization", "reduce_range"):
        if data.get(entry):
            raise LoadError(f"{entry} is {show(data[entry])}", where=at, remedy="weights alone are read")
    given = data.get("act_quant_kwargs")
    if given is None:
        return "none"
    settings = given.get("_data") if isinstance(given, dict) else None
    granularity = settings.get("granularity") if isinstance(settings, dict) else None
    mapping = settings.get("mapping_type") if isinstance(settings, dict) else None
    by_row = isinstance(granularity, dict) and granularity.get("_type") == "PerRow"
    symmetric = mapping is None or (isinstance(mapping, dict) and mapping.get("_data") == "SYMMETRIC")
    if not by_row or not symmetric:
        remedy = "symmetric per row is read"
        raise LoadError(f"act_quant_kwargs is {show(given)}", where=at, remedy=remedy)
    return "int8-token"


@dataclass(frozen=True)
class _Layer:
    """The tensors of one layer."""

    name: str
    shape: tuple[int, int]
    bits: int
    count: int
    """Scales in a row."""
    kind: str
    has_zero: bool
    whole_tensor: bool

    def _part(self, part: str) -> str:
        return f"{self.name}._weight_{part}"

    def check(self, files: Checkpoint) -> frozenset[str]:
        """The names of the layer's tensors; LoadError for one that is absent or of another kind or shape."""
        rows, columns = self.shape
        turned = self.kind == "Int4Tensor"
        if turned:
            files.require(self._part("qdata"), ("I8", "U8"), (rows, columns // 2))
        else:
            files.require(self._part("qdata"), ("I8",), (rows, columns))
        grid = (self.count, rows) if turned else (rows, self.count)
        grids = [(1, 1), (1,), ()] if self.whole_tensor else [grid]
        files.require(self._part("scale"), FLOATS, *grids)
        if self.has_zero:
            files.require(
                self._part("zero_point"), FLOATS if turned else ("I8", "I32", "I64", *FLOATS), *grids
            )
        return frozenset(self._part(part) for part in (_PARTS if self.has_zero else _PARTS[:2]))

    def codes(self, files: Checkpoint) -> Tensor:
        """uint8 [N, K]."""
        stored, middle = files.tensor(self._part("qdata")), 1 << (self.bits - 1)
        if self.kind == "Int4Tensor":
            return nibbles(stored.view(torch.uint8)) ^ 8
        low, high = (int(part) for part in torch.aminmax(stored))
        if low < -middle or high >= middle:
            what = f"tensor {show(self._part('qdata'))} holds {low if low < -middle else high}"
            raise LoadError(what, where=files.where, remedy=f"{self.bits} bits are {-middle} to {middle - 1}")
        return (stored.short() + middle).to(torch.uint8)

    def grids(self, files: Checkpoint) -> tuple[Tensor, Tensor]:
        """(scale, offset) [N, G]."""
        scale, middle = self._grid("scale", files), 1 << (self.bits - 1)
        if not self.has_zero:
            return scale, -middle * scale
        zero = self._grid("zero_point", files)
        if self.kind == "Int4Tensor":
            return scale, zero - middle * scale
        if self.kind == "Int8Tensor" and bool(zero.any()):
            raise LoadError(f"tensor {show(self._part('zero_point'))} is not zero", where=files.where)
        return scale, -(zero + middle) * scale

    def _grid(self, part: str, files: Checkpoint) -> Tensor:
        found = files.tensor(self._part(part)).float()
        found = found.t() if self.kind == "Int4Tensor" else found.reshape(-1, self.count)
        return found.expand(self.shape[0], self.count).contiguous()
