"""What sparse attention and step reuse cost a video model in quality: PSNR of final latents against dense.

Every candidate denoises the same noise for the same prompts as the model as it is; times are minima of
interleaved rounds in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.compiler.diagnostics import OptionError
from tilewright.compiler.tiles import Triple, tile_grid, window_density
from tilewright.frontends import toy_video
from tilewright.frontends.commands.shared import timed
from tilewright.frontends.compile import REPORTS
from tilewright.frontends.denoise import StepRunner
from tilewright.frontends.phases import phase_programs
from tilewright.runtime.step_fit import Recorded
from tilewright.runtime.step_reuse import Accumulated, Codebook, FirstBlock, Policy, StepReuse
from tilewright.runtime.step_state import PRESETS, Phase, Schedule, StepState

GRID: Triple = (4, 16, 16)
TILE: Triple = (2, 4, 4)
DENSITIES = (0.5, 0.3, 0.2, 0.1)
GUIDANCE, SHIFT = 3.0, 2.0
ROUNDS = 7


def sample(model: Callable[..., Any], noise: Tensor, prompt: str, steps: int, branch: Any = None) -> Tensor:
    """Final latents of a request: Euler steps of flow matching with classifier-free guidance.

    model: called as `model(hidden_states=, timestep=, encoder_hidden_states=, return_dict=False)`.
    branch: what opens the context of a branch, as StepRunner.branch does.
    """
    texts = {"cond": toy_video.embed(prompt.split()), "uncond": toy_video.embed([])}
    sigmas, x = schedule_of(steps), noise
    for step, (now, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        found = {}
        for name, text in texts.items():
            named: dict[str, Any] = {
                "hidden_states": x,
                "timestep": torch.tensor([1000.0 * now]),
                "encoder_hidden_states": text,
                "return_dict": False,
            }
            if branch is None:
                found[name] = model(**named)[0]
            else:
                with branch(name, step_index=step):
                    found[name] = model(**named)[0]
        velocity = found["uncond"] + GUIDANCE * (found["cond"] - found["uncond"])
        x = x + (after - now) * velocity
    return x


def schedule_of(steps: int) -> list[float]:
    """Noise levels from 1 to 0, shifted towards the noisy end."""
    even = [1 - i / steps for i in range(steps + 1)]
    return [SHIFT * s / (1 + (SHIFT - 1) * s) for s in even]


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over the range of the toy's latents; inf where both are equal."""
    error = float((found.double() - wanted.double()).square().mean())
    return math.inf if error == 0 else 10 * math.log10(toy_video.PEAK**2 / error)


def noises(items: int, first: int = 900) -> list[tuple[Tensor, str]]:
    """(noise, prompt) of the requests that are compared, by seeds from `first`; at most one per bundled
    prompt."""
    if not 1 <= items <= len(toy_video.PROMPTS):
        raise OptionError(f"items = {items}: expected 1 to {len(toy_video.PROMPTS)}, the bundled prompts")
    made = []
    for seed, prompt in enumerate(toy_video.PROMPTS[:items]):
        generator = torch.Generator().manual_seed(first + seed)
        made.append((torch.randn(1, *toy_video.SHAPE, generator=generator), prompt))
    return made


def nearest_window(density: float) -> tuple[Triple, float]:
    """The legal window over the toy's tiles whose density is nearest, of equals the least elongated."""
    tiling = tile_grid(GRID, TILE, "error")
    assert tiling is not None
    sizes = [[w for w in range(1, n + 1) if w % 2 or w == n] for n in tiling.counts]
    legal: list[Triple] = [(t, y, x) for t in sizes[0] for y in sizes[1] for x in sizes[2]]

    def rank(window: Triple) -> tuple[float, int]:
        return abs(float(window_density(tiling, window)) - density), max(window) - min(window)

    best = min(legal, key=rank)
    return best, float(window_density(tiling, best))


@dataclass(frozen=True)
class System:
    """A sparse attention system at one density."""

    name: str
    pipeline: str
    schedule: str
    density: float
    """What its layout keeps, of the video's pairs."""


def systems(density: float) -> Iterator[System]:
    """The bundled systems at (about) a density, with the schedules they were published with."""
    window, kept = nearest_window(density)
    tile, size = ("x".join(map(str, t)) for t in (TILE, window))
    tiles = f"sliding-tile-attention{{tile={tile},window={size}}}"
    yield System("sliding-tile", f"{tiles},hoist-token-permutation", "sta", kept)
    band = f"spatial-temporal-attention{{density={density}}}"
    yield System("spatial-temporal", band, "svg1", density)
    blocks = f"adaptive-block-attention{{block=32,sparsity={round(1 - density, 4)}}}"
    yield System("adaptive-block", blocks, "adaspa", density)
    yield System("statistical-reshape", f"{tiles},statistical-reshape", "rettention", kept)
    yield System("sparse-linear", f"sparse-linear-attention{{block=32,topk={density}}}", "sla", density)


@dataclass(frozen=True)
class QualityRow:
    """One system at one density."""

    system: str
    wanted: float
    density: float
    psnr: float
    """dB, mean over the requests."""
    attention_saved: float
    """Share of the dense attention's time that a sparse step's forward is shorter by."""
    sparse_steps: int
    """Steps that run the sparse program, of all."""
    steps: int


def attention_quality(
    model: nn.Module, *, densities: Sequence[float] = DENSITIES, steps: int, items: int, lower: str = "eager"
) -> Iterator[QualityRow]:
    """Every system at every density, in that order."""
    for density in densities:
        if not 0.0 < density < 1.0:
            raise OptionError(f"density = {density}: expected more than 0 and less than 1")
    requests = noises(items)
    with torch.no_grad():
        dense = [sample(model, noise, prompt, steps) for noise, prompt in requests]
    attention = _attention_seconds(model)
    for density in densities:
        for system in systems(density):
            yield _one(model, system, density, requests, dense, attention, steps, lower)


def _one(
    model: nn.Module, system: System, wanted: float, requests: Any, dense: list[Tensor], attention: float,
    steps: int, lower: str,
) -> QualityRow:  # fmt: skip
    torch._dynamo.reset()
    schedule, before = PRESETS[system.schedule](steps), list(REPORTS)
    programs = phase_programs(model, system.pipeline, {"lower": lower})
    runner = StepRunner(programs["dense"], state=StepState(), schedule=schedule, models=programs)
    found = []
    for (noise, prompt), want in zip(requests, dense, strict=True):
        with torch.no_grad(), runner.request(prompt, timesteps_of(steps)):
            found.append(psnr(sample(runner, noise, prompt, steps, runner.branch), want))
    name = system.pipeline.split("{")[0]
    if not any(r.applied(name) for r in REPORTS if not any(r is old for old in before)):
        raise OptionError(f"{name} applies to no attention of the model")
    saved = _sparse_saving(programs, schedule, steps) / attention
    count = sum(schedule.phase(s) is Phase.SPARSE for s in range(steps))
    return QualityRow(system.name, wanted, system.density, sum(found) / len(found), saved, count, steps)


def timesteps_of(steps: int) -> list[float]:
    """What `sample` calls the model with."""
    return [1000.0 * sigma for sigma in schedule_of(steps)[:-1]]


def _sparse_saving(programs: dict[str, Callable[..., Any]], schedule: Schedule, steps: int) -> float:
    """Seconds that a forward of the sparse program is shorter than one of the dense program."""
    _, call = toy_video.examples()["denoise"](None)
    state, best = StepState(), {"dense": math.inf, "sparse": math.inf}
    state.begin("timing", timesteps_of(steps))
    with torch.no_grad():
        collecting = schedule.phase(schedule.dense)
        if collecting is not Phase.SPARSE:
            with state.call("timing", "", schedule.dense):
                programs[collecting.value](**call)
        with state.call("timing", "", schedule.dense + 1):
            for _ in range(ROUNDS):
                for name in best:
                    best[name] = min(best[name], timed(partial(programs[name], **call)))
    return best["dense"] - best["sparse"]


def _attention_seconds(model: Any) -> float:
    """Seconds of the dense self-attentions of one forward, without projections."""
    config = model.config
    shape = 1, config.num_attention_heads, math.prod(GRID), config.attention_head_dim
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    run = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v)
    return int(config.num_layers) * min(timed(run) for _ in range(2 * ROUNDS))


@dataclass(frozen=True)
class ReuseRow:
    """One policy of step reuse at one threshold."""

    policy: str
    threshold: float
    psnr: float
    """dB, mean over the requests."""
    evaluations: int
    """Blocks computed, over all requests and branches."""
    full: int
    """Blocks that the model as it is computes."""
    saved: float
    """1 - evaluations / full."""
    time_saved: float
    """Share of the time without reuse, from the medians of calls that compute and of calls that reuse."""


def codebook(threshold: float) -> Policy:
    """AdaCache's, short: below the threshold the second step after is computed, below twice that the next."""
    return Codebook(((threshold, 3), (2 * threshold, 2), (math.inf, 1)))


REUSE: dict[str, tuple[str, int, Callable[[float], Policy] | None, tuple[float, ...]]] = {
    "residual": ("metric=residual", 0, codebook, (0.03, 0.06, 0.12, 0.24)),
    "first-block": ("metric=first-block,head=1", 1, FirstBlock, (0.1, 0.15, 0.2, 0.4)),
    "modulated": ("metric=modulated", 0, Accumulated, (0.025, 0.05, 0.1, 0.2)),
    "modulated, fitted": ("metric=modulated", 0, None, (0.08, 0.1, 0.15, 0.2)),
}
"""Policy -> (options of the pass, blocks in front of the gate, its policy at a threshold, thresholds). The
policy None is TeaCache's with a polynomial fitted to other requests."""
FITTED = 2
"""Requests that a polynomial is fitted to."""


def reuse_quality(
    model: Any, *, thresholds: Sequence[float] | None = None, steps: int, items: int
) -> Iterator[ReuseRow]:
    """Every policy at every threshold (None: each policy's own): block evaluations beside PSNR and time."""
    requests, layers = noises(items), int(model.config.num_layers)
    with torch.no_grad():
        dense = [sample(model, noise, prompt, steps) for noise, prompt in requests]
    for name, (options, head, policy, own) in REUSE.items():
        torch._dynamo.reset()
        text = f"reuse-step-residual{{{options}}}"
        program = torch.compile(model, backend="tilewright", options={"pipeline": text})
        _, call = toy_video.examples()["denoise"](None)
        with torch.no_grad():
            program(**call)
        policy = policy or _recorded(program, steps).fitted
        for threshold in own if thresholds is None else thresholds:
            quality, calls = _reused(program, policy(threshold), requests, steps, dense)
            computed, reused = len(calls[False]), len(calls[True])
            full = layers * (computed + reused)
            done = full - (layers - head) * reused
            shorter = 1 - median(calls[True]) / median(calls[False]) if reused else 0.0
            time_saved = shorter * reused / (computed + reused)
            yield ReuseRow(name, threshold, quality, done, full, 1 - done / full, time_saved)


def _recorded(program: Any, steps: int) -> Recorded:
    """What changes from step to step, in requests that are not among those compared."""
    recorded = Recorded()
    runner = StepRunner(program, reuse=StepReuse(recorded))
    for noise, prompt in noises(FITTED, first=700):
        with torch.no_grad(), runner.request(prompt, timesteps_of(steps)):
            sample(runner, noise, prompt, steps, runner.branch)
    return recorded


def _reused(
    program: Any, policy: Policy, requests: Any, steps: int, dense: list[Tensor]
) -> tuple[float, dict[bool, list[float]]]:
    """(mean PSNR of the requests, seconds of every call of the model by whether it reused)."""
    reuse = StepReuse(policy)
    runner = StepRunner(program, reuse=reuse)
    found, calls = list[float](), dict[bool, list[float]]({False: [], True: []})
    for (noise, prompt), want in zip(requests, dense, strict=True):

        def call(request: str = prompt, **named: Any) -> Any:
            before, started = reuse.counts(request), time.perf_counter()
            out = runner(**named)
            calls[reuse.counts(request)[1] > before[1]].append(time.perf_counter() - started)
            return out

        with torch.no_grad(), runner.request(prompt, timesteps_of(steps)):
            found.append(psnr(sample(call, noise, prompt, steps, runner.branch), want))
    return sum(found) / len(found), calls
