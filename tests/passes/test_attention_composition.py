"""Which pairs of systems compose: each legal pair equals its oracle, each other is refused with its reason.

The table is that of the sources: arXiv:2505.22918 for corrections, arXiv:2509.24006 for the linear branch.
"""

from __future__ import annotations

import re

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import OptionError, PipelineError
from tilewright.compiler.passes_base import Example
from tilewright.compiler.pipeline import Pipeline, RunOptions
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.selftest import capture_example
from tilewright.compiler.tiles import tile_grid
from tilewright.passes.attention._tile_layout import reference_mask
from tilewright.runtime.step_state import StepState

GRID = (4, 4, 6)
TOKENS = 96
STA = "sliding-tile-attention{tile=2x2x2,window=1x1x1}"
SVG1 = "spatial-temporal-attention{density=0.5}"
ADASPA = "adaptive-block-attention{block=16,sparsity=0.5}"
SLA = "sparse-linear-attention{block=16,topk=0.3}"
RETTENTION = "statistical-reshape"
HOIST = "hoist-token-permutation"
LAYOUTS = (STA, SVG1, ADASPA, SLA)


def name_of(text: str) -> str:
    return text.split("{")[0]


def drawn(seed: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = batch, 2, TOKENS, 8
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


def rewritten(pipeline: str, batch: int = 2):
    """(reports by pass, the program as a function) of one attention under a pipeline."""
    call = Example(lambda q, k, v: ops.attention(q, k, v), drawn(0, batch), facts={"video_grid": GRID})
    program = capture_example(call)
    reports = Pipeline.parse(pipeline).run(program, RunOptions(verify="shapes"))
    program.module.recompile()

    def run(*given):
        out = program.module(*given)
        return out[0] if isinstance(out, (tuple, list)) else out

    return {report.name: report for report in reports}, run


NOT_TOGETHER = [
    *(
        (first, second, "gave it a layout already")
        for first in LAYOUTS
        for second in LAYOUTS
        if first != second
    ),
    *((layout, RETTENTION, "computed in the call") for layout in (SVG1, ADASPA, SLA)),
    (STA, HOIST, "the only one in its order"),
]


@pytest.mark.parametrize(("first", "second", "reason"), NOT_TOGETHER)
def test_refused_with_a_reason(first: str, second: str, reason: str) -> None:
    """And the program is that of the first alone."""
    reports, run = rewritten(f"{first},{second}")
    assert len(reports[name_of(first)].applied) == 1
    assert not reports[name_of(second)].applied
    said = [r.reason for r in reports[name_of(second)].refused]
    assert any(reason in text for text in said), said
    assert torch.equal(run(*drawn(1)), rewritten(first)[1](*drawn(1)))


@pytest.mark.parametrize("layout", [STA, HOIST])
def test_a_correction_comes_last(layout: str) -> None:
    with pytest.raises(PipelineError, match="must come after"):
        Pipeline.parse(f"{RETTENTION},{layout}")


def test_correction_of_sliding_tiles() -> None:
    """One layout for a period: rho times the sparse result plus what the dense step had besides."""
    refresh, sparse = (
        rewritten(f"{STA},{RETTENTION}{{phase={phase},growth=0.1}}")[1] for phase in ("refresh", "sparse")
    )
    mask = reference_mask(tile_grid(GRID, (2, 2, 2)), 0, TOKENS, ((1, 1, 1),) * 2)[None]
    first, later, state = drawn(2), drawn(3), StepState()
    state.begin("r", [3.0, 2.0, 1.0])
    with state.call("r", "", 0):
        assert relative_rms(refresh(*first), ops.attention(*first)) < 1e-12
    share = torch.softmax(first[0] @ first[1].mT * 8**-0.5, -1)
    rho, missing = (share * mask).sum(-1, keepdim=True), (share * ~mask) @ first[2]
    for step in (1, 2):
        kept = (rho + 0.1 * (step - 1)).clamp(max=1.0)
        with state.call("r", "", step):
            want = kept * ops.attention(*later, mask) + missing
            assert relative_rms(sparse(*later), want) < 1e-6


def test_a_correction_holds_the_error_of_8_bit_scores() -> None:
    """What the sparse call of a refresh gets wrong is in what the correction adds: on frozen inputs a sparse
    step with 8-bit scores repeats the refresh."""
    steps = {
        (phase, scores): rewritten(f"{STA},{RETTENTION}{{phase={phase}}}{scores}")[1]
        for phase in ("refresh", "sparse")
        for scores in ("", ",quantize-attention")
    }
    inputs, state = drawn(6), StepState()
    state.begin("r", [2.0, 1.0, 0.0])
    with state.call("r", "", 0):
        want = steps["refresh", ",quantize-attention"](*inputs)
    with state.call("r", "", 1):
        assert relative_rms(steps["sparse", ",quantize-attention"](*inputs), want) < 1e-6
        assert relative_rms(steps["sparse", ""](*inputs), want) > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_branches_in_one_batch(layout: str) -> None:
    """Layouts of the call have a batch axis: both branches of guidance in one call are two calls."""
    _, joined = rewritten(layout)
    _, single = rewritten(layout, batch=1)
    inputs = drawn(4)
    apart = torch.cat([single(*(x[i : i + 1] for x in inputs)) for i in range(2)])
    assert relative_rms(joined(*inputs), apart) < 1e-12
    assert relative_rms(apart, ops.attention(*inputs)) > 1e-3


@pytest.mark.parametrize("system", [pytest.param(ADASPA, marks=pytest.mark.slow), SLA])
def test_tile_order_under_pooled_selection(system: str) -> None:
    """Blocks of tiles are blocks of tokens that stood tile by tile before; text and results keep theirs."""
    order = tile_grid(GRID, (2, 2, 3)).table()
    inputs, alone = drawn(5), rewritten(system)[1]
    tiled = rewritten(system.replace("}", ",tile=2x2x3}"))[1]
    want = alone(*(x[:, :, order] for x in inputs))[:, :, torch.argsort(order)]
    got = tiled(*inputs)
    assert relative_rms(got, want) < 1e-12
    assert relative_rms(got, alone(*inputs)) > 1e-2


@pytest.mark.parametrize(
    ("system", "tile", "said"),
    [
        (ADASPA, "0x2x2", "from 1, or 0x0x0"),
        (SLA, "5x2x2", "5 is more than the 4 tokens along T"),
        (SLA, "2x2x2,variant=main,proj=p.safetensors", "trained for blocks of tokens in their own order"),
    ],
)
def test_tile_orders_that_cannot_be(system: str, tile: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        rewritten(system.replace("}", f",tile={tile}}}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (STA.replace("2x2x2", "3x2x5"), None),
        (SVG1, "order of its own"),
        (ADASPA, "in their own order"),
        (SLA, "in their own order"),
        (SLA.replace("}", ",tile=3x2x5}"), "mixes tokens by their position"),
        (ADASPA.replace("}", ",tile=3x2x5}"), "mixes tokens by their position|in their own order"),
    ],
)
def test_hoisting_over_a_model(layout: str, reason: str | None, video_program, float64_outputs) -> None:
    """Only an order that all heads share leaves the transformer, and it changes nothing."""
    alone, both = video_program("wan"), video_program("wan")
    Pipeline.parse(layout).run(alone, RunOptions())
    reports = Pipeline.parse(f"{layout},{HOIST}").run(both, RunOptions())
    assert len(reports[0].applied) == 2
    assert len(reports[1].applied) == (reason is None)
    if reason is not None:
        assert reports[1].refused
        assert all(re.search(reason, r.reason) for r in reports[1].refused)
    assert relative_rms(float64_outputs(both)[0], float64_outputs(alone)[0]) < 1e-12
