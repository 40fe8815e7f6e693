"""Gated blocks: every step is computed outside a request, and a reused residual is exactly the kept one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewright.frontends.compile as compile_module
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.compile import REPORTS
from tilewright.kernels.table import host_target
from tilewright.runtime.step_reuse import FAST_30, Accumulated, FirstBlock, StepReuse

CALLS: list[int] = []
METRICS = {
    "metric=residual": FAST_30,
    "metric=modulated": Accumulated(0.5),
    "metric=first-block,head=1,tail=1": FirstBlock(0.5),
}


@pytest.fixture(autouse=True)
def _pieces_without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces run as they are; each counts its linear layers."""

    def plain(gm: Any, *_: Any) -> Any:
        heavy = sum("linear" in str(n.target) for n in gm.graph.nodes)

        def run(*args: Any) -> Any:
            CALLS.append(heavy)
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(compile_module, "compile_graph", plain)
    yield
    torch._dynamo.reset()


def _compiled(model: nn.Module, options: str, kernels: bool = False) -> Any:
    text = f"reuse-step-residual{{{options}}}"
    return torch.compile(model, backend="tilewright", options={"pipeline": text, "kernels": kernels})


def _inputs(model: Any, seed: int) -> dict[str, Any]:
    """One step's call: latents of one frame that drift a little from step to step."""
    _, kwargs = model.example(length=1)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(kwargs["hidden_states"].shape, generator=generator)
    return {**kwargs, "hidden_states": kwargs["hidden_states"] + 0.02 * noise}


@torch.no_grad()
@pytest.mark.parametrize("options", METRICS)
def test_reuse_adds_the_kept_residual_and_runs_no_block(options: str) -> None:
    model = BUNDLED["tiny-video-dit"]()
    reference: Any = copy.deepcopy(model.module)
    compiled = _compiled(model.module, options)
    head, tail = (1, 1) if "head" in options else (0, 0)
    blocks = list(reference.blocks)[head : len(reference.blocks) - tail]
    streams: dict[str, Tensor] = {}
    blocks[0].register_forward_pre_hook(lambda _, args: streams.update(entry=args[0]))
    blocks[-1].register_forward_hook(lambda _, __, out: streams.update(exit=out))
    torch.testing.assert_close(compiled(**_inputs(model, 0))[0], reference(**_inputs(model, 0))[0])
    assert any("may reuse" in note for p in REPORTS[-1].passes for note in p.notes)
    reuse, kept, ran = StepReuse(METRICS[options]), torch.zeros(()), list[int]()
    computed: list[int] = []
    reuse.begin("r", 30)
    for step in range(6):
        kwargs = _inputs(model, step)
        CALLS.clear()
        with reuse.call("r", "", step):
            got = compiled(**kwargs)[0]
        ran.append(sum(CALLS))
        want = reference(**kwargs)[0]
        if reuse.counts("r")[0] > len(computed):
            computed.append(step)
            kept = streams["exit"] - streams["entry"]
        else:
            hooks = [b.register_forward_hook(lambda _, args, __: args[0]) for b in blocks[:-1]]
            hooks.append(blocks[-1].register_forward_hook(lambda _, args, __, d=kept: args[0] + d))
            want = reference(**kwargs)[0]
            for hook in hooks:
                hook.remove()
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
    assert reuse.end("r") == (len(computed), 6 - len(computed))
    assert 1 <= len(computed) <= 3
    for step, heavy in enumerate(ran):  # the first block's projections may lie in front of the gate
        left_out = 0 if step in computed else 8 * len(blocks) - 3
        assert heavy <= ran[0] - left_out, f"blocks ran for nothing: {ran}"


@torch.no_grad()
def test_threshold_zero_is_the_program_bit_for_bit() -> None:
    model = BUNDLED["tiny-video-dit"]()
    compiled = _compiled(model.module, "metric=first-block,head=1")
    reuse = StepReuse(FirstBlock(0.0))
    reuse.begin("r", 3)
    for step in range(3):
        with reuse.call("r", "", step):
            got = compiled(**_inputs(model, step))[0]
        assert torch.equal(got, compiled(**_inputs(model, step))[0])
    assert reuse.end("r") == (3, 0)


@torch.no_grad()
@pytest.mark.skipif(host_target().arch == "generic", reason="kernels need AVX2")
@pytest.mark.parametrize("options", METRICS)
def test_a_compiled_gate_measures_with_a_kernel(options: str) -> None:
    """Once a step from the second on; the report names it at every gate."""
    model = BUNDLED["tiny-video-dit"]()
    compiled = _compiled(model.module, options, kernels=True)
    compiled(**_inputs(model, 0))
    rows = [row for row in REPORTS[-1].kernels if row["op"] == "measured_copy"]
    assert {row["node"].split("_default")[0] for row in rows} == {"step_reuse_begin", "step_reuse_end"}
    reuse = StepReuse(METRICS[options])
    reuse.begin("r", 30)
    with torch.profiler.profile() as seen:
        for step in range(3):
            with reuse.call("r", "", step):
                compiled(**_inputs(model, step))
    calls = 1 if options == "metric=residual" else 2  # its rate leaves the third step out
    found = [event.name.split("::")[-1] for event in seen.events() or [] if "measured_copy" in event.name]
    assert found == [rows[0]["kernel"]] * calls


@torch.no_grad()
@pytest.mark.slow
def test_a_program_without_pieces_says_that_nothing_is_left_out() -> None:
    model = BUNDLED["tiny-video-dit"]()
    said = "no block is ever left out"
    for lower in ("inductor", "eager"):
        torch._dynamo.reset()
        options = {"pipeline": "reuse-step-residual{metric=residual}", "kernels": False, "lower": lower}
        torch.compile(model.module, backend="tilewright", options=options)(**_inputs(model, 0))
        notes = [note for p in REPORTS[-1].passes for note in p.notes]
        assert any(said in note for note in notes) == (lower == "eager")
