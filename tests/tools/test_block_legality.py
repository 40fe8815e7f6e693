"""The legality report names every layer, the rules that it breaks, and why there are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.frontends.bundled_models import BUNDLED
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.tools.block_legality import lines_of, structure_of


@pytest.mark.slow
def test_layers_and_rules_of_a_video_model_and_of_one_without_layers() -> None:
    torch._dynamo.reset()
    structure = structure_of(BUNDLED["tiny-video-dit"](), None, 1)
    lines = lines_of(structure, verbose=False)
    assert len(lines) == 4
    assert all("blocks." in line and "L7: " in line and "depends on the step" in line for line in lines)
    assert len(lines_of(structure, verbose=True)) == 4 * 8
    plain = LoadedModel(
        "plain", "module", nn.Linear(3, 3), None, {"call": lambda _: ((torch.ones(2, 3),), {})}
    )
    torch._dynamo.reset()
    assert lines_of(structure_of(plain, None, None), verbose=False)[0].startswith("no layers: ")
    torch._dynamo.reset()
