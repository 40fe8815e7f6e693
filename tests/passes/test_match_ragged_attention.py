"""Text gathered by a mask: one program for every mask, and what is left out is not read."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import RunOptions, run_pass
from tilewright.compiler.replay import relative_rms
from tilewright.compiler.selftest import capture_example
from tilewright.passes.normalize._ragged_examples import ragged_examples
from tilewright.passes.normalize.match_ragged_attention import MatchRaggedAttention

MASKS = {
    "prefixes": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "holes": [[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]],
    "nothing and everything": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
}


@pytest.fixture(scope="module")
def program():
    found = capture_example(next(ragged_examples()))
    assert len(run_pass(MatchRaggedAttention(), found, RunOptions(verify="shapes"), Fuel()).applied) == 1
    found.module.recompile()
    return found


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_of_one_program(program, name: str) -> None:
    """Against attention of each sample's own tokens, in float64."""
    *tensors, _ = program.example_inputs
    q, k, v, *text = (t.double() for t in tensors)
    mask = torch.tensor(MASKS[name])
    hidden = (mask == 0)[:, None, :, None]
    got = program.module(q, k, v, *(t.masked_fill(hidden, torch.nan) for t in text), mask)
    for b, kept in enumerate(mask.bool()):
        own = [
            torch.cat([x[b : b + 1], t[b : b + 1, :, kept]], 2) for x, t in zip((q, k, v), text, strict=True)
        ]
        want = ops.attention(*own, None, 0.3)
        assert relative_rms(got[b : b + 1, :, : want.shape[2]], want) < 1e-14
        assert not got[b, :, want.shape[2] :].any()


def test_the_attention_has_static_sizes(program) -> None:
    (attention,) = (n for n in program.graph.nodes if n.target is ops.attention)
    assert all(type(size) is int for size in attention.meta["val"].shape)
    assert tuple(attention.meta["val"].shape) == (2, 3, 11, 8)
