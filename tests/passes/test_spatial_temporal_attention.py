"""Spatial-temporal attention: planted heads, bands against written-out masks, models, bad input."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.bands import band_density, band_width, with_text
from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.log import Fuel
from tilewright.compiler.passes_base import Example, Tensor
from tilewright.compiler.pipeline import RunOptions, run_pass
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.selftest import capture_example
from tilewright.passes.attention._band_layout import SPATIAL, TEMPORAL, band_layout, band_masks, classify
from tilewright.passes.attention.spatial_temporal_attention import SpatialTemporalAttention

GRID = (6, 4, 5)
VIDEO = 120


def run(value, program):
    report = run_pass(value, program, RunOptions(verify="shapes"), Fuel())
    program.module.recompile()
    return report


def planted() -> tuple[torch.Tensor, ...]:
    """Head 0 attends its own frame, head 1 its own place in every frame."""
    generator = torch.Generator().manual_seed(0)
    frames, places = torch.randn(6, 32, generator=generator), torch.randn(20, 32, generator=generator)
    frame = torch.arange(VIDEO) // 20
    heads = torch.stack([frames[frame], places[torch.arange(VIDEO) % 20]])[None] * 3
    noise = torch.randn(1, 2, VIDEO, 32, generator=generator) * 0.1
    value = torch.randn(1, 2, VIDEO, 32, generator=generator)
    return (heads + noise).double(), heads.double(), value.double()


def test_planted_heads_are_told_apart() -> None:
    q, k, v = planted()
    rows = torch.randint(VIDEO, (32,), generator=torch.Generator().manual_seed(1))
    masks = band_masks(GRID, 0, VIDEO, 20, 0, rows)
    (found,) = classify(q, k, v, rows, masks, scale=None, kind="none")
    assert found.tolist() == [[SPATIAL, TEMPORAL]]
    (turned,) = classify(q.flip(1), k.flip(1), v, rows, masks, scale=None, kind="none")
    assert turned.tolist() == [[TEMPORAL, SPATIAL]]


def test_the_program_classifies_each_batch_entry() -> None:
    q, k, v = planted()
    q, k = torch.cat([q, q.flip(1)]), torch.cat([k, k.flip(1)])
    v = torch.cat([v, v])
    example = Example(lambda q, k, v: ops.attention(q, k, v), (q, k, v), facts={"video_grid": GRID})
    program = capture_example(example)
    value = SpatialTemporalAttention(density=0.4)
    assert len(run(value, program).applied) == 1
    out = program.module(q, k, v)
    out = out[0] if isinstance(out, (tuple, list)) else out
    width = band_width(0.4, tokens=VIDEO, text=0, frame=20)
    near = band_masks(GRID, 0, VIDEO, width, 0)
    for batch, classes in enumerate(([0, 1], [1, 0])):
        want = ops.attention(q[batch : batch + 1], k[batch : batch + 1], v[:1], near[classes][None])
        assert relative_rms(out[batch : batch + 1], want) < 1e-12
    dense = ops.attention(q, k, v)
    other = ops.attention(q[:1], k[:1], v[:1], near[[1, 0]][None])
    assert relative_rms(out[:1], dense[:1]) < 0.2 * relative_rms(other, dense[:1]), (
        "the right band loses less"
    )


@pytest.mark.parametrize(("start", "text"), [(0, 0), (0, 9), (9, 9)])
@pytest.mark.parametrize("width", [0, 7, 40, 200])
@pytest.mark.parametrize("sink", [0, 20])
def test_layout_against_written_out_masks(start: int, text: int, width: int, sink: int) -> None:
    grid, tokens = (6, 5, 8), 240 + text
    layout = band_layout(grid, start, tokens, 2, width, sink)
    layout = layout.with_(head_group=torch.tensor([[0, 1]], dtype=torch.int32))
    layout.validate()
    masks = band_masks(grid, start, tokens, width, sink)
    q, k, v = torch.randn(3, 1, 2, tokens, 8, dtype=torch.float64).unbind()
    out, _ = ops.block_sparse_attention(q, k, v, *layout.arguments(), None)
    assert relative_rms(out, ops.attention(q, k, v, masks[None])) < 1e-13
    assert abs(layout.density() - float(masks.double().mean())) < 1e-12
    if not sink:
        share = with_text(band_density(240, width), tokens=240, text=text)
        assert abs(layout.density() - float(share)) < 1e-12


def test_most_blocks_of_a_band_are_whole() -> None:
    """Only the borders of the band carry a predicate."""
    layout = band_layout((16, 16, 16), 0, 4096, 1, 1024, 0)
    entries = int(layout.row_ptr[0, -1])
    partial = int((layout.flag[0, :entries] > 0).sum())
    assert partial <= 2 * 2 * 32
    assert entries - partial > 3 * partial


@pytest.mark.parametrize(
    ("name", "layers"), [("wan", 2), pytest.param("hunyuan-video", 4, marks=pytest.mark.slow)]
)
def test_models(name, layers, video_program, float64_outputs) -> None:
    original, sparse, reference, whole = (video_program(name) for _ in range(4))
    value = SpatialTemporalAttention(density=0.5, rows=16)
    assert len(run(value, sparse).applied) == layers
    value.reference(reference)
    want = float64_outputs(reference)
    assert relative_rms(float64_outputs(sparse)[0], want[0]) < 1e-12
    before = float64_outputs(original)[0]
    assert relative_rms(want[0], before) > 1e-7
    assert len(run(value.exact_limit(), whole).applied) == layers
    assert relative_rms(float64_outputs(whole)[0], before) < 1e-12


@pytest.mark.parametrize(
    ("options", "said"),
    [({"density": 0.0}, "more than 0"), ({"density": 1.5}, "at most 1"), ({"rows": 0}, "1 or more")],
)
def test_illegal_options(options, said) -> None:
    with pytest.raises(OptionError, match=said):
        SpatialTemporalAttention(**options)


def test_too_little_density_for_the_text_is_an_error() -> None:
    example = Example(
        lambda q, k, v: ops.attention(q, k, v),
        (Tensor(1, 2, 150, 8),) * 3,
        facts={"video_grid": GRID, "text_segment": (120, 30)},
    )
    with pytest.raises(OptionError, match="the 30 text tokens of 150 alone take 0.4"):
        run(SpatialTemporalAttention(density=0.3), capture_example(example))
