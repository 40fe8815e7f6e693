"""Polynomial identity testing: exact rewrites are proved over a 31-bit field before they are registered."""

from __future__ import annotations

from tilewright.compiler.finite_field.planes import OutOfScope, Redraw
from tilewright.compiler.finite_field.programs import ProgramFunction
from tilewright.compiler.finite_field.proof import Constant, Proof, Verdict, evaluate, prove_equal
from tilewright.compiler.finite_field.value import Value, variable

__all__ = [
    "Constant",
    "OutOfScope",
    "ProgramFunction",
    "Proof",
    "Redraw",
    "Value",
    "Verdict",
    "evaluate",
    "prove_equal",
    "variable",
]
