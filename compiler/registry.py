"""Pass name -> class, by file name: `fuse-add-rmsnorm` lives in `fuse_add_rmsnorm.py`, imported on first
use."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from typing import Any

from tilewright.compiler.diagnostics import PassDefinitionError, PipelineError, nearest, shown

ROOT_PACKAGE = "tilewright.passes"
ENTRY_POINT_GROUP = "tilewright.passes"

_CLASSES: dict[str, type] = {}
_FILES: dict[str, str] | None = None


def register(name: str, cls: type) -> None:
    """Called by the decorators; a second class of the same name is an error naming both files."""
    old = _CLASSES.get(name)
    if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PassDefinitionError(f"pass {name!r} is defined by {old.__module__} and by {cls.__module__}")
    _CLASSES[name] = cls


def _files() -> dict[str, str]:
    """Module path by pass name for every file below `passes/`, plus third-party entry points."""
    global _FILES
    if _FILES is None:
        spec = importlib.util.find_spec(ROOT_PACKAGE)
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = {}
        for info in pkgutil.walk_packages(folders, f"{ROOT_PACKAGE}."):
            stem = info.name.rsplit(".", 1)[1]
            if not info.ispkg and not stem.startswith("_") and stem != "presets":
                found[stem.replace("_", "-")] = info.name
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            found.setdefault(point.name, point.value.split(":")[0])
        _FILES = found
    return _FILES


def names() -> list[str]:
    """Every known pass name, sorted."""
    return sorted({*_files(), *_CLASSES})


def find(name: str) -> Any:
    """The class of a pass; PipelineError with the nearest name when there is none."""
    if name not in _CLASSES:
        module = _files().get(name)
        if module is None:
            raise PipelineError(f"unknown pass {shown(name)}", remedy=nearest(name, [*names(), *presets()]))
        importlib.import_module(module)
        if name not in _CLASSES:
            raise PassDefinitionError(
                f"{module} does not define a pass named {name!r}, as its file name says"
            )
    return _CLASSES[name]


def is_foreign(cls: type) -> bool:
    """True for a registered pass that does not live below our `passes/`."""
    ours = cls.__module__.startswith(f"{ROOT_PACKAGE}.")
    return not ours and _CLASSES.get(getattr(cls, "name", "")) is cls


def presets() -> dict[str, str]:
    """Named pipelines: preset name -> pipeline text."""
    return dict(importlib.import_module(f"{ROOT_PACKAGE}.presets").PRESETS)


def load_all() -> dict[str, type]:
    """Import every pass file; used by tests, the catalogue and `tilewright passes`."""
    for name in names():
        find(name)
    return dict(sorted(_CLASSES.items()))
