"""Hoisting a tile order out of captured video transformers: exact, at their ends only, else refused."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.dataflow import Flow, op_name
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import Pipeline, RunOptions, run_pass
from tilewright.compiler.replay import relative_rms
from tilewright.passes.attention.hoist_token_permutation import HoistTokenPermutation
from tilewright.passes.attention.sliding_tile_attention import SlidingTileAttention

TILES = SlidingTileAttention(tile=(2, 3, 2), window=(1, 1, 1), nondivisible="ceil")
PERMUTED = {"wan": 3, "cogvideox": 3, "ltx": 2, "hunyuan-video": 4, "mochi": 3}
"""Values permuted on entry: video tokens with cosines and sines, or with the positions (all, or by axis)."""
NAMES = [n if n == "wan" else pytest.param(n, marks=pytest.mark.slow) for n in PERMUTED]


def run(value, program):
    report = run_pass(value, program, RunOptions(verify="shapes"), Fuel())
    program.module.recompile()
    return report


def gathers(program) -> list:
    return [n for n in program.graph.nodes if op_name(n) == "index_select"]


LAYERS = {"hunyuan-video": 4}
"""Video attentions where there are not two."""


@pytest.mark.parametrize("name", NAMES)
def test_models(name, video_program, float64_outputs) -> None:
    per_layer, hoisted = video_program(name), video_program(name)
    for program in (per_layer, hoisted):
        assert len(run(TILES, program).applied) == LAYERS.get(name, 2)
    report = run(HoistTokenPermutation(), hoisted)
    assert len(report.applied) == 1, [r.reason for r in report.refused]
    want, got = float64_outputs(per_layer), float64_outputs(hoisted)
    assert max(relative_rms(g, w) for g, w in zip(got, want, strict=True)) < 1e-14
    attentions = [n for n in hoisted.graph.nodes if n.target is ops.block_sparse_attention]
    assert len(attentions) == LAYERS.get(name, 2)
    assert all(n.args[13] is None and n.args[14] is None for n in attentions)
    flow = Flow(hoisted.graph)
    ends = [n for n in gathers(hoisted) if any(flow.reaches(a, n) for a in attentions)]
    assert len(gathers(hoisted)) - len(ends) == PERMUTED[name]
    assert len(ends) == 1, "put back once, where the tokens leave"
    assert not any(flow.reaches(n, a) for n in ends for a in attentions), "nothing between the layers"


def test_rotary_tables_must_be_permuted_too(video_program, float64_outputs) -> None:
    """The control: the same program with its tables in the old order is another function."""
    per_layer, broken = video_program("wan"), video_program("wan")
    run(TILES, per_layer)
    run(TILES, broken)
    run(HoistTokenPermutation(), broken)
    flow = Flow(broken.graph)
    latent = next(n for n in broken.graph.nodes if op_name(n) == "conv3d")
    tables = [n for n in gathers(broken) if not flow.reaches(latent, n)]
    assert len(tables) == 2
    for table in tables:
        table.replace_all_uses_with(table.args[0])
    assert relative_rms(float64_outputs(broken)[0], float64_outputs(per_layer)[0]) > 1e-3


def test_text_form_and_order() -> None:
    pipeline = Pipeline.parse(
        "sliding-tile-attention{tile=2x3x2,window=1x1x1,nondivisible=ceil},hoist-token-permutation"
    )
    assert pipeline == Pipeline([TILES, HoistTokenPermutation()])
    with pytest.raises(Exception, match="must come after sliding-tile-attention"):
        Pipeline([HoistTokenPermutation(), TILES])


def with_node(program, at, target, *args):
    """Insert a call whose result takes the place of `at` for all later users."""
    from tilewright.compiler.graph import insert_like

    new = insert_like(program.graph, at.next, target, (at, *args), at)
    at.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return new


def replace_first_frame(program, at):
    """The tokens of the first frame are scaled by their place (image to video models replace them)."""
    from tilewright.compiler.graph import insert_like

    other = insert_like(program.graph, at.next, torch.ops.aten.zeros_like.default, (at,), at)
    frame = insert_like(program.graph, other.next, torch.ops.aten.slice.Tensor, (other, 1, 0, 20), at)
    new = insert_like(
        program.graph, frame.next, torch.ops.aten.slice_scatter.default, (at, frame, 1, 0, 20), at
    )
    at.replace_all_uses_with(new, delete_user_cb=lambda user: user not in (new, other))


def stream_between(program):
    """The residual value between the two layers."""
    first, second = [n for n in program.graph.nodes if n.target is ops.block_sparse_attention]
    flow = Flow(program.graph)
    return next(
        n
        for n in flow.members(flow.below(first) & flow.upto(second))
        if op_name(n) == "add" and tuple(n.meta["val"].shape) == (2, 60, 48)
    )


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda p, x: with_node(p, x, torch.ops.aten.cumsum.default, 1), "cumsum"),
        (lambda p, x: with_node(p, x, torch.ops.aten.roll.default, [1], [1]), "roll"),
        (lambda p, x: replace_first_frame(p, x), "writes some of the tokens by their position"),
        (
            lambda p, x: with_node(p, with_node(p, x, torch.ops.aten.reshape.default, [2, 3, 20, 48]),
                                   torch.ops.aten.reshape.default, [2, 60, 48]),
            "joins or cuts the axis of tokens",
        ),
    ],
    ids=["scan", "shift", "first-frame", "regroup"],
)  # fmt: skip
def test_ops_that_mix_tokens_between_layers(break_it, said, video_program) -> None:
    program = video_program("wan")
    run(TILES, program)
    break_it(program, stream_between(program))
    before = len(program.graph.nodes)
    report = run(HoistTokenPermutation(), program)
    assert not report.applied
    assert said in report.refused[0].reason
    assert "between the layers" in report.refused[0].reason
    assert len(program.graph.nodes) == before


def test_what_is_added_per_token_is_permuted_with_them(video_program, float64_outputs) -> None:
    """A control residual: per-token values from outside enter between the layers."""
    from tilewright.compiler.graph import insert_like

    programs = [video_program("wan"), video_program("wan")]
    for program in programs:
        run(TILES, program)
        latent = next(n for n in program.graph.nodes if op_name(n) == "conv3d")
        at = stream_between(program)
        control = insert_like(program.graph, at, torch.ops.aten.reshape.default, (latent, [2, 48, 60]), at)
        control = insert_like(program.graph, at, torch.ops.aten.permute.default, (control, [0, 2, 1]), at)
        with_node(program, at, torch.ops.aten.add.Tensor, control)
    report = run(HoistTokenPermutation(), programs[1])
    assert len(report.applied) == 1, [r.reason for r in report.refused]
    want, got = (float64_outputs(p)[0] for p in programs)
    assert relative_rms(got, want) < 1e-14
