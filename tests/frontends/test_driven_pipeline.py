"""A real diffusers pipeline, built from configurations with random weights, through the runner."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.denoise import StepRunner, driven
from tilewright.frontends.phases import phase_pipelines, phase_programs
from tilewright.runtime.step_reuse import FirstBlock, StepReuse
from tilewright.runtime.step_state import PRESETS, Schedule, StepState

STEPS = 6


def pipeline() -> Any:
    """Wan's pipeline: its scheduler, autoencoder and transformer at small sizes; prompts come embedded."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    torch.manual_seed(4)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = WanPipeline(None, None, vae, scheduler, transformer)
    made.set_progress_bar_config(disable=True)
    return made


def generate(pipe: Any, seed: int = 0, guidance: float = 4.0, steps: int = STEPS) -> torch.Tensor:
    """Latents [1, 4, 3, 16, 16] of one request: 3 x 8 x 8 tokens."""
    generator = torch.Generator().manual_seed(seed)
    text, none = (torch.randn(1, 5, 16, generator=generator) for _ in range(2))
    found: torch.Tensor = pipe(
        prompt_embeds=text, negative_prompt_embeds=none, height=128, width=128, num_frames=9,
        num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="latent",
    ).frames  # fmt: skip
    return found


class Recorder:
    """The transformer itself; remembers the timestep of every call."""

    def __init__(self, module: Any) -> None:
        self.module, self.times = module, list[float]()

    def __call__(self, **kwargs: Any) -> Any:
        self.times.append(float(kwargs["timestep"][0]))
        return self.module(**kwargs)


@pytest.mark.parametrize(("guidance", "branches"), [(4.0, 2), (1.0, 1)])
def test_a_driven_pipeline_is_the_pipeline(guidance: float, branches: int) -> None:
    """Threshold 0 and dense phases only: bit for bit, each step and branch once, and all put back."""
    pipe = pipeline()
    module = pipe.transformer
    want = generate(pipe, guidance=guidance)
    recorder, state = Recorder(module), StepState()
    runner = StepRunner(
        recorder, reuse=StepReuse(FirstBlock(0.0)), state=state, schedule=Schedule(dense=STEPS)
    )
    with driven(pipe, runner, request="a", steps=STEPS):
        assert pipe.transformer is not module
        assert torch.equal(generate(pipe, guidance=guidance), want)
    assert pipe.transformer is module
    assert state.running() == []
    assert recorder.times == [float(t) for t in pipe.scheduler.timesteps for _ in range(branches)]


def test_the_transformer_is_put_back_after_an_error() -> None:
    pipe = pipeline()
    module, state = pipe.transformer, StepState()

    def broken(**_: Any) -> Any:
        raise RuntimeError("no memory")

    runner = StepRunner(broken, state=state, schedule=Schedule())
    with pytest.raises(RuntimeError, match="no memory"), driven(pipe, runner, request="a", steps=STEPS):
        generate(pipe)
    assert pipe.transformer is module
    assert state.running() == []


def test_what_cannot_be_driven() -> None:
    pipe = pipeline()
    runner = StepRunner(pipe.transformer)
    with pytest.raises(OptionError, match="steps = 0"), driven(pipe, runner, request="a", steps=0):
        pass
    with pytest.raises(OptionError, match="no transformer"), driven(object(), runner, request="a", steps=2):
        pass


def test_pipelines_of_phases() -> None:
    found = phase_pipelines("sliding-tile-attention{tile=1x4x4},statistical-reshape{growth=0.1}")
    assert sorted(found) == ["dense", "refresh", "sparse"]
    assert [p.text() for p in found["dense"].passes] == []
    assert "phase=sparse" in found["sparse"].text()
    found = phase_pipelines("reuse-step-residual,adaptive-block-attention{block=16}")
    assert found["dense"].text() == "reuse-step-residual"
    assert "phase=search" in found["search"].text()
    assert "phase=sparse" in found["sparse"].text()
    assert sorted(phase_pipelines("spatial-temporal-attention{density=0.5}")) == ["dense", "sparse"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "preset"),
    [
        ("sliding-tile-attention{tile=1x4x4,window=0x0x0},statistical-reshape", "rettention"),
        ("adaptive-block-attention{block=16,sparsity=0}", "adaspa"),
    ],
)
def test_phases_of_a_full_layout_are_the_pipeline(text: str, preset: str) -> None:
    """A layout of everything through all its phases, both branches: the pipeline as it is, to rounding."""
    pipe = pipeline()
    want = generate(pipe, steps=10)
    torch._dynamo.reset()
    programs = phase_programs(pipe.transformer, text, {"lower": "eager", "kernels": False})
    runner = StepRunner(programs["dense"], state=StepState(), schedule=PRESETS[preset](10), models=programs)
    with driven(pipe, runner, request="a", steps=10), torch.no_grad():
        assert float((generate(pipe, steps=10) - want).abs().max()) < 1e-4
