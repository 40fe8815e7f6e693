"""The toy's training: what it draws, that pieces give the weights of one run, that a loss falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tilewright.frontends import toy_video
from tilewright.tools import train_toy_video as training


def test_what_is_drawn() -> None:
    video, words = training.draw(torch.Generator().manual_seed(3))
    assert video.shape == toy_video.SHAPE
    assert -1.0 <= float(video.min()) < float(video.max()) <= 1.0
    assert toy_video.embed(words).shape == (1, 6, toy_video.TEXT_DIM)
    again, _ = training.draw(torch.Generator().manual_seed(3))
    assert torch.equal(video, again)


@pytest.mark.slow
def test_a_named_direction_is_the_motion() -> None:
    """The mean place of what is not background moves as the words say, where both shapes move alike."""
    seen = 0
    for seed in range(400):
        video, words = training.draw(torch.Generator().manual_seed(seed))
        if words[2] != words[5] or words[2] not in ("up", "down"):
            continue
        rows = (video + 0.8).abs().sum((0, 3))
        place = (rows * torch.arange(32)).sum(1) / rows.sum(1)
        seen += 1
        moved = float(place[-1] - place[0])
        assert moved > 0 if words[2] == "down" else moved < 0, (seed, moved)
    assert seen >= 10


def test_pieces_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps in one run and in two; the second stage begins inside. float16 weights are written."""
    monkeypatch.setattr(training, "STAGES", ((1, 1, 8), (1, 1, 16)))
    monkeypatch.setattr(training, "STEPS", 2)
    one, two, middle = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "middle"))
    try:
        assert training.main(["--out", str(one)]) == 0
        assert training.main(["--until", "1", "--checkpoint", str(middle), "--out", str(two)]) == 0
        assert not two.exists()
        assert training.main(["--checkpoint", str(middle), "--out", str(two)]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    found, wanted = load_file(two), load_file(one)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_illegal_step() -> None:
    with pytest.raises(SystemExit):
        training.main(["--until", "0"])
