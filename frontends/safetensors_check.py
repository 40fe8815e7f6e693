"""safetensors files and folders of them, checked before anything else reads them.

Source: the safetensors format description: 8-byte little-endian header length, JSON header, one buffer that
the tensors cover without hole or overlap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.model_files import (
    file_inside,
    model_file,
    open_model_file,
    parse_json_object,
    read_json_object,
    show,
)

HEADER_CAP = 100_000_000
"""Bytes; the format's own limit."""
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_RANK_CAP = 16
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: dtype as the format spells it, shape in elements, its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def check_safetensors(path: Path) -> dict[str, TensorHeader]:
    """Check one file; tensor name -> header. Raises LoadError naming the first fault."""
    where = str(path)
    with open_model_file(model_file(path)) as (file, size):
        if size < 8:
            raise LoadError(f"has {size} bytes, fewer than a safetensors header", where=where)
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_CAP or length > size - 8:
            raise LoadError(
                f"announces a header of {length} bytes in a file of {size}",
                where=where,
                remedy="is it a complete safetensors file?",
            )
        header = file.read(length)
    if len(header) != length or not header.startswith(b"{"):
        raise LoadError("has no JSON header", where=where, remedy="is it a safetensors file?")
    entries = parse_json_object(header, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoadError("its __metadata__ is not a table of texts", where=where)
    return _check_entries(entries, 8 + length, size, where)


def _check_entries(entries: Mapping[str, Any], start: int, size: int, where: str) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise LoadError(f"tensor {show(name)} has not exactly dtype, shape and data_offsets", where=where)
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise LoadError(f"tensor {show(name)} has the unknown dtype {show(dtype)}", where=where)
        if not _sizes(shape) or len(shape) > _RANK_CAP:
            raise LoadError(f"tensor {show(name)} has the illegal shape {show(shape)}", where=where)
        if not _sizes(offsets) or len(offsets) != 2:
            raise LoadError(f"tensor {show(name)} has the illegal data_offsets {show(offsets)}", where=where)
        begin, end = offsets
        if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
            what = f"tensor {show(name)} of {dtype} {show(shape)} does not have {end - begin} bytes"
            raise LoadError(what, where=where)
        tensors[name] = TensorHeader(dtype, tuple(shape), start + begin)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = (
                "overlaps the one before it"
                if begin < position
                else f"leaves a hole of {begin - position} bytes"
            )
            raise LoadError(f"tensor {show(name)} {kind}", where=where)
        position = end
    if start + position != size:
        raise LoadError(
            f"its tensors need {position} bytes and it has {size - start}",
            where=where,
            remedy="is the download complete?",
        )
    return tensors


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def check_weights_folder(folder: Path) -> dict[Path, dict[str, TensorHeader]]:
    """Check the safetensors weights of a model folder, single file or shards; file -> tensor name -> header.

    Raises LoadError: no safetensors (naming what is there instead), an index that leaves the folder or
    disagrees with its shards, or a bad shard.
    """
    names = sorted(path.name for path in folder.iterdir())
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(indices) > 1:
        raise LoadError(f"has {len(indices)} weight indices", where=str(folder), remedy="keep one")
    if indices:
        return _check_index(folder, indices[0])
    if len(weights) == 1:
        path = file_inside(folder, weights[0])
        return {path: check_safetensors(path)}
    if weights:
        raise LoadError(f"has {len(weights)} .safetensors files and no index for them", where=str(folder))
    others = [name for name in names if name.endswith(_PICKLES)]
    found = f"; it has {show(others[0])}, which is not read because such files can run code" if others else ""
    remedy = "save the model as safetensors"
    raise LoadError(f"has no .safetensors weights{found}", where=str(folder), remedy=remedy)


def _check_index(folder: Path, index: str) -> dict[Path, dict[str, TensorHeader]]:
    path = file_inside(folder, index)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError("has no weight_map", where=str(path))
    listed: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            remedy = "shards end in .safetensors"
            raise LoadError(f"names the shard {show(shard)}", where=str(path), remedy=remedy)
        listed.setdefault(shard, set()).add(tensor)
    checked = {}
    for shard, tensors in sorted(listed.items()):
        file = file_inside(folder, shard)
        checked[file] = check_safetensors(file)
        if wrong := sorted(tensors ^ set(checked[file])):
            raise LoadError(f"disagrees with {shard} about tensor {show(wrong[0])}", where=str(path))
    return checked
