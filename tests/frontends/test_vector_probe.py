"""Inductor's vector probes run in a thread beside tracing and are over before Inductor asks; it asks in order
and no further than to the one it takes."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from dataclasses import dataclass, field

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
    gate, honest, compile_all = threading.Event(), cpu_vec_isa.pick_vec_isa, inductor.compile_fx

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
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", probed)
    monkeypatch.setattr(vector_probe, "finish", finish)
    monkeypatch.setattr(inductor, "compile_fx", compiled)
    module, x = nn.Linear(5, 3).eval(), torch.randn(2, 5)
    with torch.no_grad():
        run = tw.optimize(module, (x,)) if road == "optimize" else torch.compile(module, backend="tilewright")
        torch.testing.assert_close(run(x), module(x))
    assert happened[:3] == ["asked", "probed", "compiled"]


def test_nothing_is_probed_for_other_devices_or_without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []
    vector_probe.finish()
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: probed.append(1))
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

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", refuse)
    vector_probe.begin([torch.ones(1)])
    vector_probe.finish()
    assert "no compiler" not in "".join(capfd.readouterr())
    with pytest.raises(RuntimeError, match="no compiler"):
        cpu_vec_isa.pick_vec_isa()
    for thread in [t for t in threading.enumerate() if t.name.startswith("tilewright-probe")]:
        thread.join(60)
        assert not thread.is_alive()


@dataclass
class Named:
    """An instruction set that the processor names, and whether it works."""

    name: str
    works: bool
    asked: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.asked.append(self.name)
        return self.works


needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set")


@needs_x86
@pytest.mark.parametrize(
    ("capability", "taken", "asked"),
    [("", "small", ["broken", "small"]), ("avx2", "avx2", ["broken", "small", "avx2"])],
)
def test_inductor_asks_no_further_than_to_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capability: str, taken: str, asked: list[str]
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    if not capability:
        monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    order: list[str] = []
    works = {"absent": True, "broken": False, "small": True, "avx2": True, "last": True}
    named = [Named(name, good, order) for name, good in works.items()]
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", named)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: [name for name in works if name != "absent"])
    honest = cpu_vec_isa.valid_vec_isa_list
    with vector_probe.asked_in_order(), vector_probe.asked_in_order():
        assert str(cpu_vec_isa.pick_vec_isa()) == taken
        assert list(dict.fromkeys(order)) == asked
        valid = cpu_vec_isa.valid_vec_isa_list()
        assert [str(isa) for isa in valid] == ["small", "avx2", "last"]
        assert (len(valid), str(valid[-1]), str(valid[1])) == (3, "last", "avx2")
        with pytest.raises(IndexError):
            valid[3]
    assert cpu_vec_isa.valid_vec_isa_list is honest


@needs_x86
def test_none_that_works_is_no_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", [Named("avx2", False)])
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2"])
    with vector_probe.asked_in_order():
        assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa


def test_a_thread_that_leaves_first_leaves_the_order_to_the_other() -> None:
    inside, leave, honest = threading.Event(), threading.Event(), cpu_vec_isa.valid_vec_isa_list

    def other() -> None:
        with vector_probe.asked_in_order():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with vector_probe.asked_in_order():
        thread.start()
        assert inside.wait(60)
        ours = cpu_vec_isa.valid_vec_isa_list
    assert cpu_vec_isa.valid_vec_isa_list is ours
    leave.set()
    thread.join(60)
    assert cpu_vec_isa.valid_vec_isa_list is honest


def test_the_probes_begin_where_the_backend_is_looked_up_and_not_before() -> None:
    text = """
import torch, tilewright
from torch._inductor import cpu_vec_isa
cpu_vec_isa.pick_vec_isa = lambda: print("probed", flush=True)
import tilewright.frontends.api
torch._dynamo.list_backends()
print("ready", flush=True)
torch.compile(torch.sin, backend="tilewright")
from tilewright.frontends import vector_probe
vector_probe.finish()
print("compiled", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    wanted = [] if torch.accelerator.is_available() else ["probed"]
    assert done.stdout.split() == ["ready", *wanted, "compiled"]
