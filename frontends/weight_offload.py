"""Weights that compiled kernels no longer read leave memory: the module's tensors become maps of a file."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.paging import SCRATCH, give_back_freed, mapped


def offload_weights(model: nn.Module, folder: Path | str = SCRATCH) -> int:
    """Move the storage of every CPU parameter and buffer of `model` to a file; returns the bytes moved.

    Call it after the first calls of a compiled, quantized model: what its kernels read are weights derived
    from the module's, and the module's own need not stay in memory. Values, shapes, strides, aliases within
    the module and identities stay; the model still runs in eager mode, compiles again, and may be updated in
    place (a page that is written becomes memory again). A page is read from the file when something reads
    it, so weights that are still in use cost their first read.

    The file has no name: it goes with the last tensor that maps it, whatever ends the process. `folder`
    should lie on a disk; in a memory file system nothing is gained. Tensors outside of the module that share
    storage with it (a view that the caller holds) keep the old storage.

    Raises OptionError, with the model unchanged, where the folder cannot be written or is full.
    """
    groups: dict[int, list[Tensor]] = {}
    for tensor in _plain(chain(model.parameters(), model.buffers())):
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    if not groups:
        return 0
    moved = 0
    try:
        maps = [mapped(group[0].untyped_storage(), Path(folder)) for group in groups.values()]
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"folder = {str(folder)!r}: {reason}", remedy="give a folder with room") from None
    with torch.no_grad():
        for group, storage in zip(groups.values(), maps, strict=True):
            moved += storage.nbytes()
            for tensor in group:
                where = (tensor.storage_offset(), tensor.shape, tensor.stride())
                tensor.data = torch.empty(0, dtype=tensor.dtype).set_(storage, *where)  # type: ignore[call-overload]
    give_back_freed()
    return moved


def _plain(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Dense tensors of this machine's memory that hold something; each once."""
    found = {
        id(t): t
        for t in tensors
        if type(t.data) is Tensor and t.device.type == "cpu" and t.layout == torch.strided and t.numel()
    }
    return list(found.values())
