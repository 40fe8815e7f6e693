"""Sliding tile attention on captured video transformers, against dense attention under a written-out mask."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.diagnostics import FactError, OptionError
from tilewright.compiler.facts import apply_user_facts
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import RunOptions, run_pass
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.tiles import key_tiles, tile_grid, window_density
from tilewright.passes.attention._tile_layout import reference_mask, tile_layout
from tilewright.passes.attention._window_table import checkpoint_of
from tilewright.passes.attention.sliding_tile_attention import SlidingTileAttention

RAGGED = SlidingTileAttention(tile=(2, 3, 2), window=(1, 1, 1), nondivisible="ceil")
MODELS = {"wan": 2, "hunyuan-video": 4, "cogvideox": 2, "ltx": 2, "mochi": 2}
"""Video self-attentions by model; grid 3 x 4 x 5."""
QUICK = ("wan", "cogvideox", "mochi")
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


def applied(value, program):
    report = run_pass(value, program, RunOptions(verify="shapes"), Fuel())
    program.module.recompile()
    return report


def worst(got, want) -> float:
    return max(relative_rms(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_models_equal_the_masked_dense_program(name, video_program, float64_outputs) -> None:
    original, sparse, reference = (video_program(name) for _ in range(3))
    report = applied(RAGGED, sparse)
    assert len(report.applied) == MODELS[name], [r.reason for r in report.refused]
    RAGGED.reference(reference)
    want = float64_outputs(reference)
    assert worst(float64_outputs(sparse), want) < 1e-12
    assert worst(want, float64_outputs(original)) > 1e-6, "the window must matter"


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_window_is_the_original(name, video_program, float64_outputs) -> None:
    original, sparse = video_program(name), video_program(name)
    assert len(applied(RAGGED.exact_limit(), sparse).applied) == MODELS[name]
    assert worst(float64_outputs(sparse), float64_outputs(original)) < 1e-12


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("wan", 2),
        pytest.param("ltx", 2, marks=pytest.mark.slow),
        pytest.param("hunyuan-video", 1, marks=pytest.mark.slow),
        ("mochi", 1),
    ],
)
def test_other_attentions_stay_byte_for_byte(name, left, video_program) -> None:
    program = video_program(name)
    video = {a.node for a in applied(RAGGED, video_program(name)).applied}
    before = {n.name: str(n.format_node()) for n in program.graph.nodes if n.target is ops.attention}
    report = applied(RAGGED, program)
    after = {n.name: str(n.format_node()) for n in program.graph.nodes if n.target is ops.attention}
    assert after == {n: text for n, text in before.items() if n not in video}
    assert len(after) == left == len(report.refused)


def test_cross_attention_says_so(video_program) -> None:
    wan = applied(RAGGED, video_program("wan"))
    assert {r.reason for r in wan.refused} == {"60 queries attend 7 keys: no self-attention"}


@pytest.mark.slow
def test_a_text_refiner_says_so(video_program) -> None:
    hunyuan = applied(RAGGED, video_program("hunyuan-video"))
    assert [r.reason for r in hunyuan.refused] == ["its 7 tokens are not the 60 of the grid 3x4x5"]


def test_cross_attention_as_long_as_the_video_is_left(video_program) -> None:
    """Text of as many tokens as the video: only where the keys come from tells."""
    from tilewright.compiler.passes_base import Example, Tensor
    from tilewright.compiler.selftest import capture_example

    def model(x, text, wq, wk, wv):
        def heads(t):
            return t.reshape(1, 16, 2, 8).transpose(1, 2)

        return ops.attention(heads(ops.linear(x, wq)), heads(ops.linear(text, wk)), heads(ops.linear(x, wv)))

    weights = (Tensor(16, 16, weight=True),) * 3
    facts = {"video_grid": (2, 2, 4)}
    program = capture_example(Example(model, (Tensor(1, 16, 16), Tensor(1, 16, 16), *weights), facts=facts))
    report = applied(SlidingTileAttention(tile=(1, 2, 2), window=(1, 1, 1)), program)
    assert not report.applied
    assert "cross-attention" in report.refused[0].reason


def test_text_rows_are_dense(video_program) -> None:
    """O8: what text attends is untouched by the window, whatever the text holds."""
    tiling = tile_grid((3, 4, 5), (2, 3, 2), "ceil")
    for start, tokens in ((7, 67), (0, 67)):
        layout = tile_layout(tiling, start, tokens, ((1, 1, 1),) * 3)
        q, k, v = torch.randn(3, 2, 3, tokens, 16, dtype=torch.float64).unbind()
        out, _ = ops.block_sparse_attention(q, k, v, *layout.arguments(), None)
        dense = ops.attention(q, k, v)
        text = [i for i in range(tokens) if not start <= i < start + 60]
        assert relative_rms(out[:, :, text], dense[:, :, text]) < 1e-14
        assert relative_rms(out, dense) > 0.1


@pytest.mark.parametrize("seed", range(8))
def test_random_layouts_against_the_written_out_mask(seed: int) -> None:
    generator = random.Random(seed)
    grid = tuple(generator.randint(2, 6) for _ in range(3))
    tile = tuple(generator.randint(1, n) for n in grid)
    policy = generator.choice(("ceil", "balanced"))
    tiling = tile_grid(grid, tile, policy)
    text = generator.choice((0, 3))
    start = generator.choice((0, text))
    tokens = tiling.tokens + text
    choices = [[w for w in range(1, n + 1) if w % 2 or w == n] for n in tiling.counts]
    windows = tuple(tuple(generator.choice(c) for c in choices) for _ in range(3))
    layout = tile_layout(tiling, start, tokens, windows)
    mask = reference_mask(tiling, start, tokens, windows)
    q, k, v = torch.randn(3, 1, 3, tokens, 8, dtype=torch.float64).unbind()
    out, lse = ops.block_sparse_attention(q, k, v, *layout.arguments(), None)
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, float("-inf"))
    assert relative_rms(out, torch.softmax(scores, -1) @ v) < 1e-14
    assert torch.allclose(lse, torch.logsumexp(scores, -1), rtol=0, atol=1e-12)
    density = sum(window_density(tiling, w) for w in windows) / 3
    pairs = density * tiling.tokens**2 + 2 * text * tiling.tokens + text**2
    assert Fraction(int(mask.sum()), 3) == pairs
    by_group = [layout.head_group[0].tolist().count(g) for g in range(layout.row_ptr.shape[0])]
    if len(set(by_group)) == 1:
        assert abs(layout.density() - float(pairs / tokens**2)) < 1e-12


def test_heads_of_one_window_share_a_group() -> None:
    tiling = tile_grid((4, 4, 4), (2, 2, 2), "error")
    windows = ((1, 1, 1), (2, 2, 2), (1, 1, 1), (1, 2, 1))
    layout = tile_layout(tiling, 0, 64, windows)
    assert layout.head_group.tolist() == [[0, 2, 0, 1]]
    entries = layout.row_ptr[:, -1].tolist()
    assert entries == [sum(map(len, key_tiles(tiling.counts, w))) for w in sorted(set(windows))]


def table_of(program, **changes):
    heads, layers = 3, 2
    fingerprint = {
        "grid": [3, 4, 5],
        "tile": [2, 3, 2],
        "heads": heads,
        "layers": layers,
        "checkpoint": checkpoint_of(program),
        **changes,
    }
    odd = ([1, 1, 1], [2, 1, 3], [1, 2, 1])
    windows = {
        f"{s}_{layer}_{h}": odd[(layer + h) % 3] if s else [2, 2, 3]
        for s in range(2)
        for layer in range(layers)
        for h in range(heads)
    }
    return {"fingerprint": fingerprint, "windows": windows}


def test_table_of_windows_per_head(tmp_path, video_program, float64_outputs) -> None:
    original, sparse, reference = (video_program("wan") for _ in range(3))
    path = tmp_path / "windows.json"
    path.write_text(json.dumps(table_of(original)))
    how = {"tile": (2, 3, 2), "nondivisible": "ceil", "table": str(path)}
    value = SlidingTileAttention(step=1, **how)
    report = applied(value, sparse)
    assert len(report.applied) == 2
    value.reference(reference)
    assert worst(float64_outputs(sparse), float64_outputs(reference)) < 1e-12
    groups = {
        len(n.args[3].meta["val"]) for n in sparse.graph.nodes if n.target is ops.block_sparse_attention
    }
    assert groups == {3}
    dense = video_program("wan")
    assert len(applied(SlidingTileAttention(step=0, **how), dense).applied) == 2
    assert worst(float64_outputs(dense), float64_outputs(original)) < 1e-12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": [3, 4, 6]}, "for grid [3, 4, 6], here it is [3, 4, 5]"),
        ({"tile": [1, 2, 2]}, "for tile"),
        ({"heads": 4}, "for heads 4, here it is 3"),
        ({"layers": 30}, "for 30 layers, the model has 2"),
        ({"checkpoint": "0" * 16}, "for checkpoint '0000000000000000'"),
    ],
)
def test_a_table_of_another_model_is_refused(tmp_path, video_program, changes, said) -> None:
    program = video_program("wan")
    path = tmp_path / "windows.json"
    path.write_text(json.dumps(table_of(program, **changes)))
    report = applied(SlidingTileAttention(tile=(2, 3, 2), nondivisible="ceil", table=str(path)), program)
    assert not report.applied
    assert any(said in r.reason for r in report.refused)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "not a readable JSON file"),
        ("{", "not a readable JSON file"),
        ("[" * 100_000, "not a readable JSON file"),
        ('{"windows": {}}', "fingerprint must hold grid, tile, heads, layers, checkpoint"),
        ("[1]", "expected"),
        ("WINDOWS 0_0=[1,1,1]", "expected step_layer_head"),
        ("WINDOWS 0_0_0=[1,1]", "three whole numbers"),
        ("WINDOWS 1_0_0=[1,1,1]", "no entry for step 0"),
        ("WINDOWS 0_0_0=[1,1,1]", None),
    ],
)
def test_bad_tables(tmp_path, video_program, text, said) -> None:
    program, path = video_program("wan"), tmp_path / "windows.json"
    if text is not None and text.startswith("WINDOWS"):
        key, _, value = text.split(" ", 1)[1].partition("=")
        fingerprint = table_of(program)["fingerprint"]
        text = json.dumps({"fingerprint": fingerprint, "windows": {key: json.loads(value)}})
    if text is not None:
        path.write_text(text)
    value = SlidingTileAttention(tile=(2, 3, 2), nondivisible="ceil", table=str(path))
    if said is None:
        assert "no entry for layer 0 head 1" in applied(value, program).refused[0].reason
        return
    with pytest.raises(OptionError, match=said):
        applied(value, program)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": (6, 8, 8)}, "6 is more than the 3 tokens along T"),
        ({"tile": (2, 2, 2)}, "2 does not divide the 3 tokens along T"),
        ({"tile": (1, 2, 1), "window": (5, 1, 1)}, r"\(5, 1, 1\): 5 tiles along T, but the grid has 3"),
        ({"tile": (1, 2, 1), "window": (2, 1, 1)}, "must be odd, or all 3 tiles"),
        ({"tile": (0, 1, 1)}, "whole numbers from 1"),
        ({"window": (-1, 1, 1)}, "odd or 0"),
        ({"step": -1}, "counted from 0"),
        ({"layers": (-1,)}, "counted from 0"),
        ({"min_tokens": -1}, "0 or more"),
    ],
)
def test_illegal_options(options, said, video_program) -> None:
    with pytest.raises(OptionError, match=said):
        applied(SlidingTileAttention(**options), video_program("wan"))


def test_layers_and_sizes_left_dense(video_program) -> None:
    how = {"tile": (1, 2, 1), "window": (1, 1, 1)}
    assert len(applied(SlidingTileAttention(layers=(1,), **how), video_program("wan")).applied) == 1
    assert len(applied(SlidingTileAttention(dense_layers=(0, 1), **how), video_program("wan")).applied) == 0
    report = applied(SlidingTileAttention(min_tokens=61, **how), video_program("wan"))
    assert any("60 video tokens, fewer than min_tokens = 61" in r.reason for r in report.refused)


def test_a_grid_that_does_not_fit_is_an_error_on_demand(video_program) -> None:
    how = {"tile": (1, 2, 1), "window": (1, 1, 1)}
    program = video_program("cogvideox")
    apply_user_facts(program, {"text_segment": (0, 5)})
    report = applied(SlidingTileAttention(**how), program)
    assert "67 tokens are not the 60 of the grid 3x4x5 with 5 of text at 0" in report.refused[0].reason
    with pytest.raises(FactError, match="67 tokens are not the 60"):
        applied(SlidingTileAttention(on_mismatch="error", **how), program)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda q, k, v, m: ops.attention(q, k, v, m.float()), "is added to the scores"),
        (lambda q, k, v, m: ops.attention(q, k, v, m.expand(1, 1, 16, 16)), "differs by query"),
        (lambda q, k, v, m: ops.attention(q, k, v, None, None, True), "it has causal = True"),
        (lambda q, k, v, m: ops.attention(q, k[:, :1], v[:, :1]), "2 query heads share 1 key heads"),
    ],
)
def test_attentions_that_no_layout_can_stand_for(call, said) -> None:
    from tilewright.compiler.passes_base import Example, Tensor
    from tilewright.compiler.selftest import capture_example

    qkv, keys = (Tensor(1, 2, 16, 8),) * 3, Tensor(1, 1, 1, 16, dtype=torch.bool)
    program = capture_example(Example(call, (*qkv, keys), facts={"video_grid": (2, 2, 4)}))
    report = applied(SlidingTileAttention(tile=(1, 2, 2), window=(1, 1, 1)), program)
    assert not report.applied
    assert said in report.refused[0].reason


def test_a_single_frame_is_left_dense() -> None:
    from tilewright.compiler.passes_base import Example, Tensor
    from tilewright.compiler.selftest import capture_example

    example = Example(
        lambda q, k, v: ops.attention(q, k, v), (Tensor(1, 2, 16, 8),) * 3, facts={"video_grid": (1, 4, 4)}
    )
    report = applied(SlidingTileAttention(tile=(1, 2, 2), window=(1, 1, 1)), capture_example(example))
    assert report.refused[0].reason == "the grid 1x4x4 is a single frame"
