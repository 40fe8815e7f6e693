"""Extents of keys and values on disk: fixed size, checksummed, read past the page cache.

An extent is a run of pages of one layer, its keys and then its values, and the unit of every transfer. The
file of a session has no name once it is open, so it goes with its process however that ends, nobody else can
open it, and sessions or processes that share a folder cannot meet in it. Memory-mapped access is never used:
faults of 4 KiB read a cold disk many times slower than one request per extent.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import secrets
import stat
import threading
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilewright.runtime.kv_store.errors import KVStoreError

BLOCK = 4096
"""Bytes; extents are a multiple of it, as reads past the page cache ask."""
LEAST_EXTENT = 1 << 18
"""Bytes; below this a disk is bound by the number of requests."""


class ExtentError(KVStoreError):
    """An extent cannot be written or read back unchanged; what is in memory is as it was."""


class ExtentStore(Protocol):
    """A slow tier of one session: whole extents by id.

    Calls may run on several threads at once, of one extent only reads. An extent may change while it is
    written: that version is then never read.
    """

    label: str
    """What the tier is, for reports."""

    def write(self, extent: Hashable, version: int, data: Tensor) -> bool:
        """Keep uint8 [extent_bytes]; False where this version is kept already. ExtentError where it fails."""

    def read_all(self, extents: Sequence[Hashable], outs: Sequence[Tensor]) -> dict[Hashable, ExtentError]:
        """Fill outs[i], uint8 [extent_bytes], with extents[i]; the errors of those that are absent, short or
        changed, which stop no other. In few steps that hold the interpreter: for each somebody who computes
        meanwhile has to wait."""

    def drop(self, extent: Hashable) -> None:
        """Forget an extent; absent is fine."""

    def close(self) -> None:
        """Give everything back."""


class FileIO:
    """The calls an extent file makes of the system: what a test replaces to inject faults."""

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Bytes read at `offset`; fewer than asked at the end of the file or after a signal."""
        return os.preadv(fd, [buffer], offset)

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Bytes written at `offset`."""
        return os.pwrite(fd, buffer, offset)

    def past_cache(self, fd: int) -> bool:
        """Ask for transfers past the page cache; False where the file system or the platform has none."""
        if not hasattr(os, "O_DIRECT"):
            return False
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def forget(self, fd: int, offset: int, size: int) -> None:
        """Drop a range from the page cache, where the platform can."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class ExtentPool:
    """Frames of extents as pools of pages, k and v [N, Hkv, P, D].

    Entries are as close as the sizes of pages and extents allow: pages named by other entries overlap.
    """

    k: Tensor
    v: Tensor
    step: int
    """Entries from one frame to the next."""
    pages: NDArray[np.int32]
    """Of each page of an extent, entries from the first."""

    def table(self, frames: list[int]) -> Tensor:
        """int32 [n, pages]: entry [i, p] is page p of the extent in frames[i]."""
        # By numpy, which keeps the interpreter: transfer threads would take it at each of these steps.
        starts = np.array(frames, dtype=np.int32)[:, None] * np.int32(self.step)
        return torch.from_numpy(starts + self.pages)


@dataclass(frozen=True)
class ExtentLayout:
    """How `pages` pages of a layer lie in an extent: k [pages, Hkv, P, D], then v [pages, Hkv, P, E]."""

    pages: int
    heads: int
    page: int
    size: int
    value_size: int
    dtype: torch.dtype

    @property
    def k_bytes(self) -> int:
        """Bytes of the keys."""
        return self.pages * self.heads * self.page * self.size * self.dtype.itemsize

    @property
    def one_size(self) -> bool:
        """Whether keys and values are of one size."""
        return self.size == self.value_size

    @property
    def used_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.k_bytes + self.pages * self.heads * self.page * self.value_size * self.dtype.itemsize

    @property
    def extent_bytes(self) -> int:
        """Bytes on disk: `used_bytes` rounded up to whole blocks."""
        return -(-self.used_bytes // BLOCK) * BLOCK

    @staticmethod
    def of(k_pages: Tensor, v_pages: Tensor, least: int = LEAST_EXTENT) -> ExtentLayout:
        """The fewest pages of these pools ([N, Hkv, P, D] and [N, Hkv, P, E]) that make `least` bytes."""
        if k_pages.dim() != 4 or k_pages.shape[:3] != v_pages.shape[:3] or k_pages.dtype != v_pages.dtype:
            raise KVStoreError(
                f"pages are [N, Hkv, P, D] and [N, Hkv, P, E] of one type, not {list(k_pages.shape)} "
                f"{k_pages.dtype} and {list(v_pages.shape)} {v_pages.dtype}"
            )
        heads, page, size = k_pages.shape[1:]
        one = ExtentLayout(1, heads, page, size, v_pages.shape[3], k_pages.dtype)
        return ExtentLayout(-(-least // one.used_bytes), heads, page, size, v_pages.shape[3], k_pages.dtype)

    def views(self, extent: Tensor) -> tuple[Tensor, Tensor]:
        """(k, v) of an extent's bytes, sharing its memory: attention can read them where they lie."""
        if extent.dtype != torch.uint8 or extent.shape != (self.extent_bytes,):
            raise KVStoreError(
                f"an extent is uint8 [{self.extent_bytes}], not {extent.dtype} {list(extent.shape)}"
            )
        k = extent[: self.k_bytes].view(self.dtype)
        v = extent[self.k_bytes : self.used_bytes].view(self.dtype)
        return (
            k.view(self.pages, self.heads, self.page, self.size),
            v.view(self.pages, self.heads, self.page, self.value_size),
        )

    def pool(self, extents: Tensor) -> ExtentPool:
        """The pages of uint8 [frames, extent_bytes], in the memory where they lie. KVStoreError where keys
        and values differ in size: no table would serve both."""
        if not self.one_size:
            raise KVStoreError(f"keys of {self.size} and values of {self.value_size}: expected one size")
        page, extent = self.heads * self.page * self.size, self.extent_bytes // self.dtype.itemsize
        step = math.gcd(page, extent)
        count = ((len(extents) - 1) * extent + (self.pages - 1) * page) // step + 1
        flat = extents.view(-1).view(self.dtype)
        shape = (count, self.heads, self.page, self.size)
        strides = (step, self.page * self.size, self.size, 1)
        k, v = (
            flat.as_strided(shape, strides, flat.storage_offset() + start) for start in (0, self.pages * page)
        )
        return ExtentPool(k, v, extent // step, np.arange(self.pages, dtype=np.int32) * (page // step))

    def pack(self, k_pages: Tensor, v_pages: Tensor, pages: list[int], extent: Tensor) -> None:
        """Copy up to `self.pages` pages of a layer's pools into an extent, in the order given."""
        if not 0 < len(pages) <= self.pages:
            raise KVStoreError(f"an extent holds 1 to {self.pages} pages, not {len(pages)}")
        for view, pool in zip(self.views(extent), (k_pages, v_pages), strict=True):
            view[: len(pages)] = pool[pages]

    def unpack(self, extent: Tensor, k_pages: Tensor, v_pages: Tensor, pages: list[int]) -> None:
        """Copy the first `len(pages)` pages of an extent into places of a layer's pools."""
        for view, pool in zip(self.views(extent), (k_pages, v_pages), strict=True):
            pool[pages] = view[: len(pages)]


def aligned(size: int) -> Tensor:
    """uint8 [size] that begins at a page of memory, zeroed: what transfers past the cache need."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def checksum(data: Tensor) -> int:
    """64 bits over uint8 [n * BLOCK]: CRC-32 of the word sums of rows and of columns of 4 KiB.

    Any changed byte, torn block or pair of swapped blocks is seen; it is no defence against a forger. Three
    to five times as fast as CRC-32 of everything, which takes about as long as the read it would check.
    """
    words = data.numpy().view(np.uint64).reshape(-1, BLOCK // 8)
    return zlib.crc32(words.sum(0)) << 32 | zlib.crc32(words.sum(1))


def open_private_folder(folder: Path) -> int:
    """A descriptor of `folder`, made with mode 0700 if absent.

    ExtentError for a link, a file, or a folder that another user owns or can write.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ExtentError(f"folder {folder} cannot be used: {error.strerror}") from None
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o022:
        os.close(fd)
        raise ExtentError(f"folder {folder} is of another user, or others can write it (want 0700)")
    return fd


@dataclass
class _Record:
    slot: int
    version: int
    checksum: int


class ExtentFile:
    """The extents of one session in one file without a name."""

    def __init__(self, folder: Path, extent_bytes: int, io: FileIO | None = None) -> None:
        """extent_bytes: a multiple of BLOCK. KVStoreError for another size, ExtentError for the folder."""
        if extent_bytes < BLOCK or extent_bytes % BLOCK:
            raise KVStoreError(f"extent_bytes = {extent_bytes}: expected a multiple of {BLOCK}, at least it")
        self.extent_bytes = extent_bytes
        self._io = io or FileIO()
        self._records: dict[Hashable, _Record] = {}
        self._free: list[int] = []
        self._slots = 0
        self._places = threading.Lock()
        """Held while a place in the file is taken or given back, never during a transfer."""
        parent = open_private_folder(folder)
        try:
            name = f"session-{secrets.token_hex(16)}.kv"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(name, flags, 0o600, dir_fd=parent)
            os.unlink(name, dir_fd=parent)
        except OSError as error:
            raise ExtentError(f"no session file in {folder}: {error.strerror}") from None
        finally:
            os.close(parent)
        self.direct = self._io.past_cache(self._fd)
        """Whether transfers go past the page cache; else each range is dropped from it after use."""
        self.label = "disk (O_DIRECT)" if self.direct else "disk (page cache dropped after use)"

    @property
    def disk_bytes(self) -> int:
        """Bytes of the file."""
        return self._slots * self.extent_bytes

    def write(self, extent: Hashable, version: int, data: Tensor) -> bool:
        """Keep an extent; False, and nothing written, where this version of it is kept already.

        data: uint8 [extent_bytes], aligned to BLOCK. ExtentError where the disk is full or fails: the extent
        is then not on disk at all, in no version.
        """
        self._check(data)
        record = self._records.get(extent)
        if record is not None and record.version == version:
            return False
        with self._places:
            self._records.pop(extent, None)  # a write that fails halfway leaves neither version
            slot = record.slot if record else self._free.pop() if self._free else self._slots
            self._slots = max(self._slots, slot + 1)
        try:
            self._transfer(data, slot, write=True)
        except ExtentError:
            with self._places:
                self._free.append(slot)
            raise
        self._records[extent] = _Record(slot, version, checksum(data))
        return True

    def read_all(self, extents: Sequence[Hashable], outs: Sequence[Tensor]) -> dict[Hashable, ExtentError]:
        """Fill outs[i] with extents[i] as `read` does; the errors of those that it would raise."""
        errors = {}
        for extent, out in zip(extents, outs, strict=True):
            try:
                self.read(extent, out)
            except ExtentError as error:
                errors[extent] = error
        return errors

    def read(self, extent: Hashable, out: Tensor) -> None:
        """Fill `out`, uint8 [extent_bytes] aligned to BLOCK; ExtentError for a short or changed extent."""
        self._check(out)
        record = self._records.get(extent)
        if record is None:
            raise ExtentError(f"extent {extent} is not on disk")
        self._transfer(out, record.slot, write=False)
        if checksum(out) != record.checksum:
            raise ExtentError(f"extent {extent} on disk has other bytes than were written (checksum)")

    def drop(self, extent: Hashable) -> None:
        """Forget an extent; its place is used again."""
        with self._places:
            if record := self._records.pop(extent, None):
                self._free.append(record.slot)

    def close(self) -> None:
        """Close the file, which removes it; no transfer may be under way. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._records.clear()

    def _check(self, data: Tensor) -> None:
        if self._fd < 0:
            raise ExtentError("the session's file is closed")
        if data.dtype != torch.uint8 or data.shape != (self.extent_bytes,) or data.data_ptr() % BLOCK:
            raise KVStoreError(
                f"an extent is uint8 [{self.extent_bytes}] aligned to {BLOCK} bytes, not {data.dtype} "
                f"{list(data.shape)} at {data.data_ptr() % BLOCK} past a block"
            )

    def _transfer(self, data: Tensor, slot: int, *, write: bool) -> None:
        """One whole extent; the system may do it in parts."""
        done, start = 0, slot * self.extent_bytes
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        call, what = (self._io.pwrite, "writing") if write else (self._io.pread, "reading")
        while done < self.extent_bytes:
            try:
                part = call(self._fd, view[done:], start + done)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                reason = "the disk is full" if full else str(error.strerror)
                raise ExtentError(f"{what} an extent of {self.extent_bytes} bytes: {reason}") from None
            if done + part < self.extent_bytes:
                part -= part % BLOCK  # past the cache, the next request must begin at a block
            if part <= 0:
                raise ExtentError(f"{what} an extent: short, {done} of {self.extent_bytes} bytes")
            done += part
        if not self.direct:
            if write:
                os.fsync(self._fd)  # pages not yet on disk cannot be dropped from the cache
            self._io.forget(self._fd, start, self.extent_bytes)
