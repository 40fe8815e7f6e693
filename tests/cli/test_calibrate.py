"""`tilewright calibrate` writes a file that the passes read, and says what is wrong first."""

from __future__ import annotations

import json

from tilewright.compiler.calibration import Statistics
from tilewright.frontends.cli import BAD_INPUT, OK, main


def test_calibrate(tmp_path, capsys):
    out = tmp_path / "tiny.safetensors"
    command = ["calibrate", "tiny-llama", "--out", str(out), "--length", "16", "--hessian", "--json"]
    assert main(command) == OK
    data = json.loads(capsys.readouterr().out)
    found = Statistics.load(out)
    assert data["fingerprint"] == found.fingerprint
    assert len(data["layers"]) == len(found.layers) == 15
    assert all(layer.hessian is not None for layer in found.layers.values())


def test_bad_requests(tmp_path, capsys):
    for arguments, reason in (
        (["--out", str(tmp_path / "no" / "file")], "there is no folder"),
        (["--out", str(tmp_path / "a"), "--samples", "0"], "--samples = 0"),
        (["--out", str(tmp_path / "a"), "--pipeline", "no-such-pass"], "unknown pass"),
    ):
        assert main(["calibrate", "tiny-llama", *arguments]) == BAD_INPUT
        assert reason in capsys.readouterr().err
