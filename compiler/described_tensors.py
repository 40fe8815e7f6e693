"""Files of tensors that a text describes: safetensors, with a format's name and JSON in its metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tilewright.compiler.diagnostics import LoadError
from tilewright.compiler.paging import page_out
from tilewright.compiler.whole_file import written_whole

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By the format's names."""
_MAX_BYTES = 16 << 30
_ALIGNED = 8
"""Bytes: where the data begins."""


def write_described(path: Path, format: str, head: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write one file, complete or not at all, tensor by tensor: those that map a file leave memory again."""
    metadata = {"format": format, "statistics": json.dumps(head, sort_keys=True)}
    names = {dtype: name for name, dtype in DTYPES.items()}
    # The widest first, so that each begins at a multiple of its size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        value = tensors[name]
        row = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        header[name] = row
    text = json.dumps(header).encode()
    text = text.ljust(math.ceil(len(text) / _ALIGNED) * _ALIGNED)
    with written_whole(path) as file, file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name in order:
            value = tensors[name].detach()
            out.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            page_out(value)


@contextmanager
def read_described(path: Path, format: str, *, missing: str, remedy: str) -> Iterator[tuple[Any, Any]]:
    """(what the JSON says, the open file) of a file that `write_described` wrote.

    LoadError for any other: `missing` says what one of another format is not. What the block raises over
    the contents (ValueError, KeyError, TypeError, AttributeError) becomes a LoadError too.
    """
    where = str(path)
    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise LoadError(f"is larger than {_MAX_BYTES} bytes", where=where)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise LoadError(missing, where=where, remedy=remedy)
            yield json.loads(metadata["statistics"]), file
    except OSError as error:
        raise LoadError(f"cannot be read: {error.strerror or error}", where=where) from error
    except SafetensorError as error:
        raise LoadError(f"{missing}: it is damaged: {error}", where=where, remedy=remedy) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"is damaged: {error}", where=where) from error
