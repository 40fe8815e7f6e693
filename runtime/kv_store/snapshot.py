"""A session on disk: its tensors and metadata, published in one step, refused unless whole and its own.

A snapshot is a folder with `manifest.json` and the safetensors file it names. The manifest appears or is
replaced by a rename, after everything it names was flushed: a process killed at any point leaves the snapshot
that was there before, or the new one, never a mixture. The hashes detect damage, not a forger; nothing read
from a snapshot is executed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from tilewright.runtime.kv_store.errors import KVStoreError
from tilewright.runtime.kv_store.extents import ExtentError, open_private_folder

FORMAT, VERSION = "tilewright-kv-snapshot", 1
MANIFEST = "manifest.json"
MANIFEST_CAP = 1 << 26
"""Bytes."""
_TENSORS = re.compile(r"tensors-[0-9a-f]{32}\.safetensors")
_OURS = re.compile(rf"{_TENSORS.pattern}|manifest-[0-9a-f]{{32}}\.json|manifest\.json")
_CHUNK = 1 << 20


class SnapshotError(KVStoreError):
    """A snapshot cannot be written, or must not be restored; `str()` is one line with the reason."""


@dataclass(frozen=True)
class Snapshot:
    """What was saved."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def save_snapshot(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    model: str,
    tokenizer: str,
    overwrite: bool = False,
) -> None:
    """Save tensors by name, and metadata (plain JSON values), as the snapshot at `folder` (made 0700).

    model, tokenizer: fingerprints that must be the same at `load_snapshot`. SnapshotError where a snapshot is
    there already and `overwrite` is False, for a folder with other files, values JSON lacks, a full disk.
    """
    for name, value in dict(model=model, tokenizer=tokenizer).items():
        if not value:
            raise SnapshotError(f"the fingerprint {name} is empty")
    with _locked(folder) as fd:
        present = os.listdir(fd)
        if foreign := sorted(name for name in present if not _OURS.fullmatch(name)):
            raise SnapshotError(f"{folder} is not a snapshot: it holds {foreign[0][:80]!r}")
        if MANIFEST in present and not overwrite:
            raise SnapshotError(f"{folder} holds a snapshot already: ask for overwrite to replace it")
        token = secrets.token_hex(16)
        data, draft = folder / f"tensors-{token}.safetensors", folder / f"manifest-{token}.json"
        try:
            safetensors.torch.save_file(_separate(tensors), data)
            os.chmod(data, 0o600)
            digest, size = _hash(data, flush=True)
            body = {
                "format": FORMAT,
                "version": VERSION,
                "model": model,
                "tokenizer": tokenizer,
                "tensors": {"file": data.name, "sha256": digest, "bytes": size},
                "metadata": dict(metadata),
            }
            _write_new(draft, _seal(body))
            os.fsync(fd)  # the names, before anything refers to them
            os.rename(draft, folder / MANIFEST)
            os.fsync(fd)
        except (OSError, safetensors.SafetensorError, TypeError, ValueError) as error:
            for path in (data, draft):
                path.unlink(missing_ok=True)
            raise SnapshotError(f"the snapshot at {folder} cannot be written: {_line(error)}") from None
        for name in os.listdir(fd):
            if name not in (MANIFEST, data.name):
                os.unlink(name, dir_fd=fd)  # an earlier snapshot's, or of a process that was killed


def load_snapshot(folder: Path, *, model: str, tokenizer: str) -> Snapshot:
    """The snapshot at `folder`, checked whole; tensors in main memory.

    SnapshotError where there is none, a byte changed, it is of a newer version or another model or tokenizer.
    """
    with _locked(folder, create=False):
        body = _read_manifest(folder)
        for name, mine in dict(model=model, tokenizer=tokenizer).items():
            if body[name] != mine:
                raise SnapshotError(
                    f"the snapshot at {folder} is of another {name}: {body[name][:80]!r}, not {mine[:80]!r}"
                )
        record = body["tensors"]
        if not _TENSORS.fullmatch(record["file"]):
            raise SnapshotError(f"the snapshot at {folder} names a file {record['file'][:80]!r}")
        path = folder / record["file"]
        try:
            found = _hash(path)
            if found != (record["sha256"], record.get("bytes")):
                raise SnapshotError(
                    f"the snapshot at {folder} is damaged: {path.name} has other bytes than were saved"
                )
            tensors = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise SnapshotError(f"the snapshot at {folder} is damaged: {_line(error)}") from None
        return Snapshot(tensors, body["metadata"])


@contextmanager
def _locked(folder: Path, *, create: bool = True) -> Iterator[int]:
    """A descriptor of the private folder, locked against other processes; a killed holder frees it."""
    if not create and not folder.exists():
        raise SnapshotError(f"there is no snapshot at {folder}")
    try:
        fd = open_private_folder(folder)
    except ExtentError as error:
        raise SnapshotError(str(error)) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if create else fcntl.LOCK_SH)
        yield fd
    finally:
        os.close(fd)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as the file format asks; copies only where needed."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        shares = plain.untyped_storage().nbytes() != plain.nbytes or plain.data_ptr() in seen
        result[name] = plain.clone() if shares else plain
        seen.add(result[name].data_ptr())
    return result


def _seal(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    if json.loads(text) != body:
        raise ValueError("metadata holds a value that JSON gives back as another (a tuple, a number as key)")
    return json.dumps({"body": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1).encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The body of the manifest: sealed, of our format and of a version that this code reads."""
    path = folder / MANIFEST
    try:
        with _open_regular(path) as fd:
            data = os.read(fd, MANIFEST_CAP) if os.fstat(fd).st_size <= MANIFEST_CAP else b""
    except FileNotFoundError:
        raise SnapshotError(f"there is no snapshot at {folder}") from None
    except OSError as error:
        raise SnapshotError(f"the snapshot at {folder} is damaged: {_line(error)}") from None
    try:
        outer = json.loads(data)
        body = outer["body"]
        if body["format"] != FORMAT or not isinstance(body["version"], int):
            raise ValueError
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SnapshotError(f"{path} is not the manifest of a snapshot, or is damaged") from None
    if body["version"] > VERSION:  # before the seal: a newer version may seal otherwise
        raise SnapshotError(
            f"the snapshot at {folder} has version {body['version']}; this reads up to {VERSION}"
        )
    if digest != outer.get("sha256"):
        raise SnapshotError(f"the snapshot at {folder} is damaged: its manifest was changed")
    record = body.get("tensors")
    texts = [body.get("model"), body.get("tokenizer")]
    texts += [record.get("file"), record.get("sha256")] if isinstance(record, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not isinstance(body.get("metadata"), dict):
        raise SnapshotError(f"{path} is not the manifest of a snapshot: it lacks a field")
    return dict(body)


@contextmanager
def _open_regular(path: Path) -> Iterator[int]:
    """A descriptor of an own regular file, no link; OSError for anything else."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or info.st_uid != os.geteuid():
            raise OSError(f"{path.name} is not a regular file of this user with one name")
        yield fd
    finally:
        os.close(fd)


def _hash(path: Path, *, flush: bool = False) -> tuple[str, int]:
    """(SHA-256 as hex, bytes) of a file, flushed to disk first if asked."""
    digest, size = hashlib.sha256(), 0
    with _open_regular(path) as fd:
        if flush:
            os.fsync(fd)
        while chunk := os.read(fd, _CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _write_new(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
