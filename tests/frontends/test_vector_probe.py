"""Inductor's vector probes run in a thread beside capture and are over before Inductor asks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._inductor import compile_fx as inductor
from torch._inductor import cpu_vec_isa

import tilewright as tw
from tilewright.frontends import vector_probe


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("road", ["backend", "optimize"])
def test_the_probes_end_before_inductor_begins(monkeypatch: pytest.MonkeyPatch, road: str) -> None:
    happened: list[str] = []
    gate, honest, compile_all = threading.Event(), cpu_vec_isa.valid_vec_isa_list, inductor.compile_fx

    def probed() -> object:
        if threading.current_thread() is not threading.main_thread():
            gate.wait(60)
            happened.append("probed")
        return honest()

    def finish() -> None:
        happened.append("asked")
        gate.set()
        finished()

    def compiled(*args: object, **kwargs: object) -> object:
        happened.append("compiled")
        return compile_all(*args, **kwargs)

    finished = vector_probe.finish
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", probed)
    monkeypatch.setattr(vector_probe, "finish", finish)
    monkeypatch.setattr(inductor, "compile_fx", compiled)
    module, x = nn.Linear(5, 3).eval(), torch.randn(2, 5)
    with torch.no_grad():
        run = tw.optimize(module, (x,)) if road == "optimize" else torch.compile(module, backend="tilewright")
        torch.testing.assert_close(run(x), module(x))
    assert happened[:3] == ["asked", "probed", "compiled"]


def test_nothing_is_probed_for_other_devices_or_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: probed.append(1))
    vector_probe.begin([torch.empty(2, device="meta"), 3])
    module, x = nn.Linear(5, 3).eval(), torch.randn(2, 5)
    with torch.no_grad():
        torch.compile(module, backend="tilewright", options={"lower": "eager"})(x)
    vector_probe.finish()
    assert probed == []


def test_a_probe_that_fails_is_left_to_inductor(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", refuse)
    vector_probe.begin([torch.ones(1)])
    vector_probe.finish()
    assert "no compiler" not in "".join(capfd.readouterr())
    with pytest.raises(RuntimeError, match="no compiler"):
        cpu_vec_isa.pick_vec_isa()
    for thread in [t for t in threading.enumerate() if t.name.startswith("tilewright-probe")]:
        thread.join(60)
        assert not thread.is_alive()
