"""A real diffusers pipeline of two transformers, for high and for low noise, each through its own runner."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.ops.measured_copy import measured_copy
from tilewright.frontends.denoise import StepRunner, driven
from tilewright.frontends.phases import phase_programs
from tilewright.frontends.window_search import WindowSearch
from tilewright.runtime.contracts import REUSE, STATE
from tilewright.runtime.step_reuse import FirstBlock, Lane, StepReuse
from tilewright.runtime.step_state import PRESETS, Schedule, StepState

STEPS, SWITCH = 6, 3
BOUNDARY = 0.7
"""Between the third timestep of six, 818 of 1000, and the fourth, 667."""
REUSING = "reuse-step-residual{metric=first-block,head=1}"
LOWERED = {"lower": "eager", "kernels": False}


class Scripted:
    """Reuses at these steps, wherever there is a residual."""

    keeps = "probe"

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def reuse(self, lane: Lane, step: int, steps: int, seen: Any) -> bool:
        assert steps == STEPS, "the sampler's"
        return step in self.steps

    def computed(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def experts() -> tuple[nn.Module, nn.Module]:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(5)
    made = [
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        ).eval()
        for _ in range(2)
    ]  # fmt: skip
    return made[0], made[1]


def pipeline(experts: tuple[nn.Module, nn.Module]) -> Any:
    """Wan2.2's pipeline at small sizes; prompts come embedded, so there is no text encoder."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = WanPipeline(None, None, vae, scheduler, *experts, boundary_ratio=BOUNDARY)
    made.set_progress_bar_config(disable=True)
    return made


def generate(pipe: Any, seed: int = 0, after: Any = None, steps: int = STEPS) -> Tensor:
    """Latents [1, 4, 3, 16, 16] of one request. after(step): called behind every step."""
    generator = torch.Generator().manual_seed(seed)
    text, none = (torch.randn(1, 5, 16, generator=generator) for _ in range(2))

    def ended(_: Any, step: int, *__: Any) -> dict[str, Any]:
        if after is not None:
            after(step)
        return {}

    found: Tensor = pipe(
        prompt_embeds=text, negative_prompt_embeds=none, height=128, width=128, num_frames=9,
        num_inference_steps=steps, guidance_scale=4.0, guidance_scale_2=3.0, generator=generator,
        output_type="latent", callback_on_step_end=ended,
    ).frames  # fmt: skip
    return found


@pytest.fixture(scope="module")
def programs(experts: tuple[nn.Module, nn.Module]) -> list[Any]:
    """Each expert behind `reuse-step-residual`."""
    options: dict[str, Any] = {**LOWERED, "pipeline": REUSING}
    apart: dict[str, Any] = {"isolate_recompiles": True}
    return [torch.compile(module, backend="tilewright", options=options, **apart) for module in experts]


@contextmanager
def both(pipe: Any, models: Any, stores: Any, request: str = "a") -> Iterator[Any]:
    """`pipe` driven by a runner per transformer, each with its StepReuse."""
    first, second = (StepRunner(m, reuse=s) for m, s in zip(models, stores, strict=True))
    with driven(pipe, first, second=second, request=request, steps=STEPS):
        yield pipe


class Recorder:
    """The transformer itself; remembers the step of every call."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.steps = module, list[int]()

    def __call__(self, **kwargs: Any) -> Any:
        self.steps.append(REUSE.get()._step)  # type: ignore[union-attr]
        return self.module(**kwargs)


class Stretch(nn.Module):
    """The oracle: a block that computes at the steps it is told and else adds what it added before."""

    def __init__(self, block: nn.Module, computes: list[bool]) -> None:
        super().__init__()
        self.block, self.computes, self.calls = block, computes, 0
        self.kept = dict[int, Tensor]()

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        branch, step = self.calls % 2, self.calls // 2
        self.calls += 1
        if self.computes[step]:
            self.kept[branch] = self.block(x, *rest) - x
            return self.block(x, *rest)
        return x + self.kept[branch]


def test_driven_experts_are_the_pipeline(experts: tuple[nn.Module, nn.Module]) -> None:
    """Each expert gets its steps, counted by the sampler, in both branches; bit for bit, and all put back."""
    pipe = pipeline(experts)
    want = generate(pipe)
    models, stores = [Recorder(m) for m in experts], [StepReuse(FirstBlock(0.0)) for _ in experts]
    with both(pipe, models, stores):
        assert pipe.transformer is not experts[0]
        assert pipe.transformer_2.config.num_layers == 2
        assert torch.equal(generate(pipe), want)
    assert (pipe.transformer, pipe.transformer_2) == experts
    assert models[0].steps == [0, 0, 1, 1, 2, 2]
    assert models[1].steps == [3, 3, 4, 4, 5, 5]


@torch.no_grad()
def test_reuse_of_each_expert(experts: tuple[nn.Module, nn.Module], programs: list[Any]) -> None:
    """Threshold 0 is the eager pipeline bit for bit; reuse wherever it may is the oracle's, of each apart.

    The policy would reuse at every step: the first of each expert is computed, and no residual crosses over.
    """
    pipe = pipeline(experts)
    want = generate(pipe)
    stores = [StepReuse(FirstBlock(0.0)) for _ in experts]
    with both(pipe, programs, stores):
        assert torch.equal(generate(pipe), want)
        assert [s.counts("a") for s in stores] == [(6, 0), (6, 0)]
    stores = [StepReuse(Scripted(*range(STEPS))) for _ in experts]
    held = list[list[bool]]()
    with both(pipe, programs, stores):
        got = generate(pipe, after=lambda _: held.append([s.bytes() > 0 for s in stores]))
        assert [s.counts("a") for s in stores] == [(2, 4), (2, 4)]
    assert held == [[True, False]] * SWITCH + [[False, True]] * (STEPS - SWITCH), "dropped at the switch"
    assert [s.bytes() for s in stores] == [0, 0]
    assert not torch.equal(got, want)
    blocks = [m.blocks for m in experts]
    try:
        for module, before in zip(experts, blocks, strict=True):
            module.blocks = nn.ModuleList([before[0], Stretch(before[1], [True, False, False])])
        assert torch.equal(got, generate(pipe))
    finally:
        for module, before in zip(experts, blocks, strict=True):
            module.blocks = before


def test_an_expert_that_is_back_computes(experts: tuple[nn.Module, nn.Module]) -> None:
    """A loop that goes back and forth: what an expert kept before the other's turn is not used again."""
    pipe, computed = pipeline(experts), list[tuple[int, bool]]()

    def gated(number: int) -> Any:
        def run(timestep: Any) -> None:
            access, x = REUSE.get(), torch.ones(1, 2, 3)
            assert access is not None
            reused = access.decide(0, x, x, measured_copy.definition)
            if not reused:
                access.keep(0, 2 * x, x, x, measured_copy.definition)
            computed.append((number, not reused))

        return run

    stores = [StepReuse(Scripted(*range(STEPS))) for _ in experts]
    with both(pipe, [gated(0), gated(1)], stores):
        for step, name in enumerate(("transformer",) * 2 + ("transformer_2",) * 2 + ("transformer",) * 2):
            getattr(pipe, name)(timestep=pipe.scheduler.timesteps[step])
    assert computed == [(0, True), (0, False), (1, True), (1, False), (0, True), (0, False)]


@torch.no_grad()
def test_two_requests_take_turns(experts: tuple[nn.Module, nn.Module], programs: list[Any]) -> None:
    """Step by step in turn, over the same programs and the same stores: each is the request alone."""

    def policies() -> list[StepReuse]:
        return [StepReuse(Scripted(1, 2, 4)) for _ in experts]

    alone = []
    for seed in range(2):
        with both(pipeline(experts), programs, policies()) as pipe:
            alone.append(generate(pipe, seed))
    assert not torch.equal(*alone)
    stores, turn = policies(), threading.Barrier(2, timeout=60)
    found, counts = dict[int, Tensor](), dict[int, list[tuple[int, int]]]()

    def request(seed: int) -> None:
        try:
            with torch.no_grad(), both(pipeline(experts), programs, stores, request=f"r{seed}") as pipe:
                # Both wait behind each step, so each runs step k between the other's k - 1 and k + 1.
                found[seed] = generate(pipe, seed, after=lambda _: turn.wait())
                counts[seed] = [s.counts(f"r{seed}") for s in stores]
        except BaseException:
            turn.abort()  # the other waits
            raise

    threads = [threading.Thread(target=request, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], alone[seed]) for seed in range(2))
    assert counts == dict.fromkeys(range(2), [(2, 4), (4, 2)])


def test_state_of_each_expert_is_collected_by_itself(experts: tuple[nn.Module, nn.Module]) -> None:
    """The second expert begins among sparse steps: its first searches, as it has nothing to attend by."""
    pipe, ran = pipeline(experts), list[tuple[int, str]]()

    def program(number: int, phase: str) -> Any:
        def run(**kwargs: Any) -> Any:
            access = STATE.get()
            assert access is not None
            if phase == "search":
                access.put(0, {"mine": torch.tensor([number])})
            if phase == "sparse":
                assert access.get(0, "mine").tolist() == [number]
            ran.append((number, phase))
            return experts[number](**kwargs)

        return run

    def runner(number: int, schedule: Schedule) -> StepRunner:
        models = {phase: program(number, phase) for phase in ("dense", "search", "sparse")}
        return StepRunner(models["dense"], state=StepState(), schedule=schedule, models=models)

    first, second = (runner(n, Schedule(dense=1, searches=(1,))) for n in range(2))
    with driven(pipe, first, second=second, request="a", steps=STEPS):
        generate(pipe)
    assert [name for number, name in ran[::2] if number == 0] == ["dense", "search", "sparse"]
    assert [name for number, name in ran[::2] if number == 1] == ["search", "sparse", "sparse"]
    assert ran[::2] == ran[1::2], "both branches"


@pytest.mark.slow
def test_phases_of_a_full_layout_are_the_pipeline(experts: tuple[nn.Module, nn.Module]) -> None:
    """A layout of everything through all phases of both experts: the pipeline as it is, to rounding."""
    pipe = pipeline(experts)
    want = generate(pipe, steps=10)
    text = "sliding-tile-attention{tile=1x4x4,window=0x0x0},statistical-reshape"
    runners = []
    for module in experts:
        programs = phase_programs(module, text, LOWERED)
        runners.append(
            StepRunner(
                programs["dense"], state=StepState(), schedule=PRESETS["rettention"](10), models=programs
            )
        )
    with driven(pipe, runners[0], second=runners[1], request="a", steps=10), torch.no_grad():
        assert float((generate(pipe, steps=10) - want).abs().max()) < 1e-4


@pytest.mark.slow
def test_windows_are_searched_for_each_expert(experts: tuple[nn.Module, nn.Module]) -> None:
    pipe = pipeline(experts)
    searches = [WindowSearch(m, tile=(1, 4, 4), candidates=((1, 1, 1), (3, 1, 1))) for m in experts]
    with driven(pipe, searches[0].runner, second=searches[1].runner, request="a", steps=STEPS):
        generate(pipe)
    tables = [search.table() for search in searches]
    assert [t["fingerprint"]["steps"] for t in tables] == [STEPS, STEPS]
    assert tables[0]["fingerprint"]["checkpoint"] != tables[1]["fingerprint"]["checkpoint"]
    steps = [sorted({int(key.split("_")[0]) for key in t["windows"]}) for t in tables]
    assert steps == [[0, 1, 2], [3, 4, 5]]


def test_both_are_put_back_after_an_error(experts: tuple[nn.Module, nn.Module]) -> None:
    pipe = pipeline(experts)

    def broken(**_: Any) -> Any:
        raise RuntimeError("no memory")

    stores = [StepReuse(FirstBlock(0.0)) for _ in experts]
    with pytest.raises(RuntimeError, match="no memory"), both(pipe, (experts[0], broken), stores):
        generate(pipe)
    assert (pipe.transformer, pipe.transformer_2) == experts
    with both(pipe, experts, stores):  # the requests have ended, too
        pass


def test_runners_that_do_not_fit(experts: tuple[nn.Module, nn.Module]) -> None:
    pipe, reuse, state = pipeline(experts), StepReuse(FirstBlock(0.0)), StepState()
    first = StepRunner(experts[0], reuse=reuse, state=state, schedule=Schedule())
    pairs = (
        (first, None, "has a second transformer"),
        (first, first, "in one place"),
        (first, StepRunner(experts[1], reuse=reuse), "in one place"),
        (first, StepRunner(experts[1], state=state, schedule=Schedule()), "in one place"),
    )
    for one, other, said in pairs:
        with (
            pytest.raises(OptionError, match=said),
            driven(pipe, one, second=other, request="a", steps=STEPS),
        ):
            pass
    pipe.transformer_2 = None
    with (
        pytest.raises(OptionError, match="has one transformer"),
        driven(pipe, first, second=StepRunner(experts[1]), request="a", steps=STEPS),
    ):
        pass
    with pytest.raises(OptionError, match="no request runs"):
        first.forget()
