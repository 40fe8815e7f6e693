"""The trained toy, the sweeps over it and their plot."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
import torch

from tilewright.compiler.diagnostics import LoadError, OptionError
from tilewright.frontends import curve_plot, latent_quality, toy_video
from tilewright.frontends.bundled_models import BUNDLED
from tilewright.tools import train_toy_video


@torch.no_grad()
def test_the_toy_was_trained() -> None:
    """Its velocity explains most of that of videos it never saw; wrong words make it worse."""
    model = BUNDLED["toy-video-dit"]().module
    assert toy_video.WEIGHTS.stat().st_size < 5_000_000
    noisy, timestep, prompts, wanted = train_toy_video.batch_of(10**6)

    def loss(text: torch.Tensor) -> float:
        named = {"hidden_states": noisy, "timestep": timestep, "encoder_hidden_states": text}
        return float((model(**named, return_dict=False)[0] - wanted).square().mean())

    told = loss(prompts)
    assert told < 0.2 * float(wanted.square().mean())
    assert told < loss(prompts.roll(1, 0))


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    monkeypatch.setattr(toy_video, "WEIGHTS", path)
    with pytest.raises(LoadError, match="does not hold the weights of toy-video-dit"):
        toy_video.trained()


@pytest.mark.parametrize(
    ("words", "said"), [(["red"], "1 words, expected 6"), (["rde"] * 6, "'rde' is not known")]
)
def test_unknown_prompts(words: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        toy_video.embed(words)


def test_psnr() -> None:
    x = torch.zeros(1, 3)
    assert latent_quality.psnr(x, x) == math.inf
    assert latent_quality.psnr(x + 0.2, x) == pytest.approx(20.0, abs=1e-5)


def test_windows_of_densities() -> None:
    """Over 2 x 4 x 4 tiles a window of w tiles keeps w / 32."""
    found = [latent_quality.nearest_window(d) for d in latent_quality.DENSITIES]
    assert [kept for _, kept in found] == [0.5, 9 / 32, 6 / 32, 3 / 32]
    assert all(math.prod(window) / 32 == kept for window, kept in found)


def test_noise_levels() -> None:
    levels = latent_quality.schedule_of(5)
    assert (levels[0], levels[-1]) == (1.0, 0.0)
    assert levels == sorted(levels, reverse=True)


def test_a_plot_stands_alone() -> None:
    text = curve_plot.svg("a < b", "x", "y", {"one": [(0.1, 30.0), (0.5, math.inf)], "two": [(0.2, 20.0)]})
    root = ElementTree.fromstring(text)
    assert sum(e.tag.endswith("polyline") for e in root.iter()) == 2
    assert [e.text for e in root.iter() if e.text and "<" in e.text] == ["a < b"]
    assert "href" not in text
    places = [(float(e.get("cx", 0)), float(e.get("cy", 0))) for e in root.iter() if e.tag.endswith("circle")]
    assert len(places) == 4
    assert all(0 <= x <= curve_plot.WIDTH and 0 <= y <= curve_plot.HEIGHT for x, y in places)
    with pytest.raises(ValueError, match="no finite point"):
        curve_plot.svg("t", "x", "y", {"one": [(0.1, math.inf)]})
