"""Passes that claim to be exact prove it before their first value exists.

Our own passes are proved by the tests of every commit. Those of others (entry points, a user's file) are
proved here, when a value of theirs is made for the first time in a process: no graph of a user is rewritten
by a rule that is not an identity on its own examples. The verdict is kept for the process and not on disk:
a proof takes some 0.1 s a rule, while a stored one would have to be keyed by all that pass and prover import.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from tilewright.compiler import registry
from tilewright.compiler.diagnostics import ProofError, VerifyError
from tilewright.compiler.stage import Exactness

if TYPE_CHECKING:
    from tilewright.compiler.passes_base import Example, Pass
    from tilewright.compiler.program import Program

DRAWS = 5
"""Random points of the field at which each example is compared."""

_UNCHECKED: ContextVar[bool] = ContextVar("_UNCHECKED", default=False)
_VERDICTS: dict[type, str] = {}
"""Error text by class that was looked at; empty for a proof."""


@contextmanager
def unchecked() -> Iterator[None]:
    """Let values of unproved passes be made: for the self-test, which judges them itself, and for tests of
    the checks that come later."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def admit(cls: type[Pass]) -> None:
    """ProofError when a registered pass of somebody else claims to be exact and is not."""
    if cls.exactness is Exactness.APPROXIMATE or not registry.is_foreign(cls) or _UNCHECKED.get():
        return
    if cls not in _VERDICTS:
        try:
            prove(cls)
            _VERDICTS[cls] = ""
        except ProofError as error:
            _VERDICTS[cls] = error.message
    if _VERDICTS[cls]:
        raise ProofError(_VERDICTS[cls], remedy="correct the pass, or declare it APPROXIMATE")


def prove(cls: type[Pass]) -> int:
    """Prove a pass that claims to be exact on each of its accepting examples: number of identities proved.

    Each example is captured, rewritten, and compared over a finite field at `DRAWS` random points; where
    residues cannot express an op, both sides agree in float64 instead and the example is not counted.
    ProofError names the example, the rule that applied and a counterexample, or says that nothing applied.
    """
    proved = applied = 0
    with unchecked():
        for index, (options, example) in enumerate(cls.examples()):
            if example.refusal is None:
                done, equal = _prove_example(f"{cls.name}: example {index}", cls(**options), example)
                applied, proved = applied + done, proved + equal
    if not applied:
        raise ProofError(f"{cls.name} claims to be {cls.exactness.value}, but no example of it applies")
    return proved


def _prove_example(label: str, value: Pass, example: Example) -> tuple[int, bool]:
    from tilewright.compiler.finite_field import ProgramFunction, prove_equal
    from tilewright.compiler.log import Fuel
    from tilewright.compiler.pipeline import RunOptions, run_pass
    from tilewright.compiler.selftest import capture_example, observable

    before, after = capture_example(example), capture_example(example)
    try:
        report = run_pass(value, after, RunOptions(replay=False), Fuel())
    except VerifyError as error:
        raise ProofError(f"{label}: {error.message}") from error
    before, after = observable(before), observable(after)
    given = list(before.example_inputs)
    proof = prove_equal(
        ProgramFunction(before), ProgramFunction(after), lambda draw: list(given), draws=DRAWS
    )
    if proof.verdict == "different":
        rules = ", ".join(sorted({a.rule for a in report.applied if a.rule})) or value.name
        raise ProofError(
            f"{label}: {value.name} claims to be {value.exactness.value} and is not: rule {rules}: "
            f"{_counterexample(before, after) or proof.detail}"
        )
    return len(report.applied), proof.verdict == "equal"


def _counterexample(before: Program, after: Program) -> str:
    """The element that moved most on the example's inputs, in float64; empty when none did."""
    from tilewright.compiler.float64 import Float64
    from tilewright.compiler.graph_text import describe
    from tilewright.compiler.replay import tensors_in

    want = tensors_in(Float64(before).run_on(before.example_inputs))
    got = tensors_in(Float64(after).run_on(after.example_inputs))
    inputs = ", ".join(describe(v) for v in before.example_inputs if isinstance(v, torch.Tensor))
    for i, (w, g) in enumerate(zip(want, got, strict=False)):
        if w.shape != g.shape:
            return f"result {i} has shape {list(g.shape)} instead of {list(w.shape)}"
        moved = (g.double() - w.double()).abs().nan_to_num(float("inf")) * (g != w)
        if w.numel() and float(moved.max()) > 1e-9 * float(w.double().abs().nan_to_num().max()):
            at = [int(k) for k in torch.unravel_index(moved.argmax(), moved.shape)]
            place = tuple(at)
            return (
                f"for inputs {inputs} drawn at seed 0, result {i} at {at} is {float(g[place]):.6g} "
                f"instead of {float(w[place]):.6g}"
            )
    return ""
