"""Facts: derived ones against models whose answer is known, given ones against what is legal."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.compiler.blocks import find_blocks
from tilewright.compiler.diagnostics import FactError
from tilewright.compiler.facts import apply_user_facts, derive_facts
from tilewright.compiler.program import Facts, Program
from tilewright.frontends.capture import from_dynamo, from_export, normalize

WIDTH, HEADS = 12, 3


def attend(q, k, v):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.mod = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), nn.Linear(8, WIDTH)

    def forward(self, x, clock):
        y = F.layer_norm(x, (WIDTH,)) + self.mod(clock)[:, None]
        x = x + self.o(attend(self.q(y), self.k(y), self.v(y)))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class Video(nn.Module):
    """A denoiser of a [B, C, T, Y, X] latent. `order` says where text joins; `frames` embeds frame by
    frame."""

    def __init__(self, order: str = "none", frames: bool = False, guided: bool = False) -> None:
        super().__init__()
        self.order, self.frames, self.guided = order, frames, guided
        self.patch3 = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.patch2 = nn.Conv2d(4, WIDTH, 2, 2)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def wave(self, at):
        angles = at[:, None].float() * torch.exp(-torch.arange(4) / 4)
        return torch.cat((angles.cos(), angles.sin()), -1)

    def forward(self, latent, timestep, text, guidance):
        if self.frames:
            x = self.patch2(latent.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
            x = x.reshape(latent.shape[0], -1, WIDTH)
        else:
            x = self.patch3(latent).flatten(2).transpose(1, 2)
        clock = self.wave(timestep) + (self.wave(guidance) if self.guided else 0)
        x = {"none": x, "last": torch.cat((x, text), 1), "first": torch.cat((text, x), 1)}[self.order]
        for layer in self.layers:
            x = layer(x, clock)
        return x


def video_inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, 4, 3, 8, 10, generator=generator)
    text = torch.randn(batch, 7, WIDTH, generator=generator)
    return latent, torch.tensor([5] * batch), text, torch.tensor([2.0] * batch)


def capture(model: nn.Module, args: tuple[Any, ...], **how) -> Program:
    with torch.no_grad():
        return from_export(torch.export.export(model.eval(), args, strict=False, **how))


def derived(program: Program) -> Facts:
    program.facts = Facts()
    derive_facts(program)
    return program.facts


@functools.cache
def plain_video() -> Program:
    return capture(Video(), video_inputs())


@pytest.mark.parametrize(
    ("order", "text", "frames"), [("none", None, False), ("first", (0, 7), True), ("last", (60, 7), False)]
)
def test_grid_and_text_segment(order: str, text: tuple[int, int] | None, frames: bool) -> None:
    facts = derived(capture(Video(order, frames), video_inputs()))
    assert facts.get("video_grid") == (3, 4, 5)
    if text is None:
        assert not facts.has("text_segment")
        assert "no other tokens" in facts.missing("text_segment")
    else:
        assert facts.get("text_segment") == text
    assert all(f.origin.startswith("derived: ") for f in facts)


def test_layers_width_device_and_dtype() -> None:
    program = plain_video()
    facts = derived(program)
    paths = {n: n.meta.pop("nn_module_stack", None) for n in program.graph.nodes}
    bare = {f.name: f for f in derived(program)}
    for node, stack in paths.items():
        if stack is not None:
            node.meta["nn_module_stack"] = stack
    assert facts.get("layers") == 2
    assert facts.get("blocks") == ("layers.0", "layers.1")
    assert sorted(facts.get("attention_layers").values()) == [0, 1]
    assert facts.get("hidden_size") == WIDTH
    assert (facts.get("device"), facts.get("dtype")) == ("cpu", "float32")
    assert facts.get("dynamic_inputs") == {}
    origins = {f.name: f.origin for f in facts}
    assert "confirmed by module paths" in origins["attention_layers"]
    assert bare["attention_layers"].value == facts.get("attention_layers")
    assert "no module paths" in bare["attention_layers"].origin


def test_step_input_is_the_one_with_the_waves() -> None:
    assert derived(plain_video()).get("step_input") == "timestep"
    both = derived(capture(Video(guided=True), video_inputs()))
    assert both.get("step_input") == "timestep"
    assert "of 2 such inputs" in next(f.origin for f in both if f.name == "step_input")
    assert not both.has("branch_input")
    assert "guidance branches" in both.missing("branch_input")


def test_dynamo_inputs_go_by_the_names_of_the_call() -> None:
    programs = []

    def backend(gm, inputs):
        program = from_dynamo(gm, inputs)
        apply_user_facts(program, {"branch_input": "guidance"})
        derive_facts(program)
        programs.append(program)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Video("last", guided=True), backend=backend)(*video_inputs())
    (program,) = programs
    named = {spec.source: spec.name for spec in program.inputs}
    assert program.facts.get("step_input") == named["timestep"]
    assert program.facts.get("branch_input") == named["guidance"]
    assert program.facts.get("video_grid") == (3, 4, 5)
    assert program.facts.get("text_segment") == (60, 7)
    assert program.facts.get("layers") == 2


def test_a_conv_that_is_no_patch_embedding_gives_no_grid() -> None:
    class Pooled(nn.Module):
        """A strided convolution whose plane divides the token count by chance."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.layers = nn.Conv2d(4, WIDTH, 2, 2), nn.ModuleList(Layer() for _ in range(2))

        def forward(self, image, clock):
            x = (
                image.flatten(2).transpose(1, 2).repeat(1, 1, WIDTH // 4)
                + self.conv(image).mean((2, 3))[:, None]
            )
            for layer in self.layers:
                x = layer(x, clock)
            return x

    facts = derived(capture(Pooled(), (torch.randn(1, 4, 8, 8), torch.randn(1, 8))))
    assert not facts.has("video_grid")
    assert "no product fits" in facts.missing("video_grid")
    assert "4x4 per frame against 64 tokens" in facts.missing("video_grid")
    assert not facts.has("step_input")


def test_dynamic_axes_are_named() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x, clock):
            for layer in self.layers:
                x = layer(x, clock)
            return x

    shapes = ({1: torch.export.Dim("tokens", min=2, max=64)}, None)
    args = torch.randn(1, 6, WIDTH), torch.randn(1, 8)
    facts = derived(capture(Text(), args, dynamic_shapes=shapes))
    assert facts.get("dynamic_inputs") == {"x": (1,)}
    assert facts.get("layers") == 2
    assert not facts.has("video_grid")


def test_a_given_fact_stays_and_says_so() -> None:
    program = plain_video()
    program.facts = Facts()
    apply_user_facts(program, {"video_grid": "3x5x4", "layers": 9, "branch_input": "guidance"})
    derive_facts(program)
    assert program.facts.get("video_grid") == (3, 5, 4)
    assert program.facts.get("layers") == 9
    assert program.facts.get("branch_input") == "guidance"
    origins = {f.name: f.origin for f in program.facts}
    assert origins["layers"] == origins["video_grid"] == origins["branch_input"] == "user"
    assert origins["step_input"].startswith("derived")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vidoe_grid": (1, 2, 3)}, ["unknown fact 'vidoe_grid'", "video_grid"]),
        ({"device": "cuda"}, ["'device' is read off the program"]),
        ({"layers": 0}, ["layers = 0", "whole number from 1"]),
        ({"layers": True}, ["layers = True", "whole number from 1"]),
        ({"layers": "two"}, ["layers = 'two'"]),
        ({"hidden_size": 1.5}, ["hidden_size = 1.5"]),
        ({"video_grid": (3, 4)}, ["video_grid = (3, 4)", "TxYxX"]),
        ({"video_grid": "3x4xfive"}, ["three positive whole numbers"]),
        ({"video_grid": (3, 4, 0)}, ["three positive whole numbers"]),
        ({"video_grid": (3, 4, 6)}, ["72 tokens, but the longest attention has 60"]),
        ({"text_segment": [-1, 4]}, ["text_segment = [-1, 4]", "start, length"]),
        ({"text_segment": (58, 7)}, ["ends at 65", "60 tokens"]),
        ({"step_input": "timstep"}, ["no such input", "timestep"]),
        ({"step_input": 4}, ["not a name"]),
        ({"attention_layers": {"sdpa": 0}}, ["no node 'sdpa'"]),
        ({"attention_layers": []}, ["mapping"]),
        ({"blocks": "layers.0"}, ["list of names"]),
    ],
)
def test_bad_facts_are_one_clear_error(given: dict[str, Any], words: list[str]) -> None:
    program = plain_video()
    program.facts = Facts()
    with pytest.raises(FactError) as caught:
        apply_user_facts(program, given)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line
    assert not list(program.facts)


def test_an_absent_fact_says_why_and_how_to_give_it() -> None:
    facts = derived(capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),)))
    with pytest.raises(FactError, match=r"'layers' is absent: no residual stream.*facts"):
        facts.get("layers")


ZOO = {
    "llama": {"layers": 2},
    "gpt-neox": {"layers": 2},
    "bert": {"layers": 2},
    "gemma2": {"layers": 2},
    "opt": {"layers": 2},
    "t5": {"layers": 4},
    "whisper": {"layers": 4},
    "wan": {"layers": 2, "step_input": "timestep"},
    "cogvideox": {"layers": 2, "step_input": "timestep"},
    "ltx": {"layers": 2, "step_input": "timestep"},
    "pixart": {"layers": 2, "step_input": "timestep"},
    "sd3": {"layers": 2, "step_input": "timestep"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoo(name: str) -> None:
    from tilewright.tools.zoo_models import select

    (entry,) = select([name])
    args, kwargs = entry.inputs()
    with torch.no_grad():
        program = from_export(torch.export.export(entry.build(), args, kwargs, strict=False))
    normalize(program)
    facts = derived(program)
    for fact, value in ZOO[name].items():
        assert facts.get(fact) == value
    video = {"wan", "cogvideox", "ltx"}
    assert facts.has("video_grid") == (name in video | {"pixart", "sd3"})
    assert facts.has("text_segment") == (name in {"cogvideox", "sd3"})
    assert set(facts.get("attention_layers").values()) == set(range(entry.layers))
    assert len(facts.get("attention_layers")) == entry.expected["attention"]


def diffusion(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import diffusers

    torch.manual_seed(0)
    clock, text = torch.tensor([3]), torch.randn(1, 6, 32)
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
    if name == "dit":
        model = diffusers.DiTTransformer2DModel(
            **small, out_channels=4, num_layers=4, sample_size=8, patch_size=2, num_embeds_ada_norm=10
        )
        return model, {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": clock, "class_labels": clock + 1}
    if name == "flux":
        model = diffusers.FluxTransformer2DModel(
            **small,
            patch_size=1,
            num_layers=3,
            num_single_layers=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
        tokens = {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": text}
        ids = {"img_ids": torch.randn(16, 3), "txt_ids": torch.randn(6, 3)}
        return model, {**tokens, **ids, "timestep": clock.float(), "pooled_projections": torch.randn(1, 32)}
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    return model, {"sample": torch.randn(1, 4, 16, 16), "timestep": clock, "encoder_hidden_states": text}


@pytest.mark.slow
@pytest.mark.parametrize("paths", [True, False])
@pytest.mark.parametrize(("name", "sizes"), [("dit", [1] * 4), ("flux", [2] * 3 + [1] * 4), ("unet", [])])
def test_diffusion_structures(name: str, sizes: list[int], paths: bool) -> None:
    model, kwargs = diffusion(name)
    with torch.no_grad():
        given = {**kwargs, "return_dict": False}
        program = from_export(torch.export.export(model.eval(), (), given, strict=False))
    if not paths:
        for node in program.graph.nodes:
            node.meta.pop("nn_module_stack", None)
    structure = find_blocks(program.graph, program.inputs)
    assert [len(layer.blocks) for layer in structure.layers] == sizes
    assert ("no single residual stream" in structure.refusal) == (name == "unet")
    assert all(block.typical for block in structure.blocks)
    facts = derived(program)
    assert facts.has("video_grid") == (name == "dit")
    assert facts.get("step_input") == "timestep"
