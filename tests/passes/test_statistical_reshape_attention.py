"""Re-ttention's correction: its identities, its growth, requests that take turns, what it composes with."""

from __future__ import annotations

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
from tilewright.passes.attention.statistical_reshape import StatisticalReshape
from tilewright.runtime.step_state import Phase, Schedule, StepState

GRID, TEXT = (4, 4, 6), 3
TOKENS = 96 + TEXT
TILES = "sliding-tile-attention{tile=2x2x2,window=1x1x1}"
MASK = reference_mask(tile_grid(GRID, (2, 2, 2)), 0, TOKENS, ((1, 1, 1),) * 2)[None]
STEPS = [float(10 - i) for i in range(10)]


def drawn(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, TOKENS, 8, generator=generator, dtype=torch.float64) for _ in range(3))


def rewritten(pipeline: str, inputs=None):
    """(reports, the program as a function) of one attention under a pipeline."""
    facts = {"video_grid": GRID, "text_segment": (96, TEXT)}
    call = Example(lambda q, k, v: ops.attention(q, k, v), inputs or drawn(0), facts=facts)
    program = capture_example(call)
    reports = Pipeline.parse(pipeline).run(program, RunOptions(verify="shapes"))
    program.module.recompile()

    def run(*given):
        out = program.module(*given)
        return out[0] if isinstance(out, (tuple, list)) else out

    return reports, run


def phases(options: str = "growth=0.0"):
    """The functions of the two phases."""
    found = []
    for phase in ("refresh", "sparse"):
        reports, run = rewritten(f"{TILES},statistical-reshape{{phase={phase},{options}}}")
        assert len(reports[-1].applied) == 1, [r.reason for r in reports[-1].refused]
        found.append(run)
    return found


def parts(q, k, v):
    """rho, R and the sparse result, from whole softmaxes."""
    share = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1)
    rho = (share * MASK).sum(-1)
    missing = (share * ~MASK) @ v
    return rho, missing, ops.attention(q, k, v, MASK)


def started(*requests: str) -> StepState:
    state = StepState()
    for request in requests:
        state.begin(request, STEPS)
    return state


def test_what_is_kept_and_frozen_inputs() -> None:
    refresh, sparse = phases()
    inputs, state = drawn(1), started("r")
    dense = ops.attention(*inputs)
    with state.call("r", "c", 5):
        assert relative_rms(refresh(*inputs), dense) < 1e-12
    rho, missing, _ = parts(*inputs)
    assert relative_rms(state.get(("r", "c", 0), "rho").double(), rho) < 1e-6
    assert relative_rms(state.get(("r", "c", 0), "missing"), missing) < 1e-6
    for step in (6, 7):
        with state.call("r", "c", step):
            assert relative_rms(sparse(*inputs), dense) < 1e-6
    other = drawn(2)
    with state.call("r", "c", 8):
        want = rho[..., None] * parts(*other)[2] + missing
        assert relative_rms(sparse(*other), want) < 1e-6
        assert relative_rms(want, ops.attention(*other)) > 0.1


def test_rho_grows_with_every_step_that_ran() -> None:
    refresh, sparse = phases("growth=0.3")
    inputs, state = drawn(3), started("r")
    rho, missing, out = parts(*inputs)
    with state.call("r", "c", 0):
        refresh(*inputs)
    for age, step in enumerate((1, 2, 4, 5)):  # step 3 was skipped: it does not count
        for _ in range(2):  # a second-order scheduler calls twice
            with state.call("r", "c", step):
                kept = (rho + 0.3 * age).clamp(max=1.0)
                assert relative_rms(sparse(*inputs), kept[..., None] * out + missing) < 1e-6
    assert float((rho + 0.3 * 3).max()) > 1.0, "the clamp was reached"
    with state.call("r", "c", 6):
        refresh(*inputs)
    with state.call("r", "c", 7):
        assert relative_rms(sparse(*inputs), ops.attention(*inputs)) < 1e-6


def test_without_the_ratio_only_the_difference_is_kept() -> None:
    refresh, sparse = phases("use_ratio=false")
    first, later, state = drawn(4), drawn(5), started("r")
    with state.call("r", "c", 0):
        refresh(*first)
    with state.call("r", "c", 1):
        want = parts(*later)[2] + (ops.attention(*first) - parts(*first)[2])
        assert relative_rms(sparse(*later), want) < 1e-6


def test_a_layout_of_everything_keeps_everything() -> None:
    whole = TILES.replace("window=1x1x1", "window=0x0x0")
    _, refresh = rewritten(f"{whole},statistical-reshape")
    state = started("r")
    with state.call("r", "c", 0):
        refresh(*drawn(6))
    rho, missing = (state.get(("r", "c", 0), slot) for slot in ("rho", "missing"))
    assert float((rho - 1).abs().max()) < 1e-6
    assert float(missing.abs().max()) < 1e-6


def test_requests_and_branches_in_turns() -> None:
    refresh, sparse = phases()
    keys = [(r, b) for r in ("one", "two") for b in ("cond", "uncond")]
    inputs = {key: drawn(20 + i) for i, key in enumerate(keys)}
    state, schedule = started("one", "two"), Schedule(dense=1, period=3)
    for step in range(5):
        for key in keys if step % 2 else keys[::-1]:
            phase = state.phase(schedule, *key, step)
            if phase is Phase.DENSE:
                continue
            with state.call(*key, step):
                out = (refresh if phase is Phase.REFRESH else sparse)(*inputs[key])
            assert relative_rms(out, ops.attention(*inputs[key])) < 1e-6


def test_a_dense_step_for_masked_text() -> None:
    """The dense attention of a refresh keeps the mask of the keys."""
    keys = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    keys[0, :, :, -2:] = False
    facts = {"video_grid": GRID, "text_segment": (96, TEXT)}
    example = Example(lambda q, k, v, m: ops.attention(q, k, v, m), (*drawn(7), keys), facts=facts)
    program = capture_example(example)
    Pipeline.parse(f"{TILES},statistical-reshape").run(program, RunOptions(verify="shapes"))
    program.module.recompile()
    state = started("r")
    with state.call("r", "c", 0):
        out = program.module(*drawn(7), keys)
    assert relative_rms(out, ops.attention(*drawn(7), keys)) < 1e-12
    want = (
        torch.softmax((drawn(7)[0] @ drawn(7)[1].mT * 8**-0.5).masked_fill(~keys, -torch.inf), -1) * MASK
    ).sum(-1)
    assert relative_rms(state.get(("r", "c", 0), "rho").double(), want) < 1e-6


@pytest.mark.parametrize(
    "other",
    [
        "spatial-temporal-attention{density=0.5}",
        "adaptive-block-attention{block=16,sparsity=0.5}",
        "sparse-linear-attention",
    ],
)
def test_layouts_of_the_call_are_refused(other: str) -> None:
    """§3.4: rho and R refer to the layout of the dense step."""
    reports, _ = rewritten(f"{other},statistical-reshape")
    assert reports[0].applied
    assert not reports[1].applied
    assert any("computed in the call" in r.reason for r in reports[1].refused)


def test_two_layouts_for_one_attention_are_refused() -> None:
    """The second finds no dense attention left; the report says whose layout it has."""
    reports, _ = rewritten(f"{TILES},spatial-temporal-attention")
    assert len(reports[0].applied) == 1
    assert not reports[1].applied
    assert "sliding-tile-attention gave it a layout already" in reports[1].refused[0].reason


def test_order_of_passes() -> None:
    with pytest.raises(PipelineError, match="must come after sliding-tile-attention"):
        Pipeline.parse(f"statistical-reshape,{TILES}")
    with pytest.raises(OptionError, match="0 to 1"):
        StatisticalReshape(growth=-0.1)
