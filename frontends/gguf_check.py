"""GGUF files, checked before anything else reads them.

Source: the GGUF specification of ggml (docs/gguf.md), versions 2 and 3, little-endian. The check reads the
header, metadata and tensor table once, allocates no more than the longest string it accepts, trusts no count:
each is bounded by the bytes left in the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.model_files import model_file, open_model_file, show

TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Tensor type id -> (name, elements per block, bytes per block)."""

METADATA_CAP = 256 << 20
"""Bytes of header, metadata and tensor table; published models stay under 32 MB."""
_ITEM_CAP = 8_000_000
"""Array elements in all metadata; a vocabulary of 256k with merges and scores has about 1.5 million."""
_ARRAY_DEPTH = 4
_KEPT = 64
"""Arrays up to this length are returned; longer ones (vocabularies) only as their length."""
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """In PyTorch order (slowest axis first), elements."""
    type: str
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class ArrayLength:
    """Stands for a metadata array too long to keep."""

    length: int


@dataclass(frozen=True)
class GgufInfo:
    """What a checked file says about itself."""

    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def elements(self) -> int:
        """Elements of all tensors: 4 bytes each when dequantized to float32."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def check_gguf(path: Path) -> GgufInfo:
    """Check the structure of a GGUF file; raises LoadError naming the first fault."""
    with open_model_file(model_file(path)) as (file, size):
        return _Reader(file, size, str(path)).read()


class _Reader:
    """A cursor over an untrusted file: every read is checked against the bytes left."""

    def __init__(self, file: BufferedReader, size: int, where: str) -> None:
        self.file, self.size, self.where = file, size, where
        self.position = 0
        self.items = 0

    def read(self) -> GgufInfo:
        if self.size < 24:
            raise self.error(f"has {self.size} bytes, fewer than a GGUF header", "is the download complete?")
        if (magic := self.take(4)) != b"GGUF":
            raise self.error(f"starts with {show(magic)}, not with 'GGUF'", "is it a GGUF model file?")
        version = self.number("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            kind = "big-endian" if swapped in (2, 3) else f"version {version}"
            raise self.error(f"is a {kind} GGUF file", "versions 2 and 3, little-endian, are read")
        tensors, pairs = self.number("<Q"), self.number("<Q")
        # The smallest pair: an empty key, a type, one byte. The smallest tensor: no name, one dimension.
        if pairs * 13 + tensors * 32 > self.size - self.position:
            raise self.error(
                f"announces {tensors} tensors and {pairs} metadata pairs, more than its size allows"
            )
        metadata = self.metadata(pairs)
        return GgufInfo(version, metadata, self.tensors(tensors, self.alignment(metadata)))

    def metadata(self, pairs: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string("a metadata key", 65535)
            if not key or key in found:
                raise self.error(f"metadata key {show(key)} is {'given twice' if key else 'empty'}")
            found[key] = self.value(self.number("<I"), key, 0)
        return found

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or value < 1 or value > 1 << 20 or value & (value - 1):
            raise self.error(f"general.alignment is {show(value)}", "a power of two up to 1048576")
        return value

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _BOOL:
            if (byte := self.number("<B")) > 1:
                raise self.error(f"metadata {show(key)}: a bool is {byte}")
            return bool(byte)
        if kind == _STRING:
            return self.string(f"metadata {show(key)}", METADATA_CAP)
        if kind == _ARRAY:
            return self.array(key, depth + 1)
        raise self.error(f"metadata {show(key)} has the unknown type {kind}")

    def array(self, key: str, depth: int) -> Any:
        if depth > _ARRAY_DEPTH:
            raise self.error(f"metadata {show(key)} nests arrays more than {_ARRAY_DEPTH} deep")
        kind, length = self.number("<I"), self.number("<Q")
        smallest = (
            struct.calcsize(_SCALARS[kind]) if kind in _SCALARS else {_STRING: 8, _ARRAY: 12}.get(kind, 1)
        )
        if length * smallest > self.size - self.position:
            raise self.error(f"metadata {show(key)} announces {length} elements, more than the file holds")
        self.items += length
        if self.items > _ITEM_CAP:
            raise self.error(f"its metadata arrays have more than {_ITEM_CAP} elements")
        if kind in _SCALARS and length > _KEPT:
            self.take(length * smallest)
            return ArrayLength(length)
        kept = []
        for index in range(length):
            item = self.value(kind, key, depth)
            if index < _KEPT:
                kept.append(item)
        return tuple(kept) if length <= _KEPT else ArrayLength(length)

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        rows = [self.tensor(alignment) for _ in range(count)]
        start = self.position + -self.position % alignment
        found: dict[str, GgufTensor] = {}
        end, before = start, ""
        for row in sorted(rows, key=lambda tensor: (tensor.offset, tensor.size)):
            here = GgufTensor(row.name, row.shape, row.type, row.offset + start, row.size)
            if here.name in found:
                raise self.error(f"tensor {show(here.name)} is listed twice")
            if here.offset < end:
                raise self.error(f"tensors {show(before)} and {show(here.name)} overlap")
            end, before = here.offset + here.size, here.name
            if end > self.size:
                raise self.error(
                    f"tensor {show(here.name)} ends at byte {end} of {self.size}", "is the download complete?"
                )
            found[here.name] = here
        return found

    def tensor(self, alignment: int) -> GgufTensor:
        """A row whose offset still counts from the start of the data."""
        name = self.string("a tensor name", 1024)
        rank = self.number("<I")
        if not name or not 1 <= rank <= 4:
            raise self.error(f"tensor {show(name)} has {rank} dimensions", "1 to 4, and a name")
        dims = tuple(self.number("<Q") for _ in range(rank))
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in TYPES:
            raise self.error(f"tensor {show(name)} has the unknown type {kind}")
        type_name, block, block_bytes = TYPES[kind]
        if dims[0] % block:
            raise self.error(
                f"tensor {show(name)}: rows of {dims[0]} are not whole {type_name} blocks of {block}"
            )
        size = math.prod(dims) // block * block_bytes
        if 0 in dims or size > self.size or offset > self.size:
            raise self.error(
                f"tensor {show(name)} of shape {dims} and type {type_name} does not fit the file"
            )
        if offset % alignment:
            raise self.error(f"tensor {show(name)} starts at {offset}, not at a multiple of {alignment}")
        return GgufTensor(name, dims[::-1], type_name, offset, size)

    def string(self, what: str, cap: int) -> str:
        length = self.number("<Q")
        if length > min(cap, self.size - self.position):
            raise self.error(f"{what} announces {length} bytes, more than allowed or left")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8 text") from None

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def take(self, count: int) -> bytes:
        if self.position + count > min(self.size, METADATA_CAP):
            what = "ends inside its metadata" if self.size <= METADATA_CAP else "has too much metadata"
            raise self.error(what, "is the download complete?")
        data = self.file.read(count)
        if len(data) != count:
            raise self.error("ends inside its metadata", "is the download complete?")
        self.position += count
        return data

    def error(self, what: str, hint: str = "") -> LoadError:
        return LoadError(what, where=self.where, remedy=hint)
