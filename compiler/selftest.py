"""A pass proves itself on its own examples: `selftest(PassClass)`, for our passes and for anybody's."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tilewright.compiler.admission import unchecked
from tilewright.compiler.canonicalize import canonicalize
from tilewright.compiler.diagnostics import TilewrightError
from tilewright.compiler.facts import apply_user_facts
from tilewright.compiler.finite_field import ProgramFunction, prove_equal
from tilewright.compiler.functionalize import functionalize
from tilewright.compiler.log import Fuel
from tilewright.compiler.passes_base import Example, Pass, Tensor
from tilewright.compiler.pipeline import RunOptions, compare_float64, run_pass
from tilewright.compiler.program import InputKind, InputSpec, Program
from tilewright.compiler.replay import relative_rms, tensors_in, tolerance
from tilewright.compiler.report import PassReport
from tilewright.compiler.rewrite import Rewrite, trace
from tilewright.compiler.stage import Exactness
from tilewright.compiler.verify import verify
from tilewright.runtime.contracts import STATE, ScratchState

PROOF_DRAWS = 3
GRADIENT_TOLERANCE = 64
"""Relative RMS between gradients of exact rewrites, in steps of the dtype."""


class SelfTestError(TilewrightError):
    """A pass does not do what its own examples say."""


@dataclass
class SelfTestResult:
    """What the examples of a pass showed."""

    name: str
    accepted: int = 0
    refused: int = 0
    proved: int = 0
    """Accepting examples that hold as identities over a finite field."""
    beyond_residues: dict[str, str] = field(default_factory=dict)
    """Examples that the finite field cannot decide, with the reason; float64 alone speaks for them."""
    worst_error: float = 0.0
    """Largest relative RMS between a program before and after, in its own dtypes."""


def selftest(cls: type[Pass]) -> SelfTestResult:
    """Run every example of a pass; SelfTestError says which one failed and how.

    Accepting examples: the pass applies as often as said, a second run finds nothing, the verifier passes,
    results (and gradients, for a pass that trains) agree with the original as its exactness says, float64
    agrees to 1e-9, the comparison would notice zeros or shifted values, and identity testing over a finite
    field finds no difference. Refusing examples: the pass does not apply and gives the reason. Together the
    examples reach every form of the pattern and every line that refuses.
    """
    result = SelfTestResult(cls.name)
    lines: set[int] = set()
    forms: set[str] = set()
    for index, (options, example) in enumerate(cls.examples()):
        label = f"{cls.name}: example {index}"
        with unchecked():
            value = cls(**options)
        program = capture_example(example)
        before = capture_example(example)
        with _lines_run(inspect.getfile(cls), lines):
            report = run_pass(value, program, RunOptions(verify="shapes"), Fuel())
        forms.update(a.rule for a in report.applied)
        forms.update(r.rule for r in report.refused)
        if example.refusal is not None:
            _check_refusal(label, example, report)
            result.refused += 1
            continue
        if len(report.applied) != example.count:
            raise SelfTestError(
                f"{label}: applied {len(report.applied)} times, expected {example.count}{_said(report)}"
            )
        verify(program, blame=cls.name)
        _check_results(label, value, example, before, program, result)
        _check_again(label, value, program)
        result.accepted += 1
    if not result.accepted:
        raise SelfTestError(f"{cls.name}: no example accepts")
    _check_reached(cls, lines, forms)
    return result


def _said(report: PassReport) -> str:
    reasons = [f"{r.node}: {r.reason}" for r in report.refused] + [report.skipped] * bool(report.skipped)
    return f" ({'; '.join(reasons[:3])})" if reasons else ""


def _check_refusal(label: str, example: Example, report: PassReport) -> None:
    if report.applied:
        raise SelfTestError(f"{label}: applied, expected the refusal {example.refusal!r}")
    said = [r.reason for r in report.refused] + [report.skipped or ""]
    if not any(str(example.refusal) in reason for reason in said):
        raise SelfTestError(f"{label}: did not refuse with {example.refusal!r}{_said(report)}")


def _check_again(label: str, value: Pass, program: Program) -> None:
    again = run_pass(value, program, RunOptions(), Fuel())
    if again.applied:
        raise SelfTestError(
            f"{label}: a second run applied {len(again.applied)} more times; it must find nothing"
        )


def _check_results(
    label: str, value: Pass, example: Example, before: Program, after: Program, result: SelfTestResult
) -> None:
    if value.exactness is Exactness.APPROXIMATE:
        _check_approximate(label, value, example, before, after)
        return
    before, after = observable(before), observable(after)
    result.worst_error = max(result.worst_error, compare(label, value.exactness, run(before), run(after)))
    compare_float64(before, after, blame=label)
    if value.trains:
        _check_training(label, value, example)
    given = list(before.example_inputs)
    proof = prove_equal(
        ProgramFunction(before), ProgramFunction(after), lambda draw: list(given), draws=PROOF_DRAWS
    )
    if proof.verdict == "different":
        raise SelfTestError(f"{label}: not an identity: {proof.detail}")
    if proof.verdict == "equal":
        result.proved += 1
    else:
        result.beyond_residues[label] = proof.detail


def observable(program: Program) -> Program:
    """The program with the values it writes back to its inputs returned as further results."""
    graph, done = fx.Graph(), dict[fx.Node, fx.Node]()
    written = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":
            done[node] = done[node.args[1]]
            written.append(done[node])
        elif node.op == "output":
            results = fx.node.map_arg(node.args[0], lambda n: done[n])
            graph.output((results, tuple(written)))
        else:
            done[node] = graph.node_copy(node, lambda n: done[n])
    return replace(program, module=fx.GraphModule(program.module, graph))


def run(program: Program, inputs: list[Any] | None = None) -> list[torch.Tensor]:
    """The tensors that a program returns on its example inputs, which are not changed; it may keep state."""
    given = program.example_inputs if inputs is None else inputs
    copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in given]
    token = STATE.set(ScratchState())
    try:
        return tensors_in(fx.Interpreter(program.module).run(*copies))
    finally:
        STATE.reset(token)


def compare(label: str, exactness: Exactness, want: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Largest relative RMS between results; SelfTestError beyond what the exactness class allows.

    Also an error: results that a wrong program could give (all zero, constant), as they would prove nothing.
    """
    worst = 0.0
    if len(want) != len(got):
        raise SelfTestError(f"{label}: {len(got)} results instead of {len(want)}")
    for i, (w, g) in enumerate(zip(want, got, strict=True)):
        limit = tolerance(exactness, w.dtype)
        error = relative_rms(g, w)
        if error > limit:
            raise SelfTestError(
                f"{label}: result {i} is off by {error:.3g} relative RMS, at most {limit:.3g} is allowed"
            )
        worst = max(worst, error)
        if w.numel() > 1 and w.dtype.is_floating_point:
            for what, null in (
                ("zeros", torch.zeros_like(w)),
                ("shifted values", w.flatten().roll(1).view_as(w)),
            ):
                if relative_rms(null, w) <= limit:
                    raise SelfTestError(f"{label}: result {i} could be {what}; the example proves nothing")
    return worst


def _check_training(label: str, value: Pass, example: Example) -> None:
    """Where the pass also applies when gradients are wanted, those of a random projection of the results
    agree."""
    example = replace(example, training=True)
    before, after = capture_example(example), capture_example(example)
    report = run_pass(value, after, RunOptions(), Fuel())
    if not report.applied or any(spec.mutated for spec in before.inputs):
        return
    grads = []
    for program in (before, after):
        leaves = [
            v.clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for v in program.example_inputs
        ]
        outputs = [o for o in tensors_in(fx.Interpreter(program.module).run(*leaves)) if o.requires_grad]
        if not outputs:
            return
        generator = torch.Generator().manual_seed(1)
        loss = sum((o.double() * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
        wanted = [v for v in leaves if isinstance(v, torch.Tensor) and v.requires_grad]
        grads.append(torch.autograd.grad(loss, wanted, allow_unused=True))  # type: ignore[arg-type]
    for i, (w, g) in enumerate(zip(*grads, strict=True)):
        if (w is None) != (g is None):
            raise SelfTestError(f"{label}: input {i} has a gradient in one of the two programs only")
        if w is not None and (error := relative_rms(g, w)) > GRADIENT_TOLERANCE * torch.finfo(w.dtype).eps:
            raise SelfTestError(f"{label}: the gradient of input {i} is off by {error:.3g} relative RMS")


def _check_approximate(label: str, value: Any, example: Example, before: Program, after: Program) -> None:
    """The result is that of `reference`; at the exact limit it is that of the original.

    A rewrite's `reference` stands in for its replacement; that of a graph pass edits a program in place, into
    the obvious one.
    """
    rounding = Exactness.ROUNDING
    if isinstance(value, Rewrite):
        stand_in = type(type(value).__name__, (type(value),), {"replacement": type(value).reference})  # type: ignore[attr-defined]
        other: Any = object.__new__(stand_in)
        other.__dict__.update(value.__dict__)
        program = capture_example(example)
        other.apply(program, _quiet(value))
        want = run(program)
    else:
        program = capture_example(example)
        value.reference(program)
        program.module.recompile()
        want = run(program)
    compare(f"{label} against its reference", rounding, want, run(after))
    program = capture_example(example)
    run_pass(value.exact_limit(), program, RunOptions(), Fuel())
    compare(f"{label} at its exact limit", rounding, run(before), run(program))


def _quiet(value: Pass) -> Any:
    from tilewright.compiler.log import PassLog

    report = PassReport(value.name, value.text(), value.stage.name, value.exactness.value, value.paper)
    return PassLog(report, Fuel(), value.slots, None)


@contextmanager
def _lines_run(path: str, lines: set[int]) -> Iterator[None]:
    """Collect the line numbers of one file that are run."""

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        lines.add(frame.f_lineno)
        return local

    def entered(frame: FrameType, event: str, arg: Any) -> Any:
        return local(frame, event, arg) if frame.f_code.co_filename == path else None

    old = sys.gettrace()
    sys.settrace(entered)
    try:
        yield
    finally:
        sys.settrace(old)


def refusing_lines(path: str) -> dict[int, int]:
    """First and last line of every statement of a file that says no: `refuse(...)` and `.refused(...)` calls,
    and text returned by a helper that gives reasons (annotated `-> str | None`)."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found: dict[int, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (
            getattr(node.func, "id", "") == "refuse" or getattr(node.func, "attr", "") == "refused"
        ):
            found[node.lineno] = max(found.get(node.lineno, 0), node.end_lineno or node.lineno)
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            if ast.unparse(node.returns) != "str | None":
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.Return) and isinstance(part.value, (ast.JoinedStr, ast.IfExp)):
                    found[part.lineno] = part.end_lineno or part.lineno
    return found


def _check_reached(cls: type[Pass], lines: set[int], forms: set[str]) -> None:
    path = inspect.getfile(cls)
    missed = [
        first for first, last in refusing_lines(path).items() if not lines & set(range(first, last + 1))
    ]
    if missed:
        raise SelfTestError(
            f"{cls.name}: no example reaches the refusal in line {min(missed)}",
            remedy="add an Example(..., refusal=...) for it",
        )
    if issubclass(cls, Rewrite):
        absent = [f.tag for f in cls.compiled_pattern().forms if f.tag not in forms]
        if absent:
            raise SelfTestError(f"{cls.name}: no example has the form {absent[0]!r}", remedy="add one")


def capture_example(example: Example, *, seed: int = 0) -> Program:
    """The program of an example: traced on fake inputs, functional, canonical; tensor inputs become
    placeholders."""
    generator = torch.Generator().manual_seed(seed)
    values = [v.make(generator) if isinstance(v, Tensor) else v for v in example.inputs]
    places = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor)]
    reals = [values[i] for i in places]
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)  # sizes that depend on data get a symbol
    fakes = [mode.from_tensor(v) for v in reals]

    def run(*tensors: Any) -> Any:
        filled = list(values)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return example.model(*filled)

    module = trace(run, fakes)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    specs = [
        InputSpec(n.name, InputKind.WEIGHT if getattr(example.inputs[i], "weight", False) else InputKind.USER)
        for n, i in zip(placeholders, places, strict=True)
    ]
    if not example.raw:
        written = functionalize(module).mutated
        for spec in specs:
            spec.mutated = spec.name in written
        canonicalize(module, training=example.training)
    program = Program(module, specs, reals, "example", example.training)
    apply_user_facts(program, example.facts)
    return program
