"""Libraries of several generated sources: each is compiled by itself, and the first complaint is told."""

from __future__ import annotations

import ctypes

import pytest

from tilewright.runtime.build import LIBRARY, CompileFailed, compile_library

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
