"""Libraries of several generated sources: each is compiled by itself, and the first complaint is told; a
kernel's needs torch's without being linked to it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tilewright.runtime import build
from tilewright.runtime.build import (
    LIBRARY,
    TORCH_LIBRARY,
    CompileFailed,
    begin_cpp,
    compile_cpp,
    compile_library,
)

EXPORTED = """#include "shared.h"
extern "C" __attribute__((visibility("default"))) int {name}() {{ return {value}; }}
"""
HEADERS = {"shared.h": "#pragma once\nconstexpr int kSeven = 7;\n"}


def test_sources_are_linked_into_one_library() -> None:
    sources = {
        f"{name}.cpp": EXPORTED.format(name=name, value=value)
        for name, value in (("first", "kSeven"), ("second", "kSeven + 1"), ("third", "first() + second()"))
    }
    sources["third.cpp"] = 'extern "C" int first(), second();\n' + sources["third.cpp"]
    folder = compile_library(sources, "avx2", HEADERS)
    assert ctypes.CDLL(str(folder / LIBRARY)).third() == 15
    assert not list(folder.glob("*.o")), "what is linked is not kept twice"


def test_the_source_that_is_refused_is_told() -> None:
    sources = {
        "good.cpp": EXPORTED.format(name="good", value="1"),
        "bad.cpp": EXPORTED.format(name="bad", value="kEight"),
    }
    with pytest.raises(CompileFailed, match=r"bad\.cpp.*kEight"):
        compile_library(sources, "avx2", HEADERS)


TORCH_NUMBER = """#include "shared.h"
extern "C" int aoti_torch_dtype_float32();
extern "C" __attribute__((visibility("default"))) int number() { return aoti_torch_dtype_float32() + kSeven; }
"""


def test_a_kernel_needs_torch_and_is_linked_without_reading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, commands = subprocess.run, list[str]()

    def run(command: list[str], **kwargs: object) -> object:
        commands.extend(command)
        return honest(command, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", run)
    library = compile_cpp(TORCH_NUMBER + f"// {os.urandom(8).hex()}\n", "avx2", HEADERS) / LIBRARY
    real = Path(torch.__file__).parent / "lib"
    assert commands
    assert not [given for given in commands if str(real) in given]
    assert ctypes.CDLL(str(library)).number() == 6 + 7
    text = f"import ctypes; print(ctypes.CDLL({str(library)!r}).number())"
    alone = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    for env, found in ((alone, False), ({**alone, "LD_LIBRARY_PATH": str(real)}, True)):
        done = honest([sys.executable, "-c", text], env=env, capture_output=True, text=True, check=False)
        assert (done.stdout == "13\n") is found
        assert (f"{TORCH_LIBRARY}: cannot open" in done.stderr) is not found


def test_what_is_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    both, honest, compiled = threading.Barrier(2), build._run, list[str]()

    def run(folder: Path, command: list[str]) -> None:
        if "kernel.cpp" in command:
            both.wait(60)
            compiled.append((folder / "kernel.cpp").read_text())
        honest(folder, command)

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    texts = [
        EXPORTED.format(name="number", value=f"kSeven + {i}") + f"// {os.urandom(8).hex()}\n" for i in (1, 2)
    ]
    begin_cpp(texts * 2, "avx2", HEADERS)
    libraries = [ctypes.CDLL(str(compile_cpp(text, "avx2", HEADERS) / LIBRARY)) for text in texts]
    assert [library.number() for library in libraries] == [8, 9]
    assert sorted(compiled) == sorted(texts), "each once, and one did not wait for the other"


def test_what_is_refused_under_way_is_told_by_whom_needs_it() -> None:
    text = EXPORTED.format(name="number", value="kEight") + f"// {os.urandom(8).hex()}\n"
    begin_cpp([text], "avx2", HEADERS)
    with pytest.raises(CompileFailed, match="kEight"):
        compile_cpp(text, "avx2", HEADERS)


def test_the_longest_is_begun_first(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    done = threading.Event()

    def compile_one(source: str, *_: object) -> None:
        begun.append(len(source))
        if len(begun) == 3:
            done.set()

    monkeypatch.setattr(build, "compile_cpp", compile_one)
    monkeypatch.setattr(build.os, "cpu_count", lambda: 1)
    begin_cpp(["a" * n for n in (3, 9, 5, 9)], "avx2", HEADERS)
    assert done.wait(60)
    assert begun == [9, 5, 3]
