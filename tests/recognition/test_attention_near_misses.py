"""The 42 attention-like programs of which Inductor's own pattern gets 12 wrong: none may be wrong here."""

from __future__ import annotations

import itertools

import pytest
import torch

from tilewright.passes.normalize.match_attention import MatchAttention

SCALES = {"mul": lambda s: s * 0.25, "div": lambda s: s / 4.0, "none": lambda s: s}
MASKS = (False, True)
AXES = {
    "right": (-1, (0, 1, 3, 2)),
    "softmax over queries": (-2, (0, 1, 3, 2)),
    "softmax over heads": (1, (0, 1, 3, 2)),
    "softmax over batch": (0, (0, 1, 3, 2)),
    "k permuted 0231": (-1, (0, 2, 3, 1)),
    "k permuted 0321": (-1, (0, 3, 2, 1)),
    "k permuted 0312": (-1, (0, 3, 1, 2)),
}


@pytest.mark.parametrize(("scale", "masked", "axes"), itertools.product(SCALES, MASKS, AXES))
def test_never_wrong(judge, scale, masked, axes):
    dim, order = AXES[axes]
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 16, 16, 16, generator=generator) * 2 for _ in range(3))
    mask = torch.randn(2, 1, 16, 16, generator=generator)

    def program(q, k, v, *rest):
        s = SCALES[scale](q @ k.permute(order))
        s = s + rest[0] if rest else s
        return torch.softmax(s, dim) @ v

    outcome = judge(MatchAttention(), program, (q, k, v, mask) if masked else (q, k, v))
    assert outcome.is_right, outcome
    assert outcome.applied == (dim == -1), outcome
    if dim != -1:
        assert any("softmax dim is" in reason for reason in outcome.reasons), outcome
