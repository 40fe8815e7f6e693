"""Running a model over sample data to collect what its linear layers read."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from tilewright.compiler.calibration import Observer, Statistics, fingerprint, vocabulary_of
from tilewright.compiler.diagnostics import CaptureError, OptionError
from tilewright.compiler.paging import SCRATCH, in_a_file
from tilewright.compiler.pipeline import Pipeline, RunOptions
from tilewright.compiler.precision_plan import LayerChoices, measure
from tilewright.compiler.program import Program
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.frontends.loaded_model import Call

Progress = Callable[[int, int], None]
"""progress(samples done, samples in all)."""


def _behind(
    pipeline: Pipeline, gm: fx.GraphModule, example_inputs: Sequence[Any], scratch: Path | None = None
) -> Program | None:
    """A captured program after some passes; None where it holds no linear layer."""
    program = from_dynamo(gm, example_inputs)
    program.scratch = scratch
    options = RunOptions(replay=False)
    normalize(program, options)
    pipeline.run(program, options)
    has_linear = any(n.op == "call_function" and "linear" in str(n.target) for n in program.graph.nodes)
    return program if has_linear else None


class _Observing:
    """A backend that runs each captured program, behind the given passes, under an observer."""

    def __init__(
        self, pipeline: Pipeline, hessian: bool, means: bool, quantile: float, scratch: Path | None
    ) -> None:
        self.statistics: Statistics | None = None
        self._pipeline, self._hessian, self._means, self._quantile = pipeline, hessian, means, quantile
        self._scratch = scratch

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        program = _behind(self._pipeline, gm, example_inputs, self._scratch)
        if program is None:
            return gm.forward
        if self.statistics is None:
            self.statistics = Statistics(
                fingerprint(program), vocabulary_of(program), quantile=self._quantile
            )
        observer = Observer(program, self.statistics, hessian=self._hessian, means=self._means)
        return lambda *args: observer.run(*args)


def calibrate(
    module: nn.Module,
    calls: Iterable[Call],
    *,
    pipeline: Any = "",
    source: str = "",
    hessian: bool = False,
    means: bool = False,
    quantile: float = 0.999,
    progress: Progress | None = None,
    scratch: Path | str | None = SCRATCH,
) -> Statistics:
    """Run every call through the captured model and return what its linear layers read.

    calls: (args, kwargs) of the module, in a fixed order; the result depends on nothing else. pipeline:
    passes that come before the ones that will use the statistics. hessian: also sum x^T x per layer, K^2
    doubles each. means: also the mean over each sample and what norms read, for `prune-width-for-decode`.
    scratch: a folder for nameless files that hold rotated weights and Hessians while they are not worked
    on, and the Hessians of the result; None keeps all in memory. It should lie on a disk.
    Raises OptionError for no calls, an impossible quantile or a folder that takes no file, CaptureError when
    no linear layer ran, and FactError for activations that are not finite.
    """
    if not 0.5 <= quantile <= 1.0:
        raise OptionError(f"quantile = {quantile!r}: expected 0.5 to 1")
    folder = None if scratch is None else Path(scratch)
    if folder is not None:
        in_a_file(torch.zeros(mmap.PAGESIZE), folder)  # an impossible folder is found out before any work
    given = list(calls)
    if not given:
        raise OptionError("there are no samples to calibrate on")
    observing = _Observing(Pipeline.parse(pipeline or []), hessian, means, quantile, folder)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=observing, dynamic=False)
    with torch.no_grad():
        for done, (args, kwargs) in enumerate(given, 1):
            compiled(*args, **kwargs)
            if progress is not None:
                progress(done, len(given))
    torch._dynamo.reset()
    found = observing.statistics
    if found is None or not found.layers:
        raise CaptureError("no linear layer ran, so there is nothing to calibrate")
    found.samples, found.source = len(given), source
    return found


def layer_choices(
    module: nn.Module, call: Call, statistics: Statistics, formats: Sequence[str], *, pipeline: Any = ""
) -> list[LayerChoices]:
    """Size and error of every format for every linear layer of a model, as `precision_plan.measure` has them.

    call: (args, kwargs) of the module, to capture it by. statistics: with Hessians, taken behind the same
    pipeline. Raises what `measure` does, and CaptureError when no linear layer ran.
    """
    programs: list[Program] = []
    passes = Pipeline.parse(pipeline or [])

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        program = _behind(passes, gm, example_inputs)
        programs.extend([] if program is None else [program])
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=False)(*call[0], **call[1])
    torch._dynamo.reset()
    if not programs:
        raise CaptureError("no linear layer ran, so there is nothing to plan")
    with torch.no_grad():
        return [layer for program in programs for layer in measure(program, statistics, formats)]


def token_windows(
    tokenizer: Any, text: str, *, length: int = 512, samples: int = 4, first: int = 0, every: int = 1
) -> tuple[list[Call], str]:
    """Calls of `length` tokens each from a text, starting at token `first`, and the text's digest.

    every: take each `every`-th window of the text, so that few samples see more of it. Raises OptionError
    when the text is too short.
    """
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    last = first + length * ((samples - 1) * every + 1)
    if length < 1 or samples < 1 or first < 0 or every < 1 or tokens.numel() < last:
        raise OptionError(
            f"{samples} samples of {length} tokens from token {first} on, every = {every}, need {last} "
            f"tokens; the text has {tokens.numel()}"
        )
    rows = tokens[first:last].unfold(0, length, length * every)[:, None]
    calls: list[Call] = [((), {"input_ids": row.clone(), "use_cache": False}) for row in rows]
    source = f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]} tokens {first}-{last}"
    return calls, source + (f", one window in {every}" if every > 1 else "")
