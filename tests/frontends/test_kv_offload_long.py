"""A cache of 65,536 synthetic tokens on disk: right, and within its memory as the system counts it."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tilewright.frontends.kv_choice import SharedChoice
from tilewright.frontends.kv_offload import OffloadedLayer, Placement
from tilewright.passes.memory.lessismore_kv import LessIsMoreKV
from tilewright.passes.memory.offload_kv import OffloadKV

KEY_HEADS, HEADS, SIZE, LAYERS = 4, 8, 128, 2
CHUNK = 256
SCALE = SIZE**-0.5


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def chunks(layer: int, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [1, Hkv, CHUNK, D], the same at every call."""
    generator = torch.Generator().manual_seed(layer)
    for _ in range(tokens // CHUNK):
        k, v = torch.randn(2, 1, KEY_HEADS, CHUNK, SIZE, generator=generator).unbind(0)
        yield k, v


def naive(q: torch.Tensor, layer: int, tokens: int, kept: torch.Tensor) -> torch.Tensor:
    """Attention in float64 over the tokens of bool [S], chunk by chunk."""
    rows = q[0, :, 0].double().unflatten(0, (KEY_HEADS, -1))
    total = torch.zeros(KEY_HEADS, HEADS // KEY_HEADS, 1, dtype=torch.float64)
    weighted = torch.zeros(KEY_HEADS, HEADS // KEY_HEADS, SIZE, dtype=torch.float64)
    for at, (k, v) in enumerate(chunks(layer, tokens)):
        here = kept[at * CHUNK : (at + 1) * CHUNK]
        weights = (rows @ k[0].double().mT * SCALE).exp() * here
        total += weights.sum(-1, keepdim=True)
        weighted += weights @ v[0].double()
    return (weighted / total).flatten(0, 1)[None, :, None].float()


def cache(fast: int, folder: Path, budget: int) -> tuple[Placement, list[OffloadedLayer]]:
    """Layer 0 chooses, layer 1 attends its choice."""
    placement = Placement(OffloadKV(fast_bytes=fast, folder=str(folder), extent_bytes=1 << 20))
    choice = SharedChoice(LessIsMoreKV(budget=budget, select_layers=(0,)), LAYERS)
    return placement, [OffloadedLayer(i, 16, lambda: None, placement, choice) for i in range(LAYERS)]


def drive(tokens: int, fast: int, folder: Path, budget: int, steps: int) -> int:
    """Fill a cache, decode and compare; the most bytes that it added to this process."""
    placement, layers = cache(fast, folder, budget)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
    before = most = resident()
    for index, layer in enumerate(layers):
        for k, v in chunks(index, tokens):
            if layer._rows is None:
                layer.lazy_initialization(k, v)
            layer.rows.append(k, v)
        most = max(most, resident())
    torch.manual_seed(9)
    found = []
    for _ in range(steps):
        q = torch.randn(1, HEADS, 1, SIZE)
        outs = [layer.decode(q, None, SCALE) for layer in layers]
        positions = layers[0].choice.of(1, tokens)
        found.append((q, outs, positions[0, 0].clone()))
        most = max(most, resident())
    seen = placement.statistics()
    placement.close()
    assert seen["held_bytes"] == 8 * fast
    assert seen["resident_bytes"] <= fast
    for q, outs, positions in found:
        kept = torch.zeros(tokens, dtype=torch.bool)
        kept[positions[positions >= 0].long()] = True
        assert int(kept.sum()) == budget
        everything = torch.ones(tokens, dtype=torch.bool)
        for index, which in enumerate((everything, kept)):
            torch.testing.assert_close(outs[index], naive(q, index, tokens, which), rtol=0, atol=2e-6)
    return most - before


@pytest.mark.slow
def test_64k_tokens_within_a_tenth_and_the_scores_over_the_fast_tier(tmp_path: Path) -> None:
    drive(4096, 4 << 20, tmp_path / "small", 256, 1)  # kernels and threads take their memory here
    fast = 64 << 20
    added = drive(65536, fast, tmp_path / "large", 1024, 2)
    scores = 2 * HEADS * 65536 * 4  # the logits of the layer that chooses, and their masked copy
    assert fast * 0.9 < added <= fast * 1.1 + scores, f"{added / fast:.3f} of fast_bytes"
