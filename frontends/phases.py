"""One program per phase of a pipeline: what a denoising loop runs at dense, search, refresh, sparse steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from tilewright.compiler import Stage
from tilewright.compiler.pipeline import Pipeline
from tilewright.runtime.step_state import Phase


def phase_pipelines(pipeline: str | Pipeline) -> dict[str, Pipeline]:
    """Phase -> the pipeline of that phase: `dense`, `sparse`, and what its passes have besides.

    At dense steps passes over attention are left out. Passes with an option `phase` take each of its values
    that is a phase; where they have not all of them, the others run as they are.
    """
    parsed = Pipeline.parse(pipeline)
    found = {Phase.DENSE.value: Pipeline(p for p in parsed.passes if p.stage is not Stage.ATTENTION)}
    legal = {p: _phases_of(p) for p in parsed.passes}
    for phase in (Phase.SEARCH.value, Phase.REFRESH.value, Phase.SPARSE.value):
        if phase == Phase.SPARSE.value or any(phase in names for names in legal.values()):
            found[phase] = Pipeline(
                dataclasses.replace(p, phase=phase) if phase in legal[p] else p  # type: ignore[type-var]
                for p in parsed.passes
            )
    return found


def _phases_of(value: Any) -> tuple[str, ...]:
    return get_args(get_type_hints(type(value)).get("phase"))


def phase_programs(
    model: nn.Module, pipeline: str | Pipeline, options: Mapping[str, Any] | None = None
) -> dict[str, Callable[..., Any]]:
    """Phase -> `model` under the pipeline of that phase, compiled when its first step comes.

    options: those of the torch.compile backend, but the pipeline. For StepRunner, with a Schedule:
    `StepRunner(programs["dense"], state=StepState(), schedule=schedule, models=programs)`.
    """
    found: dict[str, Callable[..., Any]] = {}
    for phase, one in phase_pipelines(pipeline).items():
        given: dict[str, Any] = {**(options or {}), "pipeline": one}
        found[phase] = torch.compile(model, backend="tilewright", options=given)
    return found
