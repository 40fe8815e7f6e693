"""Weights moved to a file: same values, aliases and identities; memory of what nobody reads is given back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright
from tilewright.compiler.diagnostics import OptionError


class Tied(nn.Module):
    """Two names of one parameter, and a buffer that is a view into another's storage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        table = torch.randn(4, width)
        self.register_buffer("table", table)
        self.register_buffer("rows", table.t()[:, 1:3])

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x)) + self.table[1] + self.rows[:, 0]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_values_aliases_and_identities_stay(tmp_path: Path) -> None:
    model, x = Tied(48), torch.randn(3, 48)
    before, names = model(x), [(n, id(t), t._version) for n, t in model.named_parameters()]
    moved = tilewright.offload_weights(model, tmp_path)
    assert moved == 4 * (48 * 48 + 48 + 4 * 48)
    assert torch.equal(model(x), before)
    assert [(n, id(t), t._version) for n, t in model.named_parameters()] == names
    assert model.second.weight is model.first.weight
    assert model.rows.stride() == (1, 48)
    model.table[1] += 1.0
    assert torch.equal(model.rows[:, 0], model.table[1]), "the view still sees writes"
    torch.testing.assert_close(model(x), before + 2.0)
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_a_compiled_model_goes_on_and_sees_updates(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval(), torch.randn(1, 64)
    options = {"pipeline": "quantize-linear{weight=int8}", "lower": "eager"}
    compiled = torch.compile(model, backend="tilewright", options=options)
    with torch.no_grad():
        before = compiled(x)
        assert not torch.equal(before, model(x)), "quantized"
        tilewright.offload_weights(model, tmp_path)
        assert torch.equal(compiled(x), before)
        model[2].weight.mul_(2.0)
        model[2].bias.mul_(2.0)
        torch.testing.assert_close(compiled(x), 2 * before)


def test_memory_that_nobody_reads_is_given_back() -> None:
    model = nn.Linear(4096, 4096)
    model.weight.data.fill_(1.0)
    held = resident()
    moved = tilewright.offload_weights(model)
    assert held - resident() > 0.9 * moved > 60e6
    assert float(model.weight[7, 9]) == 1.0


def test_a_full_disk_leaves_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    storages = [p.data_ptr() for p in model.parameters()]
    real, calls = tempfile.TemporaryFile, []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OptionError, match="No space left on device"):
        tilewright.offload_weights(model, tmp_path)
    assert [p.data_ptr() for p in model.parameters()] == storages


def test_a_folder_that_is_none() -> None:
    with pytest.raises(OptionError, match=r"folder = '/nowhere/at/all': No such file"):
        tilewright.offload_weights(nn.Linear(2, 2), "/nowhere/at/all")


def test_nothing_to_move() -> None:
    assert tilewright.offload_weights(nn.ReLU()) == 0
    assert tilewright.offload_weights(nn.Linear(4, 4, device="meta")) == 0
