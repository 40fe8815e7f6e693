"""Letting go of memory that a file still holds, or that nothing holds."""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from pathlib import Path
from typing import cast

import torch

from tilewright.compiler.diagnostics import OptionError

SCRATCH = "/var/tmp"
"""A folder that lies on a disk, where the system keeps temporary files elsewhere in memory."""
_MADV_DONTNEED = 4
"""Of a shared map of a file: its pages leave the process, what was written to them too is the file's."""
_MADV_PAGEOUT = 21
"""Linux 5.4: pages that a file holds leave memory and are read again when used; written ones stay."""
_PIECE = 1 << 24


def mapped(storage: torch.UntypedStorage, folder: Path, *, shared: bool = False) -> torch.UntypedStorage:
    """A map of a nameless file that holds the bytes of `storage`; OSError where the folder takes none.

    What is written to it becomes memory, or where it is shared, is the file's. The file goes with the last
    tensor that maps it, whatever ends the process. `folder` should lie on a disk.
    """
    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data  # type: ignore[call-overload]
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        at = 0
        while at < len(data):
            at += file.write(data[at : at + _PIECE])
        found = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.fileno()}", shared, len(data))
        return cast(torch.UntypedStorage, found)


def in_a_file(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """A CPU tensor with the same values, contiguous, that a file holds: `page_out` takes it out of memory.

    Other tensors, and all where the system has no such maps, are given back as they are. Raises OptionError
    where the folder takes no file.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < mmap.PAGESIZE:
        return tensor
    held = tensor.detach().contiguous()
    size = held.numel() * held.element_size()
    if held.untyped_storage().nbytes() != size:
        held = held.clone()
    try:
        storage = mapped(held.untyped_storage(), folder, shared=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OptionError(f"folder = {str(folder)!r}: {reason}", remedy="give a folder with room") from None
    found = torch.empty(0, dtype=held.dtype).set_(storage)  # type: ignore[call-overload]
    return found.reshape(held.shape)


def page_out(tensor: torch.Tensor) -> bool:
    """Let the whole pages of a CPU tensor that maps a file leave memory; values stay.

    A hint: nothing happens to other tensors, and where the system does not know it. Returns whether a
    file holds whole pages of it. Pages of a shared map leave the process and stay with the system.
    """
    plain = type(tensor.data) is torch.Tensor and tensor.layout == torch.strided
    if sys.platform != "linux" or not plain or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    access = _file_access(first) if length > 0 else None
    if access is None:
        return False
    advice = _MADV_DONTNEED if access.endswith("s") else _MADV_PAGEOUT
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)
    return True


def give_back_freed() -> None:
    """What is freed inside of the C library's heap goes back to the system (glibc keeps it otherwise)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _file_access(address: int) -> str | None:
    """How the mapping that holds an address may be used, as `rw-s`, where a file is behind it."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    for line in maps.splitlines():
        span, access, _, _, inode = line.split()[:5]
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return access if inode != "0" else None
    return None
