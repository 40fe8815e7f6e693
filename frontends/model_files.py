"""Reading files somebody else made: regular files only, paths that stay inside their folder, strict JSON."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from tilewright.compiler.diagnostics import LoadError

JSON_CAP = 16 << 20
"""Bytes of a configuration or index file; the largest published indices have 2 MB."""
_JSON_DEPTH = 64
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,254}")


def show(name: object) -> str:
    """A name out of a file, fit for one line of an error: escaped and cut."""
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def model_file(path: Path) -> Path:
    """The regular file the user named (links they give themselves are followed); LoadError otherwise."""
    try:
        info = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a legal path"
        raise LoadError(reason.lower(), where=show(str(path))) from None
    if not stat.S_ISREG(info.st_mode):
        raise LoadError(
            "is not a regular file", where=str(path), remedy="give a file, not a folder or a device"
        )
    return path


def file_inside(folder: Path, name: str) -> Path:
    """`folder/name` for a name read from a file or listed in a folder: bare, regular, no link of either kind.

    Raises LoadError; the name never reaches the file system unless it is a bare name of ordinary characters.
    """
    if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name) or name.endswith("."):
        raise LoadError(
            f"names the file {show(name)}",
            where=str(folder),
            remedy="it must be a bare file name inside the folder",
        )
    path = folder / name
    try:
        info = path.lstat()
    except OSError as error:
        raise LoadError(f"{name}: {(error.strerror or 'unreadable').lower()}", where=str(folder)) from None
    if stat.S_ISLNK(info.st_mode):
        raise LoadError("is a symbolic link", where=str(path), remedy="copy the folder with cp -rL")
    if not stat.S_ISREG(info.st_mode):
        raise LoadError("is not a regular file", where=str(path))
    if info.st_nlink != 1:
        raise LoadError(
            f"has {info.st_nlink} hard links",
            where=str(path),
            remedy="copy it, so that nothing else can change it",
        )
    return path


@contextmanager
def open_model_file(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """(open file, size in bytes) of a regular file; never waits on a pipe. LoadError if it will not open."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise LoadError((error.strerror or "unreadable").lower(), where=str(path)) from None
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise LoadError("is not a regular file", where=str(path))
        yield file, info.st_size


def read_capped(path: Path, cap: int) -> bytes:
    """The whole file; LoadError when it has more than `cap` bytes."""
    with open_model_file(path) as (file, size):
        if size > cap:
            raise LoadError(f"has {size} bytes; at most {cap} are read", where=str(path))
        return file.read(cap + 1)


def read_json_object(path: Path, cap: int = JSON_CAP) -> dict[str, Any]:
    """A JSON object from a file, strictly parsed; LoadError otherwise."""
    return parse_json_object(read_capped(path, cap), str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object: UTF-8, no repeated names, no NaN, bounded depth; LoadError naming `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a name is given twice")
        return value

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
        too_deep = _depth(value) > _JSON_DEPTH
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise LoadError(f"is not valid JSON: {show(reason)[1:-1]}", where=where) from None
    if too_deep:
        raise LoadError(f"is nested more than {_JSON_DEPTH} deep", where=where)
    if not isinstance(value, dict):
        raise LoadError(f"holds a JSON {type(value).__name__}, not an object", where=where)
    return value


def _depth(value: Any) -> int:
    """Nesting of lists and objects, without recursion."""
    depth, level = 0, [value]
    while level:
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1
    return depth
