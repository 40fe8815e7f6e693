"""Files of tensors that a text describes: safetensors, with a format's name and JSON in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tilewright.compiler.diagnostics import LoadError
from tilewright.compiler.whole_file import written_whole

_MAX_BYTES = 16 << 30


def write_described(path: Path, format: str, head: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write one file, complete or not at all."""
    metadata = {"format": format, "statistics": json.dumps(head, sort_keys=True)}
    with written_whole(path) as file:
        save_file(tensors, file, metadata=metadata)


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
