"""Image and text streams that attend jointly: blocks are left out, and residuals kept, of both together."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import tilewright.frontends.compile as compile_module
from tilewright.frontends.compile import REPORTS
from tilewright.runtime.step_probe import Kept
from tilewright.runtime.step_reuse import FirstBlock, Lane, StepReuse, StepReuseError
from tilewright.tools.zoo_models import select

GROUPS = ("transformer_blocks", "single_transformer_blocks")
METRICS = ("metric=residual,tail=1", "metric=modulated", "metric=first-block,head=1")
"""With a block computed behind the stretch, the residual of the text is seen in the result."""
Pair = tuple[Tensor, Tensor | None]
RAN: list[int] = []


class Odd:
    """Reuses what the step before computed, at every odd step."""

    keeps: ClassVar[str] = "probe"

    def reuse(self, lane: Lane, step: int, steps: int, seen: Kept | None) -> bool:
        return step % 2 == 1

    def computed(self, lane: Lane, step: int, steps: int, seen: Kept, residual: Tensor) -> None:
        """Nothing to learn."""


@pytest.fixture(autouse=True)
def _pieces_without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces run as they are; each counts its linear layers."""

    def plain(gm: Any, *_: Any) -> Any:
        heavy = sum("linear" in str(n.target) for n in gm.graph.nodes)

        def run(*args: Any) -> Any:
            RAN.append(heavy)
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(compile_module, "compile_graph", plain)
    yield
    torch._dynamo.reset()


def _compiled(model: nn.Module, pipeline: str) -> Any:
    torch._dynamo.reset()
    options = {"pipeline": pipeline, "kernels": False}
    return torch.compile(model, backend="tilewright", options=options, dynamic=False)


def _blocks(model: Any) -> list[nn.Module]:
    return [block for group in GROUPS for block in getattr(model, group, ())]


def _without(model: nn.Module, layer: int) -> nn.Module:
    """A copy with one block deleted."""
    made: Any = copy.deepcopy(model)
    for group in GROUPS:
        blocks = getattr(made, group, ())
        if layer < len(blocks):
            del blocks[layer]
            return made
        layer -= len(blocks)
    raise AssertionError("no such layer")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("flux", 0),
        ("cogvideox", 1),
        *[
            pytest.param(*given, marks=pytest.mark.slow)
            for given in (
                ("flux", 1), ("flux", 2), ("flux", 3), ("cogvideox", 0), ("hunyuan-video", 0),
                ("hunyuan-video", 1), ("hunyuan-video", 3), ("sd3", 0), ("sd3", 1),
            )
        ],
    ],
)  # fmt: skip
def test_a_dropped_pair_is_the_model_without_the_module_bit_for_bit(name: str, layer: int) -> None:
    entry = select([name])[0]
    model, (args, kwargs) = entry.build(), entry.inputs()
    got = _compiled(model, f"drop-layers{{layers={layer},max_share=1}}")(*args, **kwargs)[0]
    want = _compiled(_without(model, layer), "drop-layers")(*args, **kwargs)[0]
    assert torch.equal(got, want)
    whole = _compiled(model, "drop-layers")(*args, **kwargs)[0]
    assert not torch.equal(got, whole)


class Streams:
    """The streams of the eager model around runs of blocks, and what replaces them at a reused step."""

    def __init__(self, runs: list[list[nn.Module]]) -> None:
        self.runs = runs
        self.entries: list[Pair] = [(torch.zeros(()), None)] * len(runs)
        self.residuals: list[Pair] = [(torch.zeros(()), None)] * len(runs)
        self.reused = False
        for number, run in enumerate(runs):
            for block in run:
                hook = self._hook(number, block, block is run[0], block is run[-1])
                block.register_forward_hook(hook, with_kwargs=True)

    def _hook(self, number: int, block: nn.Module, first: bool, last: bool) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
            entry = given["hidden_states"], given["encoder_hidden_states"]
            swapped = out[0] is None or out[0].shape != entry[0].shape  # text comes first in some
            pair = out[::-1] if swapped else out
            if first:
                self.entries[number] = entry
            if self.reused:
                pair = entry
            if last and self.reused:
                both = zip(entry, self.residuals[number], strict=True)
                pair = tuple(r if r is None else x + r for x, r in both)
            elif last:
                both = zip(pair, self.entries[number], strict=True)
                self.residuals[number] = tuple(x if x is None else x - e for x, e in both)
            return pair[::-1] if swapped else pair

        return hook


def _runs(model: Any, head: int, tail: int) -> list[list[nn.Module]]:
    """Blocks by group, without the first and the last; an SD3 goes on without text in its last block."""
    groups = [list(getattr(model, group, ())) for group in GROUPS]
    if type(model).__name__.startswith("SD3"):
        groups = [groups[0][:-1], groups[0][-1:]]
    groups = [group for group in groups if group]
    groups[0] = groups[0][head:]
    groups[-1] = groups[-1][: len(groups[-1]) - tail]
    return [run for run in groups if run]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flux", METRICS[2]),
        ("cogvideox", METRICS[0]),
        *[
            pytest.param(name, options, marks=pytest.mark.slow)
            for name in ("flux", "cogvideox", "hunyuan-video", "sd3")
            for options in METRICS
        ],
    ],
)
def test_a_reused_step_adds_what_was_kept_of_each_stream_and_runs_no_block(name: str, options: str) -> None:
    entry = select([name])[0]
    model, (args, kwargs) = entry.build(), entry.inputs()
    copied = copy.deepcopy(model)
    reference = Streams(_runs(copied, "head=1" in options, "tail=1" in options))
    compiled = _compiled(model, f"reuse-step-residual{{{options}}}")
    torch.testing.assert_close(compiled(*args, **kwargs)[0], copied(*args, **kwargs)[0])
    applied = [a for p in REPORTS[-1].passes for a in p.applied if "step_reuse" in str(a.inserted)]
    assert len(applied) == len(reference.runs)
    reuse, ran = StepReuse(Odd()), []
    reuse.begin("r", 4)
    for step in range(4):
        latent = args[0] + 0.1 * torch.randn(args[0].shape, generator=torch.Generator().manual_seed(step))
        reference.reused = step % 2 == 1
        RAN.clear()
        with reuse.call("r", "", step):
            got = compiled(latent, *args[1:], **kwargs)[0]
        ran.append(sum(RAN))
        torch.testing.assert_close(got, copied(latent, *args[1:], **kwargs)[0], rtol=2e-4, atol=2e-5)
    assert reuse.end("r") == (2 * len(reference.runs), 2 * len(reference.runs))
    linears = sum(isinstance(m, nn.Linear) for run in reference.runs for b in run for m in b.modules())
    # In front of the gate lies what the probe needs, and projections of the first block that read it.
    before = 8 if "modulated" in options else 4
    assert ran[::2] == [ran[0]] * 2
    assert ran[1::2] == [ran[1]] * 2
    assert ran[1] <= ran[0] - linears + before, (ran, linears)


@torch.no_grad()
def test_threshold_zero_is_the_program_bit_for_bit() -> None:
    entry = select(["flux"])[0]
    model, (args, kwargs) = entry.build(), entry.inputs()
    compiled = _compiled(model, "reuse-step-residual{metric=first-block,head=1}")
    plain = _compiled(model, "drop-layers")(*args, **kwargs)[0]
    reuse = StepReuse(FirstBlock(0.0))
    reuse.begin("r", 2)
    for step in range(2):
        with reuse.call("r", "", step):
            assert torch.equal(compiled(*args, **kwargs)[0], plain)
    assert reuse.end("r") == (4, 0)


def test_another_length_of_the_other_stream_is_an_error_not_a_broadcast() -> None:
    reuse, x = StepReuse(Odd()), torch.zeros(1, 4, 3)

    def step(number: int, text: Tensor) -> Tensor | None:
        from tilewright.compiler.ops import step_reuse

        with reuse.call("r", "", number):
            begun = step_reuse.enter(x, x, 0)
            beside = step_reuse.leave_beside(text + 1, text, 0, 1)
            step_reuse.leave(x + 2, begun, begun, 0)
            return beside

    reuse.begin("r", 2)
    step(0, torch.zeros(1, 1, 3))
    assert reuse.bytes() == 4 * (12 + 12 + 3)
    with pytest.raises(StepReuseError, match=r"stream 1 of \[1, 5, 3\] with a kept residual of \[1, 1, 3\]"):
        step(1, torch.zeros(1, 5, 3))
