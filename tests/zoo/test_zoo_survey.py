"""Zoo models through the whole compiler: none crashes, none is wrong, and what must be recognised is."""

from __future__ import annotations

import pytest

from tilewright.tools.zoo_measure import Settings, measure
from tilewright.tools.zoo_models import entries, select

EAGER = ("llama-eager", "gemma2-eager", "bert-eager")
QUICK = (*EAGER, "gpt2", "gptj", "mixtral", "gpt-oss", "t5", "swin", "wan", "mochi")
"""One of each kind: grouped and eager attention, soft cap, Conv1D, interleaved rope, experts, sinks, padding,
cross-attention with relative bias, windows, video, text gathered by its mask."""


def check(name):
    (entry,) = select([name])
    row = measure(entry, Settings(lower="eager", kernels=False))
    assert not row.crash
    assert not row.wrong
    assert row.error_ours < 1e-3
    assert row.whole
    assert not row.missing


@pytest.mark.parametrize("name", QUICK)
def test_quick_model(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in entries() if entry.name not in QUICK])
def test_model(name):
    check(name)
