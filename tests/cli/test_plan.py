"""`tilewright plan` writes a file that quantize-plan takes, keeps to its budget, says what is wrong first."""

from __future__ import annotations

import json

import pytest

from tilewright.compiler.precision_plan import PrecisionPlan
from tilewright.frontends.cli import BAD_INPUT, OK, main

CALIBRATE = ["calibrate", "tiny-llama", "--length", "16", "--hessian"]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("plan") / "tiny.safetensors")
    assert main([*CALIBRATE, "--out", path]) == OK
    return path


def test_a_plan_by_size_is_one_that_the_pass_takes(statistics, tmp_path, capsys):
    out = tmp_path / "plan.toml"
    formats = ["--format", "int8.0.symmetric.none.blocks8", "--format", "fp8-e4m3.0.none.rows"]
    command = ["plan", "tiny-llama", "--statistics", statistics, "--max-share", "0.5", *formats]
    assert main([*command, "--out", str(out), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert 0 < data["bytes"]["after"] <= 0.5 * data["bytes"]["before"]
    plan = PrecisionPlan.load(out)
    assert {row["layer"]: row["format"] for row in data["layers"]} == plan.layers
    chosen = sum(row["format"] != "keep" for row in data["layers"])
    assert 0 < chosen < len(plan.layers), "the budget leaves some as they are"
    assert main(["explain", "tiny-llama", "--pipeline", f"quantize-plan{{plan={out}}}", "--json"]) == OK
    report = json.loads(capsys.readouterr().out)
    (row,) = [row for row in report["passes"] if row["name"] == "quantize-plan"]
    assert len(row["applied"]) == chosen


@pytest.mark.slow
def test_a_plan_by_error_shows_every_layer_and_writes_nothing(statistics, tmp_path, capsys):
    command = ["plan", "tiny-llama", "--statistics", statistics, "--max-error"]
    assert main([*command, "1e-4", "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["mean_error"] <= 0.9e-4
    assert data["budget"] == "max_error 0.0001 with a margin of 0.1"
    assert main([*command, "0"]) == OK
    text = capsys.readouterr().out
    assert text.count(": keep (") == len(data["layers"]) > 10
    assert main([*command[:-1], "--max-share", "0.001"]) == BAD_INPUT
    assert "no choice of formats meets it" in capsys.readouterr().err


def test_bad_requests(statistics, tmp_path, capsys):
    given = ["plan", "tiny-llama", "--statistics", statistics]
    for arguments, reason in (
        ([], "either --max-error or --max-share"),
        (["--max-share", "1.5"], "--max-share = 1.5"),
        (["--max-error", "nan"], "--max-error = nan"),
        (["--max-error", "0.1", "--margin", "1"], "--margin = 1"),
        (["--max-share", "0.5", "--margin", "0.1"], "and --max-error"),
        (["--max-share", "0.5", "--format", "int9"], "int9"),
        (["--max-share", "0.5", "--out", str(tmp_path / "no" / "file")], "there is no folder"),
    ):
        assert main([*given, *arguments]) == BAD_INPUT
        assert reason in capsys.readouterr().err
    other = ["plan", "smollm2-missing", "--statistics", str(tmp_path / "none"), "--max-share", "0.5"]
    assert main(other) == BAD_INPUT
    assert "none" in capsys.readouterr().err
