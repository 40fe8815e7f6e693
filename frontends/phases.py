"""One program per phase of a pipeline: what a denoising loop runs at dense, search, refresh, sparse steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from tilewright.compiler import Stage
from tilewright.compiler.pipeline import Pipeline
from tilewright.passes.attention._video_pass import VideoAttentionPass
from tilewright.runtime.step_state import Phase


def phase_pipelines(pipeline: str | Pipeline) -> dict[str, Pipeline]:
    """Phase -> the pipeline of that phase: `dense`, `sparse`, and what its passes have besides.

    At dense steps passes over attention are left out. Passes with an option `phase` take each of its values
    that is a phase; where they have not all of them, the others run as they are. Passes whose steps differ (a
    window table) give `sparse@step` besides, one pipeline for the steps that are alike.
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
    return found | _by_step(found[Phase.SPARSE.value])


def _by_step(sparse: Pipeline) -> dict[str, Pipeline]:
    rows = {p: p.steps() for p in sparse.passes if isinstance(p, VideoAttentionPass) and p.steps()}
    found, alike = dict[str, Pipeline](), dict[tuple[Hashable, ...], Pipeline]()
    for step in sorted(set().union(*rows.values())):
        same = tuple(steps.get(step) for steps in rows.values())
        if same not in alike:
            alike[same] = Pipeline(
                dataclasses.replace(p, step=step) if p in rows else p  # type: ignore[type-var,call-arg]
                for p in sparse.passes
            )
        found[f"{Phase.SPARSE.value}@{step}"] = alike[same]
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
    found, made = dict[str, Callable[..., Any]](), dict[str, Callable[..., Any]]()
    for phase, one in phase_pipelines(pipeline).items():
        if one.text() not in made:
            given: dict[str, Any] = {**(options or {}), "pipeline": one}
            # Alone: Dynamo counts recompilations of a function, and beyond eight it runs the plain model.
            apart: dict[str, Any] = {"isolate_recompiles": True}  # absent from the declared signatures
            made[one.text()] = torch.compile(model, backend="tilewright", options=given, **apart)
        found[phase] = made[one.text()]
    return found
