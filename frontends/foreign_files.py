"""Model formats that are recognised and refused, after looking whether the file is what its name claims."""

from __future__ import annotations

import zipfile
from io import BufferedReader
from pathlib import Path

from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.model_files import open_model_file

_MEMBERS_CAP = 100_000
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""ModelProto field number -> wire type (0 varint, 2 length-delimited), from onnx.proto."""
_IR_VERSION, _GRAPH, _OPSET = 1, 7, 8


def refuse_onnx(path: Path) -> LoadError:
    """The error for an .onnx file: not ONNX at all, or ONNX, which is not ingested."""
    with open_model_file(path) as (file, size):
        fault = _onnx_fault(file, size)
    if fault:
        return LoadError(f"is not an ONNX model: {fault}", where=str(path))
    return LoadError(
        "is an ONNX model; reading ONNX arrives with the export work",
        where=str(path),
        remedy="load the PyTorch model it was exported from",
    )


def _onnx_fault(file: BufferedReader, size: int) -> str:
    """Empty when the top level of the file is a ModelProto: known fields, right wire types, whole lengths."""
    seen: dict[int, int] = {}
    version = 0
    while file.tell() < size:
        at = file.tell()
        tag = _varint(file)
        if tag is None or _ONNX_FIELDS.get(tag >> 3) != tag & 7:
            return f"byte {at} does not start a field of the format"
        value = _varint(file)
        if value is None:
            return f"the field at byte {at} is cut off"
        field = tag >> 3
        if tag & 7 == 2:
            if value > size - file.tell():
                return f"the field at byte {at} announces {value} bytes, more than the file holds"
            file.seek(value, 1)
        elif field == _IR_VERSION:
            version = value
        seen[field] = seen.get(field, 0) + 1
    if not 1 <= version <= 1000:
        return f"its IR version is {version}"
    if seen.get(_GRAPH, 0) != 1 or not seen.get(_OPSET):
        return "it has no graph or no operator set"
    return ""


def _varint(file: BufferedReader) -> int | None:
    """A protobuf varint of at most 64 bits, or None."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value if value < 1 << 64 else None
    return None


def refuse_pt2(path: Path) -> LoadError:
    """The error for a .pt2 file: not such an archive, or one, which PyTorch can only read by unpickling.

    torch 2.13 reads the example inputs of an exported program with `weights_only=False` when the safe reader
    declines them, does the same for tensors stored with `use_pickle`, and unpickles custom objects.
    """
    with open_model_file(path) as (file, _):
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError) as error:
            return LoadError(f"is not a .pt2 archive: {str(error)[:80]!a}", where=str(path))
    if len(names) > _MEMBERS_CAP:
        return LoadError(f"is an archive of {len(names)} members, more than {_MEMBERS_CAP}", where=str(path))
    if not any(
        name.rsplit("/", 1)[-1] in ("archive_format", "serialized_exported_program.json") for name in names
    ):
        return LoadError("is an archive, but not one of torch.export", where=str(path))
    return LoadError(
        "is an exported program; PyTorch can only read it by unpickling, which can run code",
        where=str(path),
        remedy="load the model it was exported from, or give package.module:factory",
    )
