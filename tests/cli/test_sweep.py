"""`evaluate toy-video-dit --sweep`: bad input is one line, and the tables say what the rows hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilewright.frontends.cli import BAD_INPUT, OK, main

TOY = ("evaluate", "toy-video-dit")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--sweep", "attention", "--densities", "0.5,1.5"), "more than 0 and less than 1"),
        (("--sweep", "attention", "--densities", "nan"), "more than 0 and less than 1"),
        (("--sweep", "attention", "--densities", "a"), "numbers joined by commas"),
        (("--sweep", "reuse", "--thresholds", "0"), "expected more than 0"),
        (("--sweep", "reuse", "--densities", "0.5"), "--densities does not go with --sweep reuse"),
        (("--sweep", "attention", "--thresholds", "1"), "--thresholds does not go with"),
        (("--sweep", "attention", "--steps", "3"), "--steps = 3: expected 4 to 200"),
        (("--sweep", "attention", "--items", "9"), "items = 9: expected 1 to 4"),
        (("--sweep", "attention", "--plot", "x.png"), "expected an .svg file"),
        (("--sweep", "attention", "--plot", "no/such/folder/x.svg"), "in a folder that exists"),
        (("--sweep", "attention", "--pipeline", "none"), "has its own pipelines"),
        (("--sweep", "sideways"), "invalid choice"),
        (("--steps", "20"), "--steps belongs to --sweep"),
    ],
)
def test_bad_input_is_one_line(more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, *more]) == BAD_INPUT
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "tiny-video-dit", "--sweep", "reuse"]) == BAD_INPUT
    assert "evaluates toy-video-dit" in capsys.readouterr().err


@pytest.mark.slow
def test_attention_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quality falls with density, and a correction of the same tiles is better than none."""
    plot = tmp_path / "quality.svg"
    arguments = ("--sweep", "attention", "--densities", "0.5,0.1", "--steps", "8", "--plot", str(plot))
    assert main([*TOY, *arguments, "--json"]) == OK
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = {(r["system"], r["wanted"]): r["psnr"] for r in rows}
    assert len(found) == len(rows) == 10
    for system in {r["system"] for r in rows}:
        assert found[system, 0.5] > found[system, 0.1] > 8.0
    for density in (0.5, 0.1):
        assert found["statistical-reshape", density] > found["sliding-tile", density] + 3.0
    assert plot.read_text().count("<polyline") == 5


@pytest.mark.slow
def test_reuse_halves_the_blocks_at_30_db(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "reuse.svg"
    assert main([*TOY, "--sweep", "reuse", "--thresholds", "0.12", "--plot", str(plot), "--json"]) == OK
    rows = {r["policy"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    best = rows["residual"]
    assert best["evaluations"] * 2 <= best["full"]
    assert best["psnr"] >= 30.0
    assert best["time_saved"] >= 0.9 * best["saved"]
    fitted, plain = rows["modulated, fitted"], rows["modulated"]
    assert fitted["psnr"] > plain["psnr"] + 3.0, "the probe says less than half of what the residual changes"
    assert plot.read_text().count("<polyline") == 4


@pytest.mark.slow
def test_the_toy_runs_and_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = "sliding-tile-attention{tile=2x4x4,window=1x3x3},hoist-token-permutation"
    assert main(["explain", "toy-video-dit", "--pipeline", pipeline, "--no-kernels", "--json"]) == OK
    done = {p["name"]: p for p in json.loads(capsys.readouterr().out)["passes"]}
    assert len(done["sliding-tile-attention"]["applied"]) == 4
    assert len(done["hoist-token-permutation"]["applied"]) == 1
    assert main(["run", "toy-video-dit", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["difference_to_eager"] < 1e-4
