"""Files of the artifact store, read without trust: no links, no devices, no pipes, sizes capped."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST, MAC = "manifest.json", "manifest.mac"
FORMAT = "tilewright-store-1"
MANIFEST_CAP = 1 << 22
"""Bytes; an entry of a thousand files needs about 0.1 MB."""
_CHUNK = 1 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class StoreError(RuntimeError):
    """The artifact store cannot be used, or a build did not give a storable result; `str()` is one line."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(" ".join((f"{message} ({remedy})" if remedy else message).split()))


class EntryProblem(Exception):
    """Why a stored entry cannot be trusted; the store answers it by building again."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest holds of one file."""

    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Manifest:
    """The signed description of one entry."""

    key: Mapping[str, str]
    files: Mapping[str, FileRecord]
    created: float
    """Seconds since the epoch."""

    def to_bytes(self) -> bytes:
        """Canonical JSON: what the MAC covers."""
        files = {name: {"sha256": record.sha256, "size": record.size} for name, record in self.files.items()}
        return canonical_json(
            {"format": FORMAT, "key": dict(self.key), "files": files, "created": self.created}
        )

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Parse bytes whose MAC was checked before; raises EntryProblem for another format."""
        try:
            raw: Any = json.loads(data)
            files = {name: FileRecord(str(r["sha256"]), int(r["size"])) for name, r in raw["files"].items()}
            manifest = Manifest({str(k): str(v) for k, v in raw["key"].items()}, files, float(raw["created"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise EntryProblem("its manifest is not one this version writes") from None
        if raw.get("format") != FORMAT:
            raise EntryProblem(f"its manifest has another format than {FORMAT}")
        return manifest


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def key_digest(key: Mapping[str, str]) -> str:
    """SHA-256 (hex) of the canonical key; raises StoreError when a name or a value is not text."""
    if not key:
        raise StoreError("the key of an artifact is empty", remedy="name at least one field")
    for name, value in key.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise StoreError(f"key field {name!r} is {type(value).__name__}; names and values must be str")
    return hashlib.sha256(canonical_json(dict(key))).hexdigest()


def sign(secret: bytes, digest: str, manifest: bytes) -> str:
    """HMAC-SHA256 (hex) over format, entry name and manifest, so that entries cannot be swapped."""
    signed = b"\0".join((FORMAT.encode(), digest.encode(), manifest))
    return hmac.new(secret, signed, hashlib.sha256).hexdigest()


def check_private_folder(path: Path) -> None:
    """Raise StoreError unless `path` is a real folder of this user that nobody else can write."""
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode):
        raise StoreError(f"store folder {path} is a symbolic link", remedy="give the folder it points to")
    if not stat.S_ISDIR(info.st_mode):
        raise StoreError(
            f"store folder {path} is not a folder", remedy="move it away or set TILEWRIGHT_CACHE"
        )
    if info.st_uid != os.geteuid():
        raise StoreError(
            f"store folder {path} belongs to user {info.st_uid}, not to user {os.geteuid()}",
            remedy="set TILEWRIGHT_CACHE to a folder of your own",
        )
    if info.st_mode & 0o022:
        raise StoreError(
            f"store folder {path} can be written by others (mode {stat.S_IMODE(info.st_mode):04o})",
            remedy=f"chmod go-w {path}",
        )


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """A descriptor of the real folder `path`; EntryProblem when it is a link, no folder or foreign."""
    try:
        fd = os.open(path, _READ_FLAGS | os.O_DIRECTORY)
    except OSError as error:
        raise EntryProblem(f"it is not a readable folder ({error.strerror})") from None
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise EntryProblem("its folder is foreign or can be written by others")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def open_regular(name: str, folder: int) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of the regular, singly linked, own file `name`; EntryProblem for anything else."""
    try:
        # A FIFO or a device is never opened at all: opening one may wait or have effects.
        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise EntryProblem(f"{name} is not a regular file")
        fd = os.open(name, _READ_FLAGS, dir_fd=folder)
    except OSError as error:
        raise EntryProblem(f"{name} cannot be opened ({error.strerror})") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise EntryProblem(f"{name} is not a regular file")
        if info.st_nlink != 1:
            raise EntryProblem(f"{name} has {info.st_nlink} hard links")
        if info.st_uid != os.geteuid():
            raise EntryProblem(f"{name} belongs to another user")
        yield fd, info
    finally:
        os.close(fd)


def read_small(name: str, folder: int, cap: int) -> bytes:
    """Content of a file of at most `cap` bytes."""
    with open_regular(name, folder) as (fd, info):
        if info.st_size > cap:
            raise EntryProblem(f"{name} has {info.st_size} bytes, more than {cap}")
        return os.read(fd, cap + 1) if info.st_size else b""


def hash_file(name: str, folder: int, expected_size: int | None = None) -> FileRecord:
    """Hash a file; with `expected_size` a wrong size is an EntryProblem before anything is read."""
    digest, size = hashlib.sha256(), 0
    with open_regular(name, folder) as (fd, info):
        if expected_size is not None and info.st_size != expected_size:
            raise EntryProblem(f"{name} has {info.st_size} bytes, not {expected_size}")
        while chunk := os.read(fd, _CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(digest.hexdigest(), size)


def read_manifest(path: Path, digest: str, secret: bytes) -> Manifest:
    """Manifest of the entry at `path`, MAC checked; raises EntryProblem."""
    with open_folder(path) as folder:
        data = read_small(MANIFEST, folder, MANIFEST_CAP)
        mac = read_small(MAC, folder, 64)
    if not hmac.compare_digest(mac, sign(secret, digest, data).encode()):
        raise EntryProblem("its manifest was not written by this store")
    manifest = Manifest.from_bytes(data)
    if key_digest(manifest.key) != digest:
        raise EntryProblem("its manifest belongs to another entry")
    return manifest


def verify_entry(path: Path, digest: str, secret: bytes) -> Manifest:
    """Check MAC, file list, sizes and hashes of the entry; raises EntryProblem with the first fault."""
    manifest = read_manifest(path, digest, secret)
    with open_folder(path) as folder:
        present = set(os.listdir(folder)) - {MANIFEST, MAC}
        if extra := sorted(present - set(manifest.files)):
            raise EntryProblem(f"{extra[0][:80]!r} was added")
        for name, record in manifest.files.items():
            if hash_file(name, folder, record.size) != record:
                raise EntryProblem(f"{name} has other content than was stored")
    return manifest


def seal(path: Path, key: Mapping[str, str], secret: bytes) -> None:
    """Make the files a build left in `path` an entry: record, sign and flush them to disk.

    Raises StoreError when the build left nothing or something that cannot be stored.
    """
    with open_folder(path) as folder:
        names = sorted(os.listdir(folder))
        if not names:
            raise StoreError("the build of an artifact wrote no file")
        for name in names:
            if not _FILE_NAME.fullmatch(name) or name in (MANIFEST, MAC):
                raise StoreError(
                    f"the build of an artifact wrote a file named {name[:80]!r}, which cannot be stored"
                )
        try:
            files = {name: hash_file(name, folder) for name in names}
        except EntryProblem as problem:
            raise StoreError(
                f"the build of an artifact left something that cannot be stored: {problem}"
            ) from None
        manifest = Manifest(key, files, time.time()).to_bytes()
        digest = key_digest(key)
        write_new(path / MANIFEST, manifest)
        write_new(path / MAC, sign(secret, digest, manifest).encode())
        for name in names:
            os.chmod(name, 0o600, dir_fd=folder)
            with open_regular(name, folder) as (fd, _):
                os.fsync(fd)
        os.fsync(folder)


def write_new(path: Path, data: bytes) -> None:
    """Write and flush a file that must not exist yet, readable by this user only."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's names to disk."""
    fd = os.open(path, _READ_FLAGS | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove whatever lies at `path`, never following a link; absent is fine."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            path.chmod(0o700)  # a planted folder may forbid its own listing
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return


def load_secret(path: Path) -> bytes:
    """The store's MAC key; raises EntryProblem when it is not 32 bytes in a private regular file."""
    with open_folder(path.parent) as folder, open_regular(path.name, folder) as (fd, info):
        if info.st_mode & 0o077:
            raise EntryProblem(f"{path.name} can be read by others")
        secret = os.read(fd, 33)
    if len(secret) != 32:
        raise EntryProblem(f"{path.name} has not 32 bytes")
    return secret


def new_secret(path: Path) -> bytes:
    """Put a fresh random key at `path`, atomically; the caller holds the store's key lock."""
    secret = secrets.token_bytes(32)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    write_new(draft, secret)
    remove(path)
    os.rename(draft, path)
    sync_folder(path.parent)
    return secret


def signature(path: Path) -> tuple[tuple[object, ...], float]:
    """(identity, newest change time in seconds) of an entry's folder and files, from metadata alone.

    Any later write, rename, link or replacement changes the identity: ctime cannot be set by a program.
    Raises EntryProblem when `path` is not a readable folder.
    """
    parts: list[tuple[object, ...]] = []
    newest = 0.0
    try:
        infos = [(name, os.lstat(path / name)) for name in ["", *sorted(os.listdir(path))]]
    except OSError as error:
        raise EntryProblem(f"it cannot be listed ({error.strerror})") from None
    for name, info in infos:
        parts.append(
            (name, info.st_dev, info.st_ino, info.st_mode, info.st_nlink, info.st_size, info.st_ctime_ns)
        )
        newest = max(newest, info.st_ctime)
    return tuple(parts), newest
