"""Measuring one zoo model: capture, semantic ops, error against float64, seconds."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tilewright.compiler.float64 import widen
from tilewright.compiler.ops import semantic_op
from tilewright.compiler.parity import relative_rms
from tilewright.compiler.program import Program
from tilewright.tools.zoo_entry import COUNTED, ZooEntry

ULP = torch.finfo(torch.float32).eps
SLACK_FACTOR, SLACK_ULPS = 4.0, 8.0
"""Accepted: error of ours <= 4 * error of eager + 8 ulp, both against float64."""


@dataclass(frozen=True)
class Settings:
    """How a survey compiles."""

    backend: str = "tilewright"
    """`tilewright`, or `eager` (capture alone)."""
    pipeline: str = "exact"
    lower: str = "inductor"
    """What runs the parts that we did not lower: `inductor` or `eager`."""
    kernels: bool = True
    """Use generated kernels; off, semantic ops run as their definitions."""
    inductor: bool = False
    """Compile with Inductor as well, for its seconds."""


@dataclass
class Row:
    """What was measured on one model."""

    name: str
    family: str
    layers: int
    expected: dict[str, int]
    graphs: int = 0
    breaks: list[dict[str, str]] = field(default_factory=list)
    """`reason` and user `line` of each graph break."""
    found: dict[str, int] | None = None
    """Semantic ops of the compiled programs; None when the backend keeps none."""
    error_eager: float | None = None
    """Worst relative RMS over the outputs, against float64."""
    error_ours: float | None = None
    distance: float | None = None
    """Worst relative RMS between ours and eager."""
    wrong: str = ""
    """Which output breaks the acceptance rule and by how much."""
    seconds: float | None = None
    """Wall seconds of the first compiled call."""
    seconds_inductor: float | None = None
    crash: str = ""
    """Exception and where it was raised."""

    @property
    def whole(self) -> bool:
        """One graph and no break."""
        return self.graphs == 1 and not self.breaks

    @property
    def missing(self) -> dict[str, tuple[int, int]]:
        """Op -> (found, expected) wherever they differ."""
        if self.found is None:
            return {}
        return {op: (self.found[op], n) for op, n in self.expected.items() if self.found[op] != n}

    @property
    def good(self) -> bool:
        """Neither crashed nor wrong."""
        return not self.crash and not self.wrong

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "whole": self.whole, "missing": self.missing}


def count_semantic_ops(program: Program) -> dict[str, int]:
    """Counted ops in a program; a fused op counts as what it fuses (`linear_multi` as its linears)."""
    total: Counter[str] = Counter()
    for node in program.graph.nodes:
        op = semantic_op(node.target)
        if op is None:
            continue
        if op.name == "linear_multi":
            total["linear"] += len(node.args[1])
        elif op.name == "add_rms_norm":
            total["rms_norm"] += 1
        else:
            total[op.name] += 1
    return {op: total[op] for op in COUNTED}


def grouped_mm(
    rows: Tensor, weights: Tensor, offs: Tensor, bias: None = None, out_dtype: None = None
) -> Tensor:
    """Rows [T, K], sorted by group, times their group's matrix [G, K, N]; offs [G] ends each group.

    The meaning of `torch._grouped_mm`, which has no float64 kernel. Rows past the last group give 0.
    """
    if bias is not None or out_dtype is not None:
        raise ValueError("grouped_mm: bias and out_dtype must be None here")
    out = rows.new_zeros(rows.shape[0], weights.shape[-1])
    start = 0
    for weight, end in zip(weights, offs.tolist(), strict=True):
        out[start:end] = rows[start:end] @ weight
        start = end
    return out


class Widened(TorchFunctionMode):
    """Runs plain PyTorch code in float64 even where it asks for float32 (`x.float()`, `dtype=...`)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args, kwargs = tree_map(widen, (args, kwargs or {}))
        if func is torch._grouped_mm:
            return grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype for a while."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


def run_float64(entry: ZooEntry) -> list[Tensor]:
    """The model's outputs computed in float64 throughout, from the same float32 weights and inputs."""
    model = entry.build().double()
    args, kwargs = tree_map(widen, entry.inputs())
    with torch.no_grad(), default_dtype(torch.float64), Widened():
        out = model(*args, **kwargs)
    return tree_leaves(out)


def judge(row: Row, eager: list[Tensor], ours: list[Tensor], truth: list[Tensor]) -> None:
    """Fill the errors of a row and say which output is wrong."""
    if len(ours) != len(truth):
        row.wrong = f"{len(ours)} outputs instead of {len(truth)}"
        return
    eager_errors = [relative_rms(a, b) for a, b in zip(eager, truth, strict=True)]
    our_errors = [relative_rms(a, b) for a, b in zip(ours, truth, strict=True)]
    row.error_eager, row.error_ours = max(eager_errors), max(our_errors)
    row.distance = max(relative_rms(a, b) for a, b in zip(ours, eager, strict=True))
    for i, (theirs, mine) in enumerate(zip(eager_errors, our_errors, strict=True)):
        bound = SLACK_FACTOR * theirs + SLACK_ULPS * ULP
        if not mine <= bound:
            row.wrong = f"output {i}: error {mine:.2e} exceeds {bound:.2e} (eager {theirs:.2e})"
            return


def graph_breaks(entry: ZooEntry) -> list[dict[str, str]]:
    """Reason and user line of each graph break."""
    torch._dynamo.reset()
    args, kwargs = entry.inputs()
    with entry.capturing(), torch.no_grad():
        explained = torch._dynamo.explain(entry.build())(*args, **kwargs)
    found = []
    for reason in explained.break_reasons:
        frame = reason.user_stack[-1] if reason.user_stack else None
        line = f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno}" if frame else ""
        found.append({"reason": reason.reason.strip().split("\n")[0], "line": line})
    return found


class Recorder:
    """The tilewright backend step by step, with the semantic ops counted before they are lowered."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        from tilewright.frontends.capture import from_dynamo
        from tilewright.frontends.compile import (
            CompileOptions,
            compile_lowered,
            lower_program,
            optimize_program,
        )

        parsed = CompileOptions.parse(options)
        program = from_dynamo(gm, example_inputs)
        report = optimize_program(program, parsed)
        self.found.update(count_semantic_ops(program))
        lower_program(program, parsed, report)
        return compile_lowered(program, parsed, report)


def compiled_call(entry: ZooEntry, **how: Any) -> tuple[Any, float]:
    """Outputs and wall seconds of the first call of the compiled model."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = torch.compile(entry.build(), **how)
    args, kwargs = entry.inputs()
    started = time.perf_counter()
    with entry.capturing(), torch.no_grad():
        out = model(*args, **kwargs)
    return out, time.perf_counter() - started


def eager_call(model: nn.Module, entry: ZooEntry) -> list[Tensor]:
    """The model's outputs in plain eager."""
    args, kwargs = entry.inputs()
    with torch.no_grad():
        return tree_leaves(model(*args, **kwargs))


def describe(error: BaseException) -> str:
    """Exception class, the start of its text, and the innermost place in our own files."""
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        return describe(error.inner_exception)
    text = " ".join(str(error).split())[:300]
    package = Path(__file__).resolve().parent.parent
    places = [
        f"{Path(frame.filename).resolve().relative_to(package)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().is_relative_to(package) and "site-packages" not in frame.filename
    ]
    cause = error.__cause__
    inner = f" <- {describe(cause)}" if cause is not None else ""
    return f"{type(error).__name__}: {text} at {places[-1] if places else 'no file of ours'}{inner}"


def measure(entry: ZooEntry, settings: Settings) -> Row:
    """One row; an exception of any kind becomes the row's `crash`."""
    row = Row(entry.name, entry.family, entry.layers, dict(entry.expected))
    try:
        _fill(row, entry, settings)
    except Exception as error:  # the survey exists to find these: the row says so and the exit status is 1
        row.crash = describe(error)
    return row


def _fill(row: Row, entry: ZooEntry, settings: Settings) -> None:
    truth = run_float64(entry)
    eager = eager_call(entry.build(), entry)
    recorder = Recorder()
    if settings.backend == "eager":
        out, row.seconds = compiled_call(entry, backend="eager")
    else:
        options = {"pipeline": settings.pipeline, "lower": settings.lower, "kernels": settings.kernels}
        out, row.seconds = compiled_call(entry, backend=recorder, options=options)
        row.found = {op: recorder.found[op] for op in COUNTED}
    row.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    broke = bool(torch._dynamo.utils.counters["graph_break"])
    judge(row, eager, tree_leaves(out), truth)
    if broke or row.graphs != 1:
        row.breaks = graph_breaks(entry)
    if settings.inductor:
        _, row.seconds_inductor = compiled_call(entry, backend="inductor")
