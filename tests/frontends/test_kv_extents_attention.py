"""Attention over extents that are not all resident is bitwise that over resident ones, and exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_extents import ExtentLayer
from tilewright.runtime.kv_store.extents import ExtentError, ExtentFile, ExtentLayout
from tilewright.runtime.kv_store.links import SimLink
from tilewright.runtime.kv_store.tier import ExtentKey, TierManager

HEADS, KEY_HEADS, PAGE, SIZE = 6, 2, 16, 64
LAYOUT = ExtentLayout(4, KEY_HEADS, PAGE, SIZE, SIZE, torch.float32)
TOKENS = 16 * 64 - 21


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, KEY_HEADS, TOKENS, SIZE, generator=generator) for _ in range(2))
    return torch.randn(3, 1, HEADS, 1, SIZE, generator=generator), k, v


def layer_of(tmp_path, frames: int, emulated: bool = False) -> tuple[TierManager, ExtentLayer]:
    size = LAYOUT.extent_bytes

    def store():
        return SimLink(1e9, 1e-3) if emulated else ExtentFile(tmp_path / "kv", size)

    tiers = TierManager(frames * size, size, store)
    layer = ExtentLayer(tiers, tiers.open_session(), 0, LAYOUT)
    _, k, v = rows()
    for start in range(0, TOKENS, 150):
        layer.append(k[:, :, start : start + 150], v[:, :, start : start + 150])
    assert (layer.length, layer.runs) == (TOKENS, 16)
    return tiers, layer


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    scores = q.double() @ k.repeat_interleave(HEADS // KEY_HEADS, 1).double().mT * SIZE**-0.5
    return out, scores.logsumexp(-1).float()


@pytest.mark.parametrize(("frames", "emulated"), [(1, False), (2, False), (5, False), (3, True)])
def test_placement_changes_no_bit_and_the_result_is_exact(tmp_path, frames, emulated):
    queries, k, v = rows()
    everything, resident = layer_of(tmp_path, 16)
    tiers, layer = layer_of(tmp_path, frames, emulated)
    for q in queries:
        out, lse = layer.attend(q)
        expected = resident.attend(q)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
        for got, exact in zip((out, lse), reference(q, k, v), strict=True):
            torch.testing.assert_close(got, exact, rtol=0, atol=2e-6)
        assert tiers.resident_bytes <= frames * LAYOUT.extent_bytes
    assert everything.counters.misses == 0
    assert tiers.counters.bytes_read >= 3 * (16 - frames) * LAYOUT.extent_bytes
    assert tiers.counters.bytes_written == 16 * LAYOUT.extent_bytes if frames == 1 else True
    everything.close()
    tiers.close()


def test_chosen_runs_are_what_is_attended(tmp_path):
    queries, k, v = rows()
    tiers, layer = layer_of(tmp_path, 3)
    runs = [0, 9, 4, 15]
    kept = torch.cat([torch.arange(run * 64, min(run * 64 + 64, TOKENS)) for run in runs])
    out, lse = layer.attend(queries[0], runs)
    for got, exact in zip((out, lse), reference(queries[0], k[:, :, kept], v[:, :, kept]), strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=2e-6)
    for wrong in ([], [0, 0], [16], [-1]):
        with pytest.raises(OptionError, match="expected distinct numbers from 0 to 15"):
            layer.attend(queries[0], wrong)
    with pytest.raises(OptionError, match=r"expected \[1, H, 1, D\]"):
        layer.attend(queries[0].expand(-1, -1, 2, -1))
    tiers.close()


def test_a_failed_read_is_an_error_and_the_next_call_is_right(tmp_path, monkeypatch):
    queries, _, _ = rows()
    tiers, layer = layer_of(tmp_path, 3)
    expected = layer.attend(queries[0])
    read = ExtentFile.read

    def failing(self, extent, out):
        if extent.run == 7:
            raise ExtentError("reading an extent: a fault of this test")
        read(self, extent, out)

    monkeypatch.setattr(ExtentFile, "read", failing)
    tiers.demote([ExtentKey(1, 0, 7)])
    with pytest.raises(ExtentError, match="a fault of this test"):
        layer.attend(queries[0])
    monkeypatch.undo()
    assert torch.equal(layer.attend(queries[0])[0], expected[0])
    tiers.close()


def test_a_layout_of_another_size_is_refused(tmp_path):
    tiers = TierManager(8192, 4096, lambda: ExtentFile(tmp_path / "kv", 4096))
    with pytest.raises(OptionError, match=f"extents of {LAYOUT.extent_bytes} bytes do not fit"):
        ExtentLayer(tiers, tiers.open_session(), 0, LAYOUT)
    tiers.close()
