"""quantize-attention behind layouts that other passes give, and its error against them."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.passes_base import Example
from tilewright.compiler.pipeline import Pipeline, RunOptions
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.selftest import capture_example

TILES = "sliding-tile-attention{tile=2x2x2,window=1x1x1}"
ONLINE = "adaptive-block-attention{block=16,sparsity=0.5}"


def drawn() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((2, 2, 96, 8), generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k + 4 * torch.randn((2, 2, 1, 8), generator=generator, dtype=torch.float64), v


def result(pipeline: str, *, training: bool = False):
    """(report of the last pass, result on `drawn`) of one attention under a pipeline."""
    call = Example(lambda q, k, v: ops.attention(q, k, v), drawn(), facts={"video_grid": (4, 4, 6)})
    program = capture_example(call)
    program.training = training
    reports = Pipeline.parse(pipeline).run(program, RunOptions(verify="shapes"))
    program.module.recompile()
    out = program.module(*drawn())
    return reports[-1], out[0] if isinstance(out, (tuple, list)) else out


@pytest.mark.parametrize(("scores", "most"), [("int8", 0.02), ("fp8", 0.08)])
@pytest.mark.parametrize(("layout", "attentions"), [(TILES, 1), (ONLINE, 2)])
def test_the_layout_stays_and_the_error_is_that_of_8_bits(
    layout: str, attentions: int, scores: str, most: float
) -> None:
    report, got = result(f"{layout},quantize-attention{{scores={scores}}}")
    assert len(report.applied) == attentions
    error = relative_rms(got, result(layout)[1])
    assert 1e-4 < error < most


def test_a_dense_attention_is_left_alone_and_exact_scores_change_nothing() -> None:
    assert not result("quantize-attention")[0].applied
    report, got = result(f"{TILES},quantize-attention{{scores=exact}}")
    assert not report.applied
    assert torch.equal(got, result(TILES)[1])


def test_it_is_for_inference() -> None:
    report, _ = result("quantize-attention", training=True)
    assert "inference" in report.skipped
