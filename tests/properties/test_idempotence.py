"""Normal form and pipeline, run over their own result, change nothing: real model shapes of every kind."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler.graph_text import print_graph
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import Pipeline, RunOptions, run_pass
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.tools.zoo_models import select

PIPELINE = Pipeline.parse(
    "gqa-unrepeat,common-subexpression,dead-code,fold-norm-scale,fuse-add-rmsnorm,fuse-projections"
)
QUICK = ("llama", "bert", "wan")
SLOW = ("qwen3-moe", "gemma2-eager", "gptj", "t5", "whisper", "swin", "mamba", "flux", "deepseek-v3")


RUNS = {"mamba": 2}
"""Where a product W x becomes linear, its transposes may meet others: one more run merges them."""


def captured(name):
    """The programs of one call of a zoo model."""
    programs = []

    def backend(gm, inputs):
        programs.append(from_dynamo(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    (entry,) = select([name])
    args, kwargs = entry.inputs()
    with torch.no_grad():
        torch.compile(entry.build(), backend=backend)(*args, **kwargs)
    return programs


def run_all(program):
    """Reports of the normal form and the pipeline, replay left out."""
    options = RunOptions(replay=False)
    reports = normalize(program, options) + PIPELINE.run(program, options)
    program.module.recompile()
    return reports


def check(name):
    (program,) = captured(name)
    for _ in range(RUNS.get(name, 1)):
        first = run_all(program)
        assert sum(len(r.applied) for r in first) > 0
    text = print_graph(program.graph)
    derived = len(program.derived)
    second = run_all(program)
    done = {r.name: [(a.rule, a.node) for a in r.applied] for r in second if r.applied}
    assert not done
    assert print_graph(program.graph) == text
    assert len(program.derived) == derived


@pytest.mark.parametrize("name", QUICK)
def test_a_second_run_changes_nothing(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_second_run_changes_nothing_elsewhere(name):
    check(name)


def test_a_pass_that_is_not_at_rest_is_noticed():
    """The same check over half a run: what is left to do shows."""
    (program,) = captured("llama")
    normalize(program, RunOptions(replay=False))
    reports = [run_pass(p, program, RunOptions(replay=False), Fuel()) for p in PIPELINE.passes]
    assert sum(len(r.applied) for r in reports) > 0
