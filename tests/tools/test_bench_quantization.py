"""The steps of quantizing a model, and what is said about their time and memory."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tilewright.compiler.calibration import Statistics
from tilewright.tools import bench_quantization


def test_each_step_prints_what_it_takes(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "statistics"
    common = ["tiny-llama", "--file", str(file), "--length", "16", "--options", "weight=int8"]
    rows = {}
    for step in bench_quantization.STEPS:
        assert bench_quantization.main([*common, "--only", step]) == 0
        rows[step] = json.loads(capsys.readouterr().out.splitlines()[-1])
    layers = Statistics.load(file).layers.values()
    assert all(layer.hessian is not None for layer in layers)
    assert any("rotate-hadamard" in layer.basis for layer in layers)
    for row in rows.values():
        assert 0 < row["before"] <= row["peak"]
        assert row["weights"] > 0
        assert row["seconds"] > 0.0 < row["processor"]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, ""),
        ({"rtn": {"seconds": 21.0}}, "rtn 21.0 s, goal <= 20 s MISSED"),
        ({"calibrate": {"seconds": 200.0}}, "gptq with calibration 250.0 s, goal <= 240 s MISSED"),
        ({"gptq": {"peak": 251 << 20}}, "2.51 x the weights; above   231 MiB, 2.31 x MISSED"),
    ],
)
def test_goals(
    changed: dict[str, Any], missed: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        seen.append(command)
        step = command[command.index("--only") + 1]
        row = {"seconds": 20.0 if step == "rtn" else 50.0, "processor": 1.0, "peak": 250 << 20}
        row |= {"before": 20 << 20, "weights": 100 << 20, **changed.get(step, {})}
        return subprocess.CompletedProcess(command, 0, f"a warning\n{json.dumps(row)}\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert bench_quantization.main(["--folder", str(tmp_path), "--offload"]) == int(bool(missed))
    assert len({command[command.index("--file") + 1] for command in seen}) == 1
    assert all("--offload" in command for command in seen)
    out = capsys.readouterr().out
    assert out.count("MISSED") == int(bool(missed))
    assert missed in out
    assert not list(tmp_path.iterdir())


def test_a_step_without_its_file_is_one_clear_error(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench_quantization.main(["--only", "gptq"])
    assert "--only gptq: needs --file" in capsys.readouterr().err
