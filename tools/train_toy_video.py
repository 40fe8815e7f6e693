"""Train the bundled toy video transformer: flow matching on two moving shapes, seeded, on one processor core.

First on crops of a quarter of the picture, which cost a seventh, then on whole pictures. Every step draws its
data from a generator of its own, so a run cut into pieces by --until gives the same weights as one run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tilewright.frontends import toy_video
from tilewright.frontends.toy_video import COLOURS, DIRECTIONS, KINDS, SHAPE

SEED = 5
STAGES = ((500, 8, 16), (200, 3, 32))
"""(steps, batch, side of the crop)."""
STEPS = sum(stage[0] for stage in STAGES)
RATE, WARMUP, DECAY = 2e-3, 50, 0.99
NO_PROMPT = 0.15
"""Share of samples without a prompt, for guidance."""
_RGB = {
    "red": (1.0, -0.6, -0.6), "green": (-0.6, 0.9, -0.5), "blue": (-0.5, -0.3, 1.0), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
_MOVES = {
    "still": (0.0, 0.0), "left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0),
}  # fmt: skip


def draw(generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """One video [3, 4, 32, 32] in -1..1 and its six words; the second shape lies in front."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def choice(names: tuple[str, ...]) -> str:
        return names[int(torch.randint(len(names), (), generator=generator))]

    _, frames, height, width = SHAPE
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    video, words = torch.full(SHAPE, -0.8), []
    for _ in range(2):
        kind, colour, move = choice(KINDS), choice(COLOURS), choice(DIRECTIONS)
        words += [kind, colour, move]
        radius, speed = uniform(4.0, 7.0), uniform(2.0, 4.0)
        at_y, at_x = uniform(6.0, height - 6.0), uniform(6.0, width - 6.0)
        for frame in range(frames):
            moved = (frame - (frames - 1) / 2) * speed
            dy, dx = y - at_y - _MOVES[move][0] * moved, x - at_x - _MOVES[move][1] * moved
            away = {
                "disc": (dy * dy + dx * dx).sqrt(),
                "square": torch.maximum(dy.abs(), dx.abs()) * 1.1,
                "diamond": (dy.abs() + dx.abs()) * 0.8,
            }[kind]
            cover = (radius - away + 0.5).clamp(0.0, 1.0)
            video[:, frame] += cover * (torch.tensor(_RGB[colour])[:, None, None] - video[:, frame])
    return video, words


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(noisy videos, timesteps 0..1000, prompts, wanted velocities) of a training step."""
    _, batch, side = STAGES[0] if step < STAGES[0][0] else STAGES[1]
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    videos, prompts = [], []
    for _ in range(batch):
        video, words = draw(generator)
        top, left = (int(torch.randint(SHAPE[2] - side + 1, (), generator=generator)) for _ in range(2))
        videos.append(video[:, :, top : top + side, left : left + side])
        dropped = float(torch.rand((), generator=generator)) < NO_PROMPT
        prompts.append(toy_video.embed([] if dropped else words))
    clean = torch.stack(videos)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(batch, generator=generator) * 1.2 + 0.4)
    mix = sigma[:, None, None, None, None]
    return (1 - mix) * clean + mix * noise, sigma * 1000, torch.cat(prompts), noise - clean


class Training:
    """Weights, their running mean, Adam's moments and the step, all in one safetensors file."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.model = toy_video.untrained().train()
        self.mean = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.step = 0

    def advance(self) -> float:
        """One step; its loss."""
        noisy, timestep, prompts, wanted = batch_of(self.step)
        warm, done = min(1.0, (self.step + 1) / WARMUP), self.step / STEPS
        self.optimizer.param_groups[0]["lr"] = RATE * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        (found,) = self.model(
            hidden_states=noisy, timestep=timestep, encoder_hidden_states=prompts, return_dict=False
        )
        loss = (found - wanted).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        for name, value in self.model.state_dict().items():
            self.mean[name].lerp_(value, 1 - min(DECAY, self.step / (self.step + 10)))
        return float(loss.detach())

    def save(self, path: Path) -> None:
        held = {f"weight/{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        held.update({f"mean/{k}": v for k, v in self.mean.items()})
        for index, state in self.optimizer.state_dict()["state"].items():
            held.update({f"adam/{index}/{name}": value for name, value in state.items()})
        partial = path.with_suffix(".partial")
        save_file(held, partial, metadata={"step": json.dumps(self.step)})
        partial.replace(path)

    def load(self, path: Path) -> None:
        held = load_file(path)
        parts: dict[str, dict[str, Tensor]] = {"weight": {}, "mean": {}, "adam": {}}
        for name, value in held.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        self.model.load_state_dict(parts["weight"])
        self.mean = parts["mean"]
        state = self.optimizer.state_dict()
        for name, value in parts["adam"].items():
            index, _, slot = name.partition("/")
            state["state"].setdefault(int(index), {})[slot] = value
            self.step = int(value) if slot == "step" else self.step
        self.optimizer.load_state_dict(state)

    def ship(self, path: Path) -> None:
        """The running mean in float16, which halves the file; the loader widens it."""
        save_file({name: value.half().contiguous() for name, value in self.mean.items()}, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, help="file to go on from, if it exists, and to leave off in"
    )
    parser.add_argument("--until", type=int, default=STEPS, help=f"stop after this step of {STEPS}")
    parser.add_argument("--out", type=Path, default=toy_video.WEIGHTS, help="the finished weights")
    args = parser.parse_args(argv)
    if not 1 <= args.until <= STEPS:
        parser.error(f"--until = {args.until}: expected 1 to {STEPS}")
    torch.use_deterministic_algorithms(True)
    training = Training()
    if args.checkpoint and args.checkpoint.exists():
        training.load(args.checkpoint)
    started, losses = time.process_time(), list[float]()
    while training.step < args.until:
        losses.append(training.advance())
        if training.step % 50 == 0:
            spent = time.process_time() - started
            print(
                f"step {training.step}: loss {sum(losses[-50:]) / len(losses[-50:]):.4f}, {spent:.0f} s",
                flush=True,
            )
    if args.checkpoint:
        training.save(args.checkpoint)
    if training.step == STEPS:
        training.ship(args.out)
        print(f"{args.out.name}: {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
