"""Axes that are only renamed cost no node; those that move data keep theirs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw


class Views(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        split = x.view(1, -1, self.heads, 6).transpose(1, 2)
        there = split.reshape(1, x.shape[1], -1)
        return there + 1.0, x.view(2, -1)


@pytest.mark.parametrize(("heads", "counts"), [(4, {"Reshape": 1}), (2, {"Reshape": 3, "Transpose": 1})])
def test_views_of_known_sizes(tmp_path: Path, heads: int, counts: dict[str, int]) -> None:
    x = torch.randn(1, 1 if heads == 4 else 2, 24 if heads == 4 else 12)
    (entry,) = tw.export(Views(heads), (x,), "exact", tmp_path / "out")["entries"]
    assert entry["parity"]["example"]["model"] == 0.0
    assert entry["operators"] == {"Add": 1, **counts}


def test_views_of_sizes_that_vary_stay(tmp_path: Path) -> None:
    axes = {"x": {1: "rows"}}
    manifest = tw.export(Views(4), (torch.randn(1, 5, 24),), "exact", tmp_path / "out", dynamic=axes)
    (entry,) = manifest["entries"]
    assert entry["operators"]["Transpose"] == 1
    assert entry["parity"]["other sizes"]["model"] == 0.0
