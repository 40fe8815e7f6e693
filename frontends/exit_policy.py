"""Training the policy of `early-exit{measure=policy}`: which states a language model's answer is sure in.

source: GREEN-CODE (arXiv:2501.11006), whose rewards these are. There a policy network is trained by PPO. What
either answer of a policy is worth at an exit does not depend on its answers elsewhere, and all of it is known
once the layers have run; so here each exit gets a logistic classifier of the better answer, weighted by how
much better it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import softplus

from tilewright.compiler.blocks import find_blocks
from tilewright.compiler.calibration import fingerprint
from tilewright.compiler.diagnostics import CaptureError, OptionError
from tilewright.compiler.exit_policy import ExitPolicy
from tilewright.compiler.exit_scores import features
from tilewright.compiler.influence import LayerRun
from tilewright.frontends.influence import captured_calls, logits_in
from tilewright.frontends.loaded_model import Call

_DECAY = 1e-3
"""Weight of the squared weights beside the mean loss: as many tokens as channels are few."""
Progress = Callable[[int, int], None]
"""progress(samples done, samples in all)."""


def train_exit_policy(
    module: nn.Module,
    calls: Iterable[Call],
    exits: Sequence[int],
    *,
    source: str = "",
    progress: Progress | None = None,
) -> ExitPolicy:
    """A policy for tokens that may leave after so many layers, `exits` ascending; no randomness is used.

    calls: (args, kwargs) with `input_ids` [B, S] of one length. Raises OptionError for impossible exits or no
    samples, CaptureError for a model whose layers cannot be told apart or left out.
    """
    given, numbers = list(calls), list(exits)
    if not given:
        raise OptionError("there are no samples to train on")
    if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 1:
        raise OptionError(f"exits = {numbers}: expected ascending numbers from 1")
    program, samples = captured_calls(module, given)
    structure = find_blocks(program.graph, program.inputs)
    if structure.refusal:
        raise CaptureError(f"no layers: {structure.refusal}")
    run = LayerRun(program, structure)
    layers = len(run.layers)
    if numbers[-1] >= layers:
        raise OptionError(f"exits = {numbers}: the model has {layers} layers, and the last is no exit")
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    rows: list[list[Tensor]] = [[] for _ in numbers]
    gains: list[Tensor] = []
    with torch.no_grad():
        for done, args in enumerate(samples, 1):
            right = _sample(run, dict(zip(placeholders, args, strict=True)), numbers, rows)
            gains.append(worth(right, numbers, layers))
            if progress is not None:
                progress(done, len(samples))
    gain = torch.cat(gains, 1)
    fitted = [_fit(torch.cat(x), gain[k]) for k, x in enumerate(rows)]
    weight, bias = torch.stack([w for w, _ in fitted]), torch.stack([b for _, b in fitted])
    return ExitPolicy(fingerprint(program), numbers, weight.float(), bias.float(), source)


def _sample(
    run: LayerRun, inputs: dict[fx.Node, Any], exits: Sequence[int], rows: list[list[Tensor]]
) -> Tensor:
    """Run one sample and add each exit's features [tokens, C + 2] to `rows`.

    Returns bool [layers - exits[0] + 1, tokens]: whether leaving after exits[0], exits[0] + 1, ... and all
    layers chooses the token that all layers choose."""
    layers = len(run.layers)
    result, states = run.run(0, inputs)
    chosen = logits_in(result).argmax(-1).flatten()
    right = []
    for number in range(exits[0], layers):
        left, _ = run.run(number + 1, states[number + 1], range(number, layers))
        right.append(logits_in(left).argmax(-1).flatten() == chosen)
        if number in exits:
            block = run.layers[number - 1].blocks[0]
            after, before = states[number + 1][block.exit], states[number][block.entry]
            rows[list(exits).index(number)].append(features(after, before).flatten(0, -2).double())
    return torch.stack([*right, torch.ones_like(chosen, dtype=torch.bool)])


def worth(right: Tensor, exits: Sequence[int], layers: int) -> Tensor:
    """How much more leaving is worth than going on, at each exit; [exits, tokens], float64.

    right: bool [layers - exits[0] + 1, tokens] as `_sample` returns it. With l the exit and l* the first
    depth whose choice is that of all layers, leaving is worth: at the first exit from l* on, the exit's place
    among all (1/n to 1); later -0.75 (l - l*) if right, the worst if wrong; earlier l - l*. Going on is worth
    the place of the exit before l*, else l* less the next exit. What is below zero is divided by the layers.
    """
    depth = exits[0] + right.int().argmax(0)
    found = []
    for k, exit_ in enumerate(exits):
        place = (k + 1) / len(exits)
        following = exits[k + 1] if k + 1 < len(exits) else layers
        first = (depth <= exit_) & (depth > (exits[k - 1] if k else 0))
        late = torch.where(right[exit_ - exits[0]], -0.75 * (exit_ - depth) / layers, -1.0)
        leave = torch.where(depth > exit_, (exit_ - depth) / layers, torch.where(first, place, late))
        go_on = torch.where(depth > exit_, place, (depth - following) / layers)
        found.append((leave - go_on).double())
    return torch.stack(found)


def _fit(rows: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [C + 2] and bias of a logistic classifier of the sign of `gain`, weighted by its size."""
    weight = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    size = gain.abs() / gain.abs().sum().clamp(min=1e-30)
    fit = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        fit.zero_grad()
        score = rows @ weight[:-1] + weight[-1]
        value = (size * softplus(-score * gain.sign())).sum() + _DECAY * weight[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    fit.step(loss)  # type: ignore[no-untyped-call]
    found = weight.detach()
    return found[:-1], found[-1]
