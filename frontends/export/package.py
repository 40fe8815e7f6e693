"""Loads what `--format pt2` wrote: everything is checked before PyTorch sees a byte of it.

A package is machine code. The checks find damage, and archives that PyTorch would unpickle or unpack
elsewhere; they cannot tell a package of a stranger from one of a friend.
"""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.compiler.diagnostics import LoadError, OptionError, nearest
from tilewright.frontends.export.artifact import checked_manifest
from tilewright.frontends.export.package_weights import Weights, read_weights
from tilewright.frontends.model_files import show
from tilewright.kernels.common.operators import load_operator

_MEMBERS_CAP, _BYTES_CAP = 10_000, 1 << 40
_PLAIN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9._+=-]*")
_SUFFIXES = (".so", ".cpp", ".h", ".json", ".o", ".bin", ".cubin", ".hsaco", ".spv")
_BARE = ("version", "byteorder", "archive_format", "archive_version", "serialization_id")
_SUSPECT = re.compile(r"\.(pkl|pickle|pt|pth|ckpt)$|constants/|sample_inputs|custom_obj", re.IGNORECASE)


def load_package(folder: str | Path, entry: str = "") -> Callable[..., tuple[Tensor, ...]]:
    """The compiled entry point of an exported package: called with its tensors in order, gives a tuple.

    Inputs that the manifest names as `written` (the cache of a step with a capacity) are written into.

    entry: its name; may be left out where there is one. Nothing is compiled. LoadError for a folder that is
    not as the export left it, or whose archive could unpack outside its folder or hold a pickle.
    """
    folder = Path(folder)
    manifest = checked_manifest(folder)
    if manifest.get("kind") != "pt2":
        raise LoadError(f"holds the format {show(manifest.get('kind'))}, not pt2", where=str(folder))
    rows = {row["name"]: row for row in manifest["entries"]}
    if not entry and len(rows) == 1:
        entry = next(iter(rows))
    if entry not in rows:
        raise OptionError(f"the package has no entry {entry!r}", remedy=nearest(entry, rows))
    (opened,) = opened_entries(folder, manifest, [rows[entry]])
    return opened


def opened_entries(
    folder: Path, manifest: dict[str, Any], rows: list[dict[str, Any]]
) -> list[Callable[..., tuple[Tensor, ...]]]:
    """Entry points of a package whose files were checked, from their rows of the manifest; they share their
    weights. LoadError for an archive that no export writes."""
    for row in rows:
        if "weights" not in row:
            what = "holds its weights in its programs, as exports once did"
            raise LoadError(what, where=str(folder), remedy="export again")
        for name in (row["file"], *row["operators"], *row["weights"]):
            if name not in manifest["files"]:
                raise LoadError(f"{show(name)} is not among its files", where=str(folder))
        check_archive(folder / row["file"])
    weights = read_weights(folder / name for name in dict.fromkeys(n for row in rows for n in row["weights"]))
    return [
        open_package(folder / row["file"], [folder / name for name in row["operators"]], weights)
        for row in rows
    ]


def open_package(package: Path, operators: list[Path], weights: Weights) -> Callable[..., tuple[Tensor, ...]]:
    """Load checked files: first the operators that the package calls, then the package, over `weights`.

    It reads the weights where they are: no copy is made. LoadError when one that it asks for is not there.
    """
    for path in operators:
        load_operator(path.stem, path)
    # The loader itself: `aoti_load_package` around it imports all of Inductor and looks for a compiler.
    loader: Any = torch._C._aoti  # type: ignore[attr-defined]
    loaded = loader.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
    try:
        given = weights.of(package.stem, loaded.get_constant_fqns())
    except KeyError as error:
        raise LoadError(
            f"asks for the weight {error}, which no file beside it has", where=str(package)
        ) from None
    loaded.load_constants(given, use_inactive=False, check_full_update=True, user_managed=True)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        assert weights is not None, "they live as long as the package"
        return tuple(loaded.boxed_run(list(tensors)))

    return call


def check_archive(path: Path) -> None:
    """LoadError unless the file is a .pt2 archive: compiled code and JSON in one folder, no pickles."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError) as error:
        raise LoadError(f"is not a .pt2 archive: {str(error)[:80]!a}", where=str(path)) from None
    if not 0 < len(members) <= _MEMBERS_CAP:
        raise LoadError(f"is an archive of {len(members)} members", where=str(path))
    seen = set[str]()
    for member in members:
        fault = _fault(member) or ("is given twice" if member.filename in seen else "")
        if fault:
            raise LoadError(f"its member {show(member.filename)} {fault}", where=str(path))
        seen.add(member.filename)
    if len({name.split("/", 1)[0] for name in seen}) != 1:
        raise LoadError("its members lie in several folders", where=str(path))
    if sum(m.file_size for m in members) > min(_BYTES_CAP, 4 * path.stat().st_size + (1 << 20)):
        raise LoadError("would unpack to far more than it holds", where=str(path))


def _fault(member: zipfile.ZipInfo) -> str:
    """What is wrong with one member, empty for nothing."""
    name = member.filename
    parts = name.split("/")
    if name != member.orig_filename or any(not _PLAIN.fullmatch(p) or p in (".", "..") for p in parts):
        return "could be unpacked outside its folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        return "is a link or no file"
    if member.flag_bits & 1:
        return "is encrypted"
    if _SUSPECT.search(name):
        return "is one that PyTorch could unpickle"
    if not name.endswith(_SUFFIXES) and parts[-1] not in _BARE:
        return "is of a kind that no export writes"
    return ""
