"""The folder an export leaves: written beside its place, flushed, described, then renamed into it.

Under the final name there is either nothing or a whole artifact: files, and a manifest with the SHA-256 of
each of them and of itself. Imports no torch, so that `tilewright verify` starts quickly.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tilewright.compiler.diagnostics import ExportError, LoadError
from tilewright.frontends.model_files import parse_json_object, read_capped, show

FORMAT = "tilewright-artifact-1"
MANIFEST = "manifest.json"
MANIFEST_CAP = 16 << 20
"""Bytes; ten thousand files need about 2 MB."""
_DEPTH, _FILES_CAP = 4, 100_000
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")
_UNFINISHED = ".tilewright-unfinished-"
_CHUNK = 1 << 20


class Artifact:
    """An artifact that is being written; `finish` describes it and puts it under its final name."""

    def __init__(self, final: Path, folder: Path) -> None:
        self.final = final
        self.folder = folder
        self.finished = False

    def path(self, name: str) -> Path:
        """Where to write the file `name` (`weights.data`, `sm_90/kernel.cubin`); its folders are made."""
        if not is_safe(name) or name == MANIFEST:
            raise ExportError(f"an export may not hold a file named {show(name)}")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: str | bytes) -> None:
        """Write one whole file."""
        self.path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    def finish(self, description: Mapping[str, Any]) -> None:
        """Record every file, flush all to disk and rename; the artifact exists from then on."""
        files = {}
        for name in sorted(_names(self.folder)):
            digest, size = _digest(self.folder / name, flush=True)
            files[name] = {"sha256": digest, "bytes": size}
        if not files:
            raise ExportError("the export wrote no file")
        with (self.folder / MANIFEST).open("xb") as file:
            file.write(render({**description, "format": FORMAT, "files": files}))
            file.flush()
            os.fsync(file.fileno())
        for folder in {self.folder, *(self.folder / name for name in _folders(self.folder))}:
            _flush_folder(folder)
        if os.path.lexists(self.final):
            raise _exists(self.final)
        os.rename(self.folder, self.final)
        self.finished = True
        _flush_folder(self.final.parent)


@contextlib.contextmanager
def new_artifact(final: Path) -> Iterator[Artifact]:
    """An artifact to fill and to `finish`; whatever goes wrong before that leaves nothing behind.

    Also removes what exports to the same place left that were killed. ExportError: the place is taken, its
    parent is no folder, the disk is full.
    """
    final = check_place(final)
    _sweep(final)
    folder = final.parent / f"{_prefix(final)}{secrets.token_hex(8)}"
    try:
        folder.mkdir(mode=0o700)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_write(final, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        artifact = Artifact(final, folder)
        yield artifact
        if not artifact.finished:
            raise ExportError("the export ended without a manifest", where=str(final))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES):
            raise _cannot_write(final, error) from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _exists(final) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_place(final: Path) -> Path:
    """The absolute path of a new artifact; ExportError when something lies there or its parent is absent."""
    final = Path(os.path.abspath(final))
    if os.path.lexists(final):
        raise _exists(final)
    if not final.parent.is_dir():
        raise ExportError("its parent folder does not exist", where=str(final))
    return final


def render(description: Mapping[str, Any]) -> bytes:
    """The one byte form of a manifest; its field `checksum` is the SHA-256 of the form without it."""
    body = {key: value for key, value in description.items() if key != "checksum"}
    checksum = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "checksum": checksum})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, its checksum and form checked; LoadError otherwise."""
    path = _regular(folder, MANIFEST)
    data = read_capped(path, MANIFEST_CAP)
    manifest = parse_json_object(data, str(path))
    if manifest.get("format") != FORMAT:
        raise LoadError(f"its format is {show(manifest.get('format'))}, not {FORMAT}", where=str(path))
    if render(manifest) != data:
        raise LoadError("it was changed after the export", where=str(path), remedy="export again")
    for name, record in _files_of(manifest).items():
        if not is_safe(name) or name == MANIFEST or not _is_record(record):
            raise LoadError(f"it lists the file {show(name)}, which no export writes", where=str(path))
    return manifest


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds the manifest of an export, in whatever state the rest is."""
    path = folder / MANIFEST
    return path.is_file() and FORMAT.encode() in read_capped(path, MANIFEST_CAP)


def faults(folder: Path) -> list[str]:
    """Everything that is not as the export left it, one line each; empty for an intact artifact.

    LoadError when `folder` holds no readable manifest.
    """
    if not folder.is_dir():
        raise LoadError("is not a folder", where=show(str(folder))[1:-1])
    listed = _files_of(read_manifest(folder))
    present, found = _survey(folder)
    found += [f"{name}: is missing" for name in sorted(listed.keys() - present)]
    found += [f"{name}: was added" for name in sorted(present - listed.keys() - {MANIFEST})]
    for name in sorted(present & listed.keys()):
        digest, size = _digest(folder / name)
        if size != listed[name]["bytes"]:
            found.append(f"{name}: has {size} bytes, not {listed[name]['bytes']}")
        elif digest != listed[name]["sha256"]:
            found.append(f"{name}: its content was changed")
    wanted = {str(parent) for name in listed for parent in PurePosixPath(name).parents if parent.name}
    found += [f"{name}: was added" for name in sorted(_folders(folder) - wanted)]
    return found


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact whose every file was checked; LoadError with the first fault."""
    found = faults(folder)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise LoadError(f"{found[0]}{more}", where=str(folder), remedy="export again")
    return read_manifest(folder)


def _files_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    files = manifest.get("files")
    return files if isinstance(files, dict) else {}


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or record.keys() != {"sha256", "bytes"}:
        return False
    return type(record["bytes"]) is int and isinstance(record["sha256"], str)


def is_safe(name: object) -> bool:
    """True for a relative path of at most four plain parts."""
    if not isinstance(name, str):
        return False
    parts = name.split("/")
    return len(parts) <= _DEPTH and all(_PART.fullmatch(p) and not p.endswith(".") for p in parts)


def _regular(folder: Path, name: str) -> Path:
    path = folder / name
    try:
        info = path.lstat()
    except OSError as error:
        raise LoadError((error.strerror or "unreadable").lower(), where=show(str(path))[1:-1]) from None
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        raise LoadError("is not a regular file of its own", where=show(str(path))[1:-1])
    return path


def _survey(folder: Path) -> tuple[set[str], list[str]]:
    """(names of plain files below the folder, a fault for each thing that is not one). Follows no link."""
    plain, odd, waiting = set[str](), list[str](), [""]
    while waiting:
        at = waiting.pop()
        for entry in os.scandir(folder / at):
            name = f"{at}{entry.name}"
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(info.st_mode):
                odd.append(f"{show(name)[1:-1]}: is a symbolic link")
            elif stat.S_ISDIR(info.st_mode) and name.count("/") < _DEPTH:
                waiting.append(f"{name}/")
            elif not stat.S_ISREG(info.st_mode):
                odd.append(f"{show(name)[1:-1]}: is not a regular file")
            elif info.st_nlink != 1:
                odd.append(f"{show(name)[1:-1]}: has {info.st_nlink} hard links")
            elif not is_safe(name):
                odd.append(f"{show(name)[1:-1]}: was added")
            else:
                plain.add(name)
            if len(plain) + len(odd) > _FILES_CAP:
                raise LoadError(f"holds more than {_FILES_CAP} files", where=str(folder))
    return plain, odd


def _names(folder: Path) -> set[str]:
    plain, odd = _survey(folder)
    if odd:
        raise ExportError(f"the export left {odd[0]}")
    return plain


def _folders(folder: Path) -> set[str]:
    return {os.path.relpath(root, folder) for root, _, _ in os.walk(folder)} - {"."}


def _digest(path: Path, *, flush: bool = False) -> tuple[str, int]:
    """(SHA-256 in hex, bytes) of a file."""
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while chunk := os.read(fd, _CHUNK):
            digest.update(chunk)
            size += len(chunk)
        if flush:
            os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest(), size


def _canonical(value: Any) -> bytes:
    """Readable JSON of one form: sorted keys, one space of indentation, ASCII, a last newline."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _prefix(final: Path) -> str:
    return f"{_UNFINISHED}{hashlib.sha256(final.name.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}-"


def _sweep(final: Path) -> None:
    """Remove unfinished exports to the same place whose process is gone: nobody holds their lock."""
    prefix = _prefix(final)
    for name in os.listdir(final.parent):
        path = final.parent / name
        if not name.startswith(prefix) or path.is_symlink():
            continue
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # swept by another export meanwhile
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # its export is still running
        finally:
            os.close(lock)


def _exists(final: Path) -> ExportError:
    return ExportError("already exists", where=str(final), remedy="name a folder that does not exist yet")


def _cannot_write(final: Path, error: OSError) -> ExportError:
    reason = (error.strerror or "input/output error").lower()
    return ExportError(f"cannot be written: {reason}", where=str(final), remedy="nothing was left there")
