"""Step reuse around sparse attention with state: a step that reuses does not count for the attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewright.frontends.denoise import StepRunner
from tilewright.frontends.phases import phase_programs
from tilewright.runtime.step_reuse import Lane, StepReuse
from tilewright.runtime.step_state import Schedule, StepState

TEXT = "reuse-step-residual{metric=first-block,head=1},sliding-tile-attention{tile=1x4x4,window=1x1x1},"


class Scripted:
    """Reuses at these steps."""

    keeps = "probe"

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def reuse(self, lane: Lane, step: int, steps: int, seen: Any) -> bool:
        return step in self.steps

    def computed(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@torch.no_grad()
def test_a_reused_step_neither_ages_nor_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers 1 and 2 are left out at step 2, so their correction grows from step 3 on as if it were 2.

    Layer 0, in front of the gate, is left dense: it has no state that a reused step could age.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(6)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    torch._dynamo.reset()
    text = TEXT.replace("1x1x1}", "1x1x1,dense_layers=0}") + "statistical-reshape{growth=0.2}"
    programs = phase_programs(model, text)
    state, reuse = StepState(), StepReuse(Scripted(2))
    runner = StepRunner(
        programs["dense"],
        reuse=reuse,
        state=state,
        schedule=Schedule(dense=0, period=6),
        models=programs,
    )
    generator = torch.Generator().manual_seed(1)
    named = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "return_dict": False,
    }
    times = [1000.0 - 100 * i for i in range(8)]
    ages = []
    with runner.request("a", times):
        for time in times[:6]:
            runner(timestep=torch.tensor([time]), **named)
            ages.append(state.age("a", ""))
        assert reuse.counts("a") == (5, 1)
    assert ages == [0, 0, 0, 1, 2, 3], "step 2 does not count"
