"""The kernels of one program are compiled at once; what the compiler refuses is told as one error."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright.frontends.compile as compile_module
from tilewright.compiler.diagnostics import BuildError
from tilewright.frontends import lowering
from tilewright.kernels import load
from tilewright.kernels.chain import build as chain_build
from tilewright.kernels.common.family import KernelFamily
from tilewright.kernels.table import FAMILIES, KernelChoice, host_target, select_for_node
from tilewright.runtime.build import compile_cpp
from tilewright.runtime.contracts import KernelKey, Target
from tilewright.runtime.store import ArtifactStore

TARGET = host_target()
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")


def _key(op: str, *args: Any) -> KernelKey:
    found = select_for_node(op, args, TARGET, training=False)
    assert isinstance(found, KernelChoice), str(found)
    return found.key


def _with(op: str, line: str) -> KernelFamily:
    honest = FAMILIES[op].generate["cpu"]
    return dataclasses.replace(
        FAMILIES[op], generate={"cpu": lambda key, name: honest(key, name) + f"\n{line}\n"}
    )


def test_kernels_are_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both, honest, meetings = threading.Barrier(2), load.compile_cpp, []

    def compile_together(source: str, arch: str, headers: Mapping[str, str]) -> Path:
        meetings.append(both.wait(timeout=60))
        return honest(source, arch, headers)

    monkeypatch.setattr(load, "compile_cpp", compile_together)
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(load, "_BUILT", {})
    monkeypatch.setattr(load, "_LOADED", {})
    x = torch.randn(7, 89)
    norm, mlp = _key("rms_norm", x, torch.randn(89), 1e-6), _key("gated_mlp", x, x, "silu")
    load.compile_side_by_side([(FAMILIES["rms_norm"], norm), (FAMILIES["gated_mlp"], mlp)] * 2)
    assert sorted(meetings) == [0, 1], "each kernel is compiled once, and one did not wait for the other"


def test_lowering_asks_for_all_its_kernels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def note(wanted: Iterable[tuple[KernelFamily, KernelKey]]) -> None:
        asked.append([key.op for _, key in wanted])

    monkeypatch.setattr(lowering, "compile_side_by_side", note)
    torch._dynamo.reset()
    module, x = nn.Sequential(nn.RMSNorm(1483), nn.Linear(1483, 29)).eval(), torch.randn(7, 1483)
    with torch.no_grad():
        got = torch.compile(module, backend="tilewright", options={"lower": "eager"})(x)
        torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)
    assert asked == [["rms_norm", "linear"]]


class Block(nn.Module):
    """A gated MLP over a normed residual stream."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@torch.no_grad()
def test_chains_and_other_kernels_are_begun_together(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    needed: dict[str, str] = {}
    begin = compile_module.begin_compiling

    def note_all(sources: list[str], target: Target) -> None:
        begun.append(sources)
        begin(sources, target)

    def note(source: str, arch: str, headers: Mapping[str, str]) -> Path:
        assert begun, "what is waited for first was begun with the others"
        needed[source] = arch
        return compile_cpp(source, arch, headers)

    monkeypatch.setattr(compile_module, "begin_compiling", note_all)
    monkeypatch.setattr(load, "compile_cpp", note)
    monkeypatch.setattr(chain_build, "compile_cpp", note)
    monkeypatch.setattr(load, "_BUILT", {})
    torch._dynamo.reset()
    blocks = nn.Sequential(*(Block(88, 200) for _ in range(18))).eval()
    x, wide = torch.randn(1, 1, 88), torch.randn(1, 33, 88)

    def both(x: torch.Tensor, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return blocks(x), blocks[0](wide)

    got = torch.compile(both, backend="tilewright", options={"lower": "eager"})(x, wide)
    torch.testing.assert_close(got, both(x, wide), rtol=1e-4, atol=1e-5)
    assert len(begun) == 1
    assert needed.keys() <= set(begun[0])
    assert [text for text in begun[0] if "chain_" in text], "a chain"
    others = [text for text in begun[0] if "chain_" not in text]
    assert len(others) >= 3, "kernels of the block that is no chain"
    assert not [text for text in others if "add_rms_norm" in text], "none for what chains run"


def test_the_first_that_is_refused_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(load, "_BUILT", {})
    x = torch.randn(7, 89)
    wanted = [
        (_with("linear", "// sound"), _key("linear", x, torch.randn(31, 89))),
        (_with("rms_norm", "#error first"), _key("rms_norm", x, torch.randn(89), 1e-6)),
        (_with("gated_mlp", "#error second"), _key("gated_mlp", x, x, "silu")),
    ]
    with pytest.raises(BuildError, match="#error first") as caught:
        load.compile_side_by_side(wanted)
    assert "\n" not in str(caught.value)
    kept = [entry.key["kind"] for entry in ArtifactStore.default().entries()]
    assert sorted(kept) == ["cpp-kernel", "cpp-stand-in"]
    assert not list((tmp_path / "store" / "building").iterdir()), "nothing half built is left"
