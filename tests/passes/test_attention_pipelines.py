"""Attention passes through torch.compile: whole models, repeated blocks, phases, the command line."""

from __future__ import annotations

import json

import pytest
import torch

import tilewright as tw
from tilewright.compiler.replay import relative_rms
from tilewright.frontends import cli
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.compile import REPORTS
from tilewright.runtime.step_state import PRESETS, Phase, StepState
from tilewright.tools import zoo_diffusion

RAGGED = "sliding-tile-attention{tile=2x3x2,window=0x0x0,nondivisible=ceil}"


def wan():
    entry = next(e for e in zoo_diffusion.entries() if e.name == "wan")
    return entry.build(), *entry.inputs()


def call(model, args, kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)[0]


def options(pipeline: str, **more):
    return {"pipeline": pipeline, "lower": "eager", "kernels": False, **more}


@pytest.mark.slow
def test_whole_model_and_repeated_blocks() -> None:
    """Regional compilation sees one block only: the grid is given, the layer is the order in the graph."""
    model, args, kwargs = wan()
    dense = call(model, args, kwargs)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="tilewright", options=options(f"{RAGGED},hoist-token-permutation"))
    assert relative_rms(call(whole, args, kwargs), dense) < 1e-5
    assert (
        REPORTS[-1].applied("sliding-tile-attention"),
        REPORTS[-1].applied("hoist-token-permutation"),
    ) == (2, 1)
    torch._dynamo.reset()
    regional, args, kwargs = wan()
    given = {"facts": {"video_grid": "3x4x5"}}
    for block in regional.blocks:
        block.compile(backend="tilewright", options=options(f"{RAGGED},hoist-token-permutation", **given))
    REPORTS.clear()
    assert relative_rms(call(regional, args, kwargs), dense) < 1e-5
    assert len(REPORTS) == 1, "one graph for all blocks"
    assert REPORTS[-1].applied("sliding-tile-attention") == 1
    refused = [r.reason for p in REPORTS[-1].passes if p.name == "hoist-token-permutation" for r in p.refused]
    assert any("the only one in its order" in reason for reason in refused)


@pytest.mark.slow
def test_phases_of_two_requests_that_take_turns() -> None:
    """One program per phase, the phase chosen by the schedule, state by request and branch.

    Only the first layer is sparse: what it reads is the same in all phases, so the stateless program finds
    the same layout.
    """
    model, args, kwargs = wan()
    timesteps = [1000.0 - 100 * i for i in range(10)]
    schedule = PRESETS["adaspa"](10)
    names = {Phase.SEARCH: "search", Phase.SPARSE: "sparse"}
    text = "adaptive-block-attention{{block=16,sparsity=0.5,layers=0,phase={}}}"
    torch._dynamo.reset()
    compiled = {
        phase: torch.compile(model, backend="tilewright", options=options(text.format(name)))
        for phase, name in names.items()
    }
    every = torch.compile(model, backend="tilewright", options=options(text.format("every")))
    state = StepState()
    requests = {"one": 1.0, "two": -0.5}
    inputs = {name: (args[0] * scale, *args[1:]) for name, scale in requests.items()}
    dense = {name: call(model, given, kwargs) for name, given in inputs.items()}
    wanted = {name: call(every, given, kwargs) for name, given in inputs.items()}
    assert relative_rms(wanted["one"], dense["one"]) > 1e-7
    for name in requests:
        state.begin(name, timesteps)
    seen = []
    for step in range(8):
        for name in requests if step % 2 else list(requests)[::-1]:
            phase = state.phase(schedule, name, "cond", step)
            seen.append(phase)
            if phase is Phase.DENSE:
                continue
            with state.call(name, "cond", step):
                out = call(compiled[phase], inputs[name], kwargs)
            assert relative_rms(out, dense[name] if phase is Phase.SEARCH else wanted[name]) < 1e-5
    assert (
        seen
        == [Phase.DENSE] * 4
        + [Phase.SEARCH] * 2
        + [Phase.SPARSE] * 6
        + [Phase.SEARCH] * 2
        + [Phase.SPARSE] * 2
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "pipeline",
    [
        "sliding-tile-attention{tile=3x4x4,window=0x0x0},hoist-token-permutation",
        "spatial-temporal-attention{density=1.0}",
        "adaptive-block-attention{sparsity=0}",
        "sparse-linear-attention{topk=1.0}",
    ],
)
def test_bundled_model_through_inductor(pipeline: str) -> None:
    """O1 on the bundled video transformer, compiled to the end: density 1 is the model."""
    loaded = BUNDLED["tiny-video-dit"]()
    args, kwargs = loaded.example()
    dense = call(loaded.module, args, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(loaded.module, backend="tilewright", options={"pipeline": pipeline})
    assert relative_rms(call(compiled, args, kwargs), dense) < 1e-4
    assert REPORTS[-1].applied(pipeline.split("{")[0]) == 4


@pytest.mark.slow
def test_command_line(capsys) -> None:
    pipeline = "sliding-tile-attention{tile=3x4x4,window=1x3x3},hoist-token-permutation"
    assert cli.main(["explain", "tiny-video-dit", "--pipeline", pipeline, "--no-kernels", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    done = {p["name"]: p for p in data["passes"]}
    assert len(done["sliding-tile-attention"]["applied"]) == 4
    assert "video density 0.2812" in done["sliding-tile-attention"]["applied"][0]["rule"]
    assert (
        done["hoist-token-permutation"]["applied"][0]["rule"] == "4 attentions, 3 values permuted, 1 put back"
    )
    assert data["totals_after"]["flops"] < data["totals_before"]["flops"]


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        pytest.param(
            "sliding-tile-attention{tile=3x5x4}",
            "5 does not divide the 16 tokens along Y",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sliding-tile-attention{tile=3x4x4,window=1x2x3}",
            "it must be odd, or all 4 tiles",
            marks=pytest.mark.slow,
        ),
        ("sliding-tile-attention{tile=3x4}", "3 values joined by 'x'"),
        ("spatial-temporal-attention{density=2}", "more than 0 and at most 1"),
    ],
)
def test_bad_input_is_one_line(pipeline: str, said: str, capsys) -> None:
    assert cli.main(["explain", "tiny-video-dit", "--pipeline", pipeline, "--no-kernels"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_the_video_preset_makes_every_self_attention_sparse() -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=24, freq_dim=32, ffn_dim=40, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 19, 48, 48), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 24), "return_dict": False,
    }  # fmt: skip
    report = tw.explain(model, (), "cuda-sparse-video", kwargs=given)
    assert report.applied("sliding-tile-attention") == 2
    assert report.applied("hoist-token-permutation") == 1
