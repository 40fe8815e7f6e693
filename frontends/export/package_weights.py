"""The weights of an exported package: safetensors files beside its programs, which share what is equal.

A weight is named after its content, so that prefill and decode of one model have one copy of it, on disk and
in memory. What a compiler adds to a program on its own is named after the program.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tilewright.compiler.described_tensors import DTYPES
from tilewright.compiler.diagnostics import LoadError
from tilewright.frontends.model_files import open_model_file, show
from tilewright.frontends.safetensors_check import check_safetensors


def content_name(tensor: Tensor) -> str:
    """A name that tensors of equal dtype, shape and values share, a legal identifier."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(_bytes(tensor.contiguous()).numpy().data)
    return f"w{digest.hexdigest()[:32]}"


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """A safetensors file of these; tensors that share memory get their own."""
    whole: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        if alone and whole.setdefault(storage.data_ptr(), tensor) is tensor:
            continue
        weights = {**weights, name: tensor.clone(memory_format=torch.contiguous_format)}
    save_file(dict(weights), path)


class Weights:
    """Tensors by name, whose memory ends with this object.

    PyTorch's loader keeps a reference to each tensor that it was given without copying it, for ever.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        weakref.finalize(self, _empty, list(tensors.values()))

    def of(self, program: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Those that one program asks for, by the names it knows them by; KeyError for one not there."""
        tensors = self._tensors
        return {n: tensors[n] if n in tensors else tensors[own_name(program, n)] for n in names}


def _empty(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.set_()  # type: ignore[call-overload]


def read_weights(paths: Iterable[Path]) -> Weights:
    """All tensors of files that `write_weights` wrote, in memory of their own; LoadError for other files."""
    found = dict[str, Tensor]()
    for path in paths:
        rows = check_safetensors(path)
        with open_model_file(path) as (file, _):
            for name, row in sorted(rows.items(), key=lambda item: item[1].start):
                if row.dtype not in DTYPES:
                    raise LoadError(f"{show(name)} has the dtype {row.dtype}", where=str(path))
                tensor = torch.empty(row.shape, dtype=DTYPES[row.dtype])
                file.seek(row.start)
                if file.readinto(_bytes(tensor).numpy().data) != tensor.nbytes:
                    raise LoadError("became shorter while it was read", where=str(path))
                found[name] = tensor
    return Weights(found)


def own_name(program: str, name: str) -> str:
    """The name in a file of what a compiler added to one program."""
    return f"{program}.{name}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
