"""Attention passes with 8-bit scores, dropped layers, reused residuals and early exits: each pair equals its
oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tilewright.compiler import Tensor as Drawn
from tilewright.compiler import ops
from tilewright.compiler.diagnostics import PipelineError
from tilewright.compiler.ops.quantized_attention import rounded_keys, rounded_queries
from tilewright.compiler.passes_base import Example
from tilewright.compiler.pipeline import Pipeline, RunOptions
from tilewright.compiler.program import Program
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.report import PassReport
from tilewright.compiler.selftest import capture_example
from tilewright.runtime.step_reuse import Accumulated, StepReuse
from tilewright.runtime.step_state import Phase, Schedule, StepState

GRID, TOKENS, HIDDEN, HEADS, LAYERS = (4, 4, 6), 96, 16, 2, 3
PER_LAYER = 6
STA = "sliding-tile-attention{tile=2x2x2,window=1x1x1}"
SVG1 = "spatial-temporal-attention{density=0.5}"
ADASPA = "adaptive-block-attention{block=16,sparsity=0.5}"
SLA = "sparse-linear-attention{block=16,topk=0.3}"
HOIST = f"{STA},hoist-token-permutation"
RETTENTION = f"{STA},statistical-reshape"
INT8 = "quantize-attention"
SYSTEMS = (STA, SVG1, ADASPA, SLA, HOIST, RETTENTION, f"{STA},{INT8}")
CASES = [s if s in (STA, HOIST) else pytest.param(s, marks=pytest.mark.slow) for s in SYSTEMS]
DROP = "drop-layers{layers=1,max_share=1}"
REUSE = "reuse-step-residual{metric=modulated}"
EXIT = "early-exit{exits=1+2,threshold=0.95,prompt=true}"


def stack(x: Tensor, *weights: Tensor) -> Tensor:
    """Layers of self-attention and an MLP over the tokens of a grid; x [2, T, C]."""
    for at in range(0, len(weights), PER_LAYER):
        wq, wk, wv, wo, up, down = weights[at : at + PER_LAYER]
        q, k, v = (ops.linear(x, w).reshape(2, TOKENS, HEADS, -1).transpose(1, 2) for w in (wq, wk, wv))
        x = x + ops.linear(ops.attention(q, k, v).transpose(1, 2).reshape(2, TOKENS, HIDDEN), wo)
        x = x + ops.linear(torch.tanh(ops.linear(x, up)), down)
    return torch.sin(x)


def given(seed: int = 0) -> list[Tensor]:
    """x and the weights of all layers; the same weights for all seeds."""
    fixed, drawn = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    x = torch.randn(2, TOKENS, HIDDEN, generator=drawn, dtype=torch.float64)
    shape = HIDDEN, HIDDEN
    scale = 0.7 / HIDDEN**0.5
    weights = [torch.randn(shape, generator=fixed, dtype=torch.float64) for _ in range(LAYERS * PER_LAYER)]
    return [x, *(scale * w for w in weights)]


def built(pipeline: str, layers: int = LAYERS) -> tuple[dict[str, PassReport], Program]:
    """(reports by pass, program) of the stack under a pipeline."""
    weight = Drawn(HIDDEN, HIDDEN, dtype=torch.float64, weight=True)
    inputs = (Drawn(2, TOKENS, HIDDEN, dtype=torch.float64), *[weight] * (layers * PER_LAYER))
    program = capture_example(Example(stack, inputs, facts={"video_grid": GRID}))
    reports = Pipeline.parse(pipeline).run(program, RunOptions(verify="shapes"))
    program.module.recompile()
    return {report.name: report for report in reports}, program


def first(out: Any) -> Tensor:
    result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return result


def run(program: Program, inputs: Sequence[Tensor]) -> Tensor:
    return first(program.module(*inputs))


class Rounded(fx.Interpreter):
    """Every block-sparse attention reads queries and keys as their 8-bit codes stand for them."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ops.block_sparse_attention:
            args = rounded_queries(args[0]), rounded_keys(args[1]), *args[2:]
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("system", CASES[:-1])
def test_scores_in_8_bits(system: str) -> None:
    """The layout of the first and the codes of the second, whatever order tokens are in."""
    state = StepState()
    state.begin("r", [1.0])
    reports, both = built(f"{system},{INT8}")
    alone = built(system)[1]
    attentions = sum(n.target is ops.block_sparse_attention for n in alone.graph.nodes)
    assert len(reports[INT8].applied) == attentions >= LAYERS
    with state.call("r", "", 0):
        got = run(both, given())
        want = first(Rounded(alone.module).run(*given()))
        exact = run(alone, given())
    assert relative_rms(got, want) < 1e-6
    assert 1e-5 < relative_rms(got, exact) < 0.1


def in_a_step(program: Program, inputs: Sequence[Tensor]) -> Tensor:
    state = StepState()
    state.begin("r", [1.0])
    with state.call("r", "", 0):
        return run(program, inputs)


@pytest.mark.parametrize("system", CASES)
def test_dropped_layers(system: str) -> None:
    """The system on the stack without that layer, bit for bit."""
    reports, both = built(f"{DROP},{system}")
    assert len(reports["drop-layers"].applied) == 1
    assert len(reports[system.split("{")[0]].applied) == LAYERS - 1
    x, *weights = given()
    shorter = [x, *weights[:PER_LAYER], *weights[2 * PER_LAYER :]]
    want = in_a_step(built(system, LAYERS - 1)[1], shorter)
    assert torch.equal(in_a_step(both, given()), want)
    assert relative_rms(in_a_step(built(system)[1], given()), want) > 1e-3


@pytest.mark.parametrize("system", CASES)
def test_reused_residuals(system: str) -> None:
    """Computed steps are the system's own; others add what the last computed one added to the stream."""
    reports, both = built(f"{REUSE},{system}")
    assert len(reports["reuse-step-residual"].applied) == 1
    assert len(reports[system.split("{")[0]].applied) == LAYERS
    alone = built(system)[1]
    reuse, state = StepReuse(Accumulated(1e9)), StepState()
    reuse.begin("r", 4)
    state.begin("r", [3.0, 2.0, 1.0, 0.0])
    stream, kept = entry_to_exit(alone), torch.zeros(())
    for step in range(4):
        inputs = given(step)
        with reuse.call("r", "", step), state.call("r", "", step):
            got = run(both, inputs)
        with state.call("r", "", step):
            added = stream(inputs)
            if step in (0, 3):
                kept = added
                assert torch.equal(got, run(alone, inputs))
            else:
                assert relative_rms(got, torch.sin(inputs[0] + kept)) < 1e-12
                assert relative_rms(got, run(alone, inputs)) > 1e-3
    assert reuse.end("r") == (2, 2)


def test_a_stretch_left_out_does_not_search() -> None:
    """Run op by op, the layers of a reused stretch still compute: what they find is not kept, and a search
    that they miss is owed although layer 0, in front of the stretch, searched."""
    gate = "reuse-step-residual{metric=first-block,head=1}"
    searching = built(f"{gate},{ADASPA.replace('}', ',phase=search}')}")[1]
    sparse = built(f"{gate},{ADASPA.replace('}', ',phase=sparse}')}")[1]
    reuse, state, schedule = StepReuse(Accumulated(1e9)), StepState(), Schedule(searches=(0, 2))
    reuse.begin("r", 6)
    state.begin("r", [float(5 - step) for step in range(6)])

    def step(number: int, program: Program) -> list[Tensor]:
        with reuse.call("r", "", number), state.call("r", "", number):
            run(program, given(number))
        return [state.get(("r", "", layer), "lse") for layer in range(LAYERS)]

    front, *found = step(0, searching)
    assert all(map(torch.equal, step(1, sparse)[1:], found))
    again, *held = step(2, searching)
    assert not torch.equal(again, front)
    assert all(map(torch.equal, held, found)), "another x, left out"
    assert state.phase(schedule, "r", "", 3) is Phase.SEARCH
    assert not any(map(torch.equal, step(5, searching)[1:], found)), "the last step is computed"
    assert reuse.end("r") == (2, 2)


@pytest.mark.parametrize("system", CASES)
def test_tokens_that_leave_early(system: str) -> None:
    """They stay in the grid as keys with the value they left with; only a hoisted order cannot know them."""
    reports, both = built(f"{EXIT},{system}")
    assert len(reports["early-exit"].applied) == 2
    assert len(reports[system.split("{")[0]].applied) == LAYERS
    if system == HOIST:
        (refusal,) = reports["hoist-token-permutation"].refused
        assert "places tokens itself" in refusal.reason
    layer = before_the_end(built(STA if system == HOIST else system, 1)[1])
    x, *weights = given()
    active = torch.ones(2, TOKENS, dtype=torch.bool)
    for at in range(LAYERS):
        after = in_a_step(layer, [x, *weights[at * PER_LAYER : (at + 1) * PER_LAYER]])
        after = torch.where(active[..., None], after, x)
        if at + 1 < LAYERS:
            active = active & ~(torch.cosine_similarity(after, x, -1) > 0.95)
        x = after
    assert 0.1 < active.double().mean() < 0.9
    assert relative_rms(in_a_step(both, given()), torch.sin(x)) < 1e-9
    assert relative_rms(in_a_step(built(system)[1], given()), torch.sin(x)) > 1e-3


@pytest.mark.parametrize(("threshold", "phase"), [(0, Phase.SEARCH), (1, Phase.SPARSE)])
def test_a_search_that_all_tokens_left_before_is_owed(threshold: int, phase: Phase) -> None:
    """Compiled, a stretch without tokens does not run, so its layers may hold nothing to go by."""
    system = ADASPA.replace("}", ",phase=search}")
    _, program = built(EXIT.replace("0.95", str(threshold)) + f",{system}")
    state, schedule = StepState(), Schedule(searches=(0,))
    state.begin("r", [1.0, 0.0])
    with state.call("r", "", 0):
        run(program, given())
    assert state.phase(schedule, "r", "", 1) is phase


@pytest.mark.parametrize("later", [DROP, REUSE, EXIT])
@pytest.mark.parametrize("system", SYSTEMS)
def test_layers_go_before_attention_changes(system: str, later: str) -> None:
    """What a layout was made for must not be left out behind its back."""
    with pytest.raises(PipelineError, match=r"stage STRUCTURE.* stands after .*stage ATTENTION"):
        Pipeline.parse(f"{system},{later}")


def before_the_end(program: Program) -> Program:
    """The program without its last op: it returns the stream behind the layers."""
    copy = program.clone()
    last = next(n for n in reversed(copy.graph.nodes) if n.target is torch.ops.aten.sin.default)
    last.replace_all_uses_with(last.args[0])
    copy.module.recompile()
    return copy


def entry_to_exit(program: Program) -> Callable[[Sequence[Tensor]], Tensor]:
    """What the layers add to the stream."""
    copy = before_the_end(program)
    return lambda inputs: run(copy, inputs) - inputs[0]
