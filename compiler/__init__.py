"""The compiler: programs, patterns, passes, verification. These names are the pass-authoring API.

They are imported on first use, so that parts which need no torch (errors, option text) load in milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.compiler import ops as ops
    from tilewright.compiler.diagnostics import TilewrightError as TilewrightError
    from tilewright.compiler.log import PassLog as PassLog
    from tilewright.compiler.match import Match as Match
    from tilewright.compiler.match import known_equal as known_equal
    from tilewright.compiler.match import refuse as refuse
    from tilewright.compiler.passes_base import Example as Example
    from tilewright.compiler.passes_base import Tensor as Tensor
    from tilewright.compiler.pipeline import Pipeline as Pipeline
    from tilewright.compiler.pipeline import RunOptions as RunOptions
    from tilewright.compiler.program import Program as Program
    from tilewright.compiler.rewrite import ACCEPT as ACCEPT
    from tilewright.compiler.rewrite import Change as Change
    from tilewright.compiler.rewrite import Rewrite as Rewrite
    from tilewright.compiler.rewrite import Verdict as Verdict
    from tilewright.compiler.rewrite import rewrite_pass as rewrite_pass
    from tilewright.compiler.stage import Exactness as Exactness
    from tilewright.compiler.stage import Stage as Stage
    from tilewright.compiler.terms import either as either
    from tilewright.compiler.terms import free as free
    from tilewright.compiler.terms import number as number
    from tilewright.compiler.whole_graph import GraphPass as GraphPass
    from tilewright.compiler.whole_graph import graph_pass as graph_pass
    from tilewright.runtime.contracts import Refusal as Refusal

_HOME = {
    "ACCEPT": "rewrite",
    "Change": "rewrite",
    "Exactness": "stage",
    "Example": "passes_base",
    "GraphPass": "whole_graph",
    "Match": "match",
    "PassLog": "log",
    "Pipeline": "pipeline",
    "Program": "program",
    "Rewrite": "rewrite",
    "RunOptions": "pipeline",
    "Stage": "stage",
    "Tensor": "passes_base",
    "TilewrightError": "diagnostics",
    "Verdict": "rewrite",
    "either": "terms",
    "free": "terms",
    "graph_pass": "whole_graph",
    "known_equal": "match",
    "number": "terms",
    "refuse": "match",
    "rewrite_pass": "rewrite",
}

__all__ = [*sorted(_HOME), "Refusal", "ops"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("tilewright.compiler.ops")
    if name == "Refusal":
        return importlib.import_module("tilewright.runtime.contracts").Refusal
    if name in _HOME:
        return getattr(importlib.import_module(f"tilewright.compiler.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tilewright.compiler' has no attribute {name!r}")
