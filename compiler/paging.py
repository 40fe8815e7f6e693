"""Letting go of memory that a file still holds, or that nothing holds."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch

_MADV_PAGEOUT = 21
"""Linux 5.4: pages that a file holds leave memory and are read again when used; written ones stay."""


def page_out(tensor: torch.Tensor) -> bool:
    """Let the whole pages of a CPU tensor that maps a file leave memory; values stay.

    A hint: nothing happens to other tensors, and where the system does not know it. Returns whether a
    file holds whole pages of it.
    """
    plain = type(tensor.data) is torch.Tensor and tensor.layout == torch.strided
    if sys.platform != "linux" or not plain or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length <= 0 or not _maps_a_file(first):
        return False
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_PAGEOUT)
    return True


def give_back_freed() -> None:
    """What is freed inside of the C library's heap goes back to the system (glibc keeps it otherwise)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _maps_a_file(address: int) -> bool:
    """Whether the mapping that holds an address has a file behind it."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    for line in maps.splitlines():
        span, _, _, _, inode = line.split()[:5]
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return inode != "0"
    return False
