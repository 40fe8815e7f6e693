"""The compiler: programs, patterns, passes, verification. These names are the pass-authoring API."""

from __future__ import annotations

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import TilewrightError
from tilewright.compiler.graph_pass import GraphPass, graph_pass
from tilewright.compiler.log import PassLog
from tilewright.compiler.passes_base import Example, Tensor
from tilewright.compiler.pattern import Match, either, known_equal, number, refuse
from tilewright.compiler.pipeline import Pipeline, RunOptions
from tilewright.compiler.program import Program
from tilewright.compiler.rewrite import ACCEPT, Change, Rewrite, Verdict, rewrite_pass
from tilewright.compiler.stage import Exactness, Stage
from tilewright.runtime.contracts import Refusal

__all__ = [
    "ACCEPT",
    "Change",
    "Exactness",
    "Example",
    "GraphPass",
    "Match",
    "PassLog",
    "Pipeline",
    "Program",
    "Refusal",
    "Rewrite",
    "RunOptions",
    "Stage",
    "Tensor",
    "TilewrightError",
    "Verdict",
    "either",
    "graph_pass",
    "known_equal",
    "number",
    "ops",
    "refuse",
    "rewrite_pass",
]
