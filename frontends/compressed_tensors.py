"""Checkpoints in the layouts `pack-quantized`, `int-quantized` and `naive-quantized` of compressed-tensors.

Source: the format description of the compressed-tensors project. `config.json` has a `quantization_config`
with groups of settings, each for the modules that its `targets` name, less those of `ignore`. Of a layer:

    pack-quantized   weight_packed int32 [N, ceil(K b / 32)]: code + 2^(b-1) of column 32/b i + j in bits b j
                     and up of word i; weight_shape [N, K]; zero points are packed along N:
                     [ceil(N b / 32), G]
    int-quantized    weight int8 [N, K] (naive-quantized with integers: the same); zero points int8 [N, G]
    both             weight_scale [N, G]; w = scale * (code - zero point)

with G = K / group_size, or 1. 4 and 8 bits are read. Not read, each with its reason: float8, permuted columns
(weight_g_idx), blocks, 2:4 sparsity, transforms, quantized caches, activations with scales of a calibration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import LoadError, OptionError
from tilewright.compiler.quantizers import groups
from tilewright.frontends.model_files import show
from tilewright.frontends.stored_linear import (
    FLOATS,
    Checkpoint,
    StoredLinear,
    make_form,
    nibbles,
)

_INTEGERS = ("int-quantized", "naive-quantized")
FORMATS = ("pack-quantized", *_INTEGERS)
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_PATTERN_CAP = 200
_REPEATS_CAP = 4
"""Quantifiers of a pattern out of a file: with none on a group, matching stays polynomial and quick."""


@dataclass(frozen=True)
class _Group:
    """One entry of config_groups."""

    name: str
    targets: tuple[str, ...]
    packed: bool
    bits: int
    group: int
    """-1: a scale per row."""
    symmetric: bool
    whole_tensor: bool
    activation: str


def compressed_linears(
    config: Mapping[str, Any], files: Checkpoint, linears: Mapping[str, tuple[int, int]], where: str
) -> list[StoredLinear]:
    """The quantized layers of a checkpoint, all tensors checked by their headers, their values not yet.

    config: quantization_config. linears: name -> [N, K] of the model's linear layers. where: the file that
    config was read from. Raises LoadError naming the entry or tensor.
    """
    found = _groups(config, where)
    ignore = _patterns(config.get("ignore") or [], "ignore", where)
    layers = []
    for name, shape in linears.items():
        if _matches(name, ignore):
            group = None
        else:
            group = next((one for one in found if _matches(name, one.targets)), None)
        stored = [part for part in _PARTS if f"{name}.{part}" in files.headers]
        if group is None:
            if stored:
                tensor = show(f"{name}.{stored[0]}")
                what = f"tensor {tensor} is there, but config_groups leaves its layer as it is"
                raise LoadError(what, where=where)
            continue
        layers.append(_layer(name, shape, group, files, where))
    taken = {tensor for layer in layers for tensor in layer.tensors}
    for name in files.headers:
        if name.rpartition(".")[2] in _PARTS and name not in taken:
            raise LoadError(f"tensor {show(name)} belongs to no linear layer of the model", where=files.where)
    if not layers:
        raise LoadError("quantization_config matches no linear layer of the model", where=where)
    return layers


def _groups(config: Mapping[str, Any], where: str) -> list[_Group]:
    for entry, reason in (
        ("sparsity_config", "sparse weights are not read"),
        ("transform_config", "weights behind a transform are not read"),
        ("kv_cache_scheme", "a quantized cache is not read; remove the entry for a cache as it is"),
    ):
        value = config.get(entry)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise LoadError(f"quantization_config.{entry} is set", where=where, remedy=reason)
    status = config.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise LoadError(f"quantization_status is {show(status)}", where=where, remedy="'compressed' is read")
    entries = config.get("config_groups")
    if not isinstance(entries, dict) or not entries:
        raise LoadError("quantization_config has no config_groups", where=where)
    return [_group(name, entry, config.get("format"), where) for name, entry in entries.items()]


def _group(name: str, entry: Any, general: Any, where: str) -> _Group:
    at = f"config_groups[{show(name)}]"
    weights = entry.get("weights") if isinstance(entry, dict) else None
    if not isinstance(weights, dict):
        raise LoadError(f"{at} has no weights", where=where)

    def refuse(what: str, value: Any, legal: str) -> LoadError:
        return LoadError(f"{at}: {what} is {show(value)}", where=where, remedy=f"{legal} is read")

    kind = entry.get("format") or general
    if kind not in FORMATS:
        raise refuse("format", kind, ", ".join(FORMATS))
    if weights.get("type", "int") != "int":
        raise refuse("weights.type", weights["type"], "'int'")
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    if type(bits) is not int or bits not in (4, 8):
        raise refuse("weights.num_bits", bits, "4 or 8")
    if strategy is None:
        strategy = "group" if size else "tensor"
    if strategy not in ("group", "channel", "tensor"):
        raise refuse("weights.strategy", strategy, "group, channel or tensor")
    width = -1
    if strategy == "group":
        if type(size) is not int or size < 1:
            raise refuse("weights.group_size", size, "a multiple of 32")
        width = size
    if weights.get("dynamic"):
        raise refuse("weights.dynamic", weights["dynamic"], "false")
    if entry.get("output_activations") is not None:
        raise refuse("output_activations", entry["output_activations"], "null")
    symmetric = weights.get("symmetric", True)
    if type(symmetric) is not bool:
        raise refuse("weights.symmetric", symmetric, "true or false")
    if strategy == "tensor" and not symmetric:
        raise refuse("weights.symmetric with strategy tensor", symmetric, "true")
    inputs = entry.get("input_activations")
    if inputs is not None and not _dynamic_int8(inputs):
        raise refuse("input_activations", inputs, "null, or int8, symmetric, dynamic, per token,")
    return _Group(
        name=name,
        targets=_patterns(entry.get("targets"), f"{at}: targets", where),
        packed=kind == "pack-quantized",
        bits=bits,
        group=width,
        symmetric=symmetric,
        whole_tensor=strategy == "tensor",
        activation="int8-token" if inputs else "none",
    )


def _dynamic_int8(inputs: Any) -> bool:
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return (
        isinstance(inputs, dict)
        and all(inputs.get(key, value) == value for key, value in wanted.items())
        and ("num_bits" in inputs and inputs.get("dynamic") is True)
    )


def _patterns(values: Any, what: str, where: str) -> tuple[str, ...]:
    """Names, class names and `re:` patterns; LoadError for a pattern that could take long to match."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise LoadError(f"{what} is {show(values)}", where=where, remedy="a list of names")
    for value in values:
        if not value.startswith("re:"):
            continue
        text = value[3:]
        repeats = len(re.findall(r"(?<!\\)[*+?{]", text))
        if len(text) > _PATTERN_CAP or repeats > _REPEATS_CAP or re.search(r"\)[*+?{]|\\[1-9]|\(\?", text):
            remedy = f"at most {_REPEATS_CAP} repeats and none of a group are matched"
            raise LoadError(f"{what}: the pattern {show(text)} is too involved", where=where, remedy=remedy)
        try:
            re.compile(text)
        except re.error as error:
            raise LoadError(f"{what}: the pattern {show(text)} is illegal: {error}", where=where) from None
    return tuple(values)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a linear layer is meant: by its class, its name, or a pattern that matches from its start."""
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in ("Linear", name)
        for pattern in patterns
    )


def _layer(name: str, shape: tuple[int, int], group: _Group, files: Checkpoint, where: str) -> StoredLinear:
    columns, at = shape[1], f"config_groups[{show(group.name)}]"
    if f"{name}.weight_g_idx" in files.headers:
        what = f"tensor {show(f'{name}.weight_g_idx')} puts the columns in another order"
        raise LoadError(what, where=files.where, remedy="quantize with actorder weight or none")
    if group.group > 0 and columns % group.group:
        remedy = f"{show(name)} has {columns} columns, which is no whole number of groups"
        raise LoadError(f"{at}: weights.group_size is {group.group}", where=where, remedy=remedy)
    width = columns if group.group < 0 else group.group
    try:
        form = make_form(group.bits, width, columns, offset=not group.symmetric, activation=group.activation)
    except OptionError as error:
        raise LoadError(f"{at}: {error.message}", where=where) from None
    layer = _Layer(name, shape, group, groups(columns, form.group))
    return StoredLinear(name, shape, form, layer.check(files), layer.codes, layer.grids)


@dataclass(frozen=True)
class _Layer:
    """The tensors of one layer."""

    name: str
    shape: tuple[int, int]
    group: _Group
    count: int
    """Scales in a row."""

    @property
    def _weight(self) -> str:
        return f"{self.name}.weight_packed" if self.group.packed else f"{self.name}.weight"

    def check(self, files: Checkpoint) -> frozenset[str]:
        """The names of the layer's tensors; LoadError for one that is absent or of another kind or shape."""
        (rows, columns), bits, packed = self.shape, self.group.bits, self.group.packed
        used = {self._weight, f"{self.name}.weight_scale"}
        if packed:
            files.require(self._weight, ("I32",), (rows, -(-columns * bits // 32)))
            files.require(f"{self.name}.weight_shape", ("I64", "I32"), (2,))
            used.add(f"{self.name}.weight_shape")
        else:
            files.require(self._weight, ("I8",), self.shape)
        scales: list[tuple[int, ...]] = (
            [(1,), (1, 1), ()] if self.group.whole_tensor else [(rows, self.count)]
        )
        scales += [(rows,)] if self.count == 1 and not self.group.whole_tensor else []
        files.require(f"{self.name}.weight_scale", FLOATS, *scales)
        zero = f"{self.name}.weight_zero_point"
        if not self.group.symmetric:
            height = -(-rows * bits // 32) if packed else rows
            files.require(zero, ("I32",) if packed else ("I8",), (height, self.count))
        return frozenset(used | ({zero} & set(files.headers)))

    def codes(self, files: Checkpoint) -> Tensor:
        """uint8 [N, K]."""
        stored = files.tensor(self._weight)
        if not self.group.packed:
            return _from_zero(stored, self.group.bits, self._weight, files)
        return _unpack(stored, self.group.bits)[:, : self.shape[1]].contiguous()

    def grids(self, files: Checkpoint) -> tuple[Tensor, Tensor]:
        """(scale, offset) [N, G]."""
        rows, zero = self.shape[0], f"{self.name}.weight_zero_point"
        if self.group.packed:
            stated = files.tensor(f"{self.name}.weight_shape").tolist()
            if stated != list(self.shape):
                what = f"tensor {show(f'{self.name}.weight_shape')} is {stated}"
                raise LoadError(what, where=files.where, remedy=f"the layer has {list(self.shape)}")
        scale = files.tensor(f"{self.name}.weight_scale").float()
        scale = scale.reshape(-1, self.count).expand(rows, self.count).contiguous()
        if self.group.symmetric:
            if zero in files.headers and bool(files.tensor(zero).any()):
                what = f"tensor {show(zero)} is not zero, but weights.symmetric is true"
                raise LoadError(what, where=files.where)
            return scale, -(1 << (self.group.bits - 1)) * scale
        stored = files.tensor(zero)
        if self.group.packed:
            points = _unpack(stored.t(), self.group.bits)[:, :rows].t()
        else:
            points = _from_zero(stored, self.group.bits, zero, files)
        return scale, -points.float() * scale


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [N, W] -> uint8 [N, W * 32 / bits]: codes from the low bits of a little-endian word up."""
    stored = words.contiguous().view(torch.uint8)
    return nibbles(stored) if bits == 4 else stored


def _from_zero(values: Tensor, bits: int, name: str, files: Checkpoint) -> Tensor:
    """int8 in -2^(b-1)..2^(b-1)-1 -> uint8 from 0 on; LoadError for other values."""
    middle = 1 << (bits - 1)
    low, high = (int(part) for part in torch.aminmax(values))
    if low < -middle or high >= middle:
        what = f"tensor {show(name)} holds {low if low < -middle else high}"
        raise LoadError(what, where=files.where, remedy=f"{bits} bits are {-middle} to {middle - 1}")
    return (values.short() + middle).to(torch.uint8)
