"""Every registered pass proves itself on its own examples."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tilewright.compiler import registry
from tilewright.compiler.selftest import selftest

PASSES = registry.load_all()
BEYOND_RESIDUES = {
    "offload-kv": "a constant that is +inf or nan",
    "relay-attention": "a constant that is +inf or nan",
}
"""Passes with examples that the finite field cannot decide, and why; float64 alone speaks for those."""


@pytest.mark.parametrize("name", sorted(PASSES))
def test_selftest(name):
    result = selftest(PASSES[name])
    assert result.accepted > 0
    if result.beyond_residues:
        assert name in BEYOND_RESIDUES, result.beyond_residues
        for detail in result.beyond_residues.values():
            assert BEYOND_RESIDUES[name] in detail
    else:
        assert name not in BEYOND_RESIDUES, f"{name} is decided now: remove it from the list"


@pytest.mark.parametrize("name", sorted(PASSES))
def test_names_and_docstrings(name):
    cls = PASSES[name]
    assert Path(inspect.getfile(cls)).stem == name.replace("-", "_")
    assert "rewrite:" in (cls.__doc__ or "")
    assert (inspect.getmodule(cls).__doc__ or "").strip()
