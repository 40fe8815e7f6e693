"""Attention over extents that are not all resident is bitwise that over resident ones, and exact."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_extents import ExtentLayer
from tilewright.runtime.kv_store.extents import ExtentError, ExtentFile, ExtentLayout
from tilewright.runtime.kv_store.links import SimLink
from tilewright.runtime.kv_store.tier import TierManager
from tilewright.runtime.kv_store.tier_state import ExtentKey

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
    kept = torch.tensor([3, 600, 601, 256, TOKENS - 1, 639])
    read = tiers.counters.misses + tiers.counters.prefetched
    listed = torch.cat([kept, torch.tensor([-1, -1])]).to(torch.int32)
    out, lse = layer.attend(queries[0], picked=layer.pick(listed))
    for got, exact in zip((out, lse), reference(queries[0], k[:, :, kept], v[:, :, kept]), strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=2e-6)
    assert tiers.counters.misses + tiers.counters.prefetched - read <= 4, "only their extents are read"
    for wrong in ([], [-1], [TOKENS]):
        with pytest.raises(OptionError, match=f"expected at least one, all from 0 to {TOKENS - 1}"):
            layer.pick(torch.tensor(wrong, dtype=torch.int32))
    tiers.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "layout",
    [
        LAYOUT,
        ExtentLayout(3, KEY_HEADS, 8, 60, 60, torch.float32),  # extents are no multiple of a page
        ExtentLayout(3, KEY_HEADS, PAGE, SIZE, 32, torch.float32),
        ExtentLayout(80, KEY_HEADS, PAGE, SIZE, SIZE, torch.float32),  # long enough to be cut among threads
    ],
    ids=["even", "odd", "two sizes", "long"],
)
def test_how_many_extents_share_a_call_changes_no_bit(tmp_path, layout, threads):
    generator = torch.Generator().manual_seed(3)
    tokens, size = 6 * layout.pages * layout.page - 5, layout.extent_bytes
    sizes = (layout.size, layout.value_size)
    k, v = (torch.randn(1, KEY_HEADS, tokens, n, generator=generator) for n in sizes)
    q, first = torch.randn(1, HEADS, 1, layout.size, generator=generator), torch.tensor([layout.page + 3])
    chosen = torch.randperm(tokens, generator=generator)[: tokens // 3].to(torch.int32)
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for frames in (1, 2, 5, 6, 12):
            tiers = TierManager(frames * size, size, lambda: ExtentFile(tmp_path / "kv", size))
            layer = ExtentLayer(tiers, tiers.open_session(), 0, layout)
            layer.append(k, v)
            found.append([*layer.attend(q, first), *layer.attend(q, first, picked=layer.pick(chosen))])
            tiers.close()
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    at = torch.arange(tokens) >= first
    among = torch.zeros(tokens, dtype=torch.bool)
    among[chosen.long()] = True
    for got, seen in ((found[0][0], at), (found[0][2], at & among)):
        exact = F.scaled_dot_product_attention(q, k, v, seen[None], enable_gqa=True)
        torch.testing.assert_close(got, exact, rtol=0, atol=2e-6)


def tailed(tmp_path, frames: int) -> tuple[TierManager, ExtentLayer, int]:
    """A layer whose newest rows lie in page 2 of a frame of their own."""
    size = LAYOUT.extent_bytes
    tiers = TierManager(frames * size, size, lambda: ExtentFile(tmp_path / "kv", size))
    session = tiers.open_session()
    key = ExtentKey(session, -1, 0)
    with tiers.edit(key):
        pass
    tiers.wait(tiers.fetch([key]))  # pinned
    entry = int(LAYOUT.pool(tiers.memory).table(tiers.places([key]))[0, 2])
    return tiers, ExtentLayer(tiers, session, 0, LAYOUT, tail=entry), session


@pytest.mark.parametrize("seed", range(6))
def test_where_the_newest_rows_lie_changes_no_bit(tmp_path, seed):
    """Random appends, takings back, attentions, rankings and copies: with a tail and without."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, rows_of = LAYOUT.extent_bytes, torch.randn(2, 1, KEY_HEADS, 600, SIZE, generator=generator)
    plain_tiers = TierManager(9 * size, size, lambda: ExtentFile(tmp_path / "kv", size))
    plain = ExtentLayer(plain_tiers, plain_tiers.open_session(), 0, LAYOUT)
    tiers, layer, _ = tailed(tmp_path, choose.choice((2, 3, 9)))
    for _ in range(120):
        act, length = choose.choice(("one",) * 6 + ("some", "crop", "rank", "gather")), plain.length
        count = 1 if act == "one" else choose.randint(2, 70)
        if act in ("one", "some") and length + count <= 600:
            for x in (plain, layer):
                x.append(*(part[:, :, length : length + count] for part in rows_of))
        elif act == "crop":
            kept = max(0, length - choose.choice((1, 5, 16, 40)))
            for x in (plain, layer):
                x.crop(kept)
        if not (length := plain.length):
            continue
        q = torch.randn(1, HEADS, min(length, choose.choice((1, 1, 3))), SIZE, generator=generator)
        wanted = torch.randperm(length, generator=generator)[: choose.randint(1, 40)].to(torch.int32)
        seen = []
        for x in (plain, layer):
            ranked: list[torch.Tensor] = []
            rank = (lambda found, at, to=ranked: to.append(found.clone())) if act == "rank" else None
            seen.append([*x.attend(q[:, :, :1] if rank else q, rank=rank)])
            seen[-1] += [torch.cat(ranked, 1)] if rank else []
            seen[-1] += x.attend(q[:, :, :1], torch.tensor([length // 3]), picked=x.pick(wanted))
            if act == "gather":
                seen[-1].append(x.gather(1, wanted.long().expand(KEY_HEADS, -1)))
        assert plain.length == layer.length
        assert all(torch.equal(x, y) for x, y in zip(*seen, strict=True))
    plain_tiers.close()


def test_rows_one_at_a_time_change_an_extent_once_a_page(tmp_path):
    tiers, layer, session = tailed(tmp_path, 9)
    _, k, v = rows()
    layer.append(k[:, :, :64], v[:, :, :64])
    changed = []
    for at in range(64, 64 + 40):
        layer.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        changed.append(
            tiers._extents[key].version if (key := ExtentKey(session, 0, 1)) in tiers._extents else 0
        )
    assert changed == [0] * 16 + [1] * 16 + [2] * 8


def test_picked_tokens_are_named_by_extent_and_place(tmp_path):
    tiers, layer = layer_of(tmp_path, 3)
    positions = torch.tensor([700, -1, 5, 64, 127, 3, -1, 701, 66, 702, 1000], dtype=torch.int32)
    picked = layer.pick(positions)
    assert picked.runs == [0, 1, 10, 15]
    assert picked.places[:, 0].tolist() == [[3, 5, -1], [0, 2, 63], [60, 61, 62], [40, -1, -1]]
    layer.crop(900)
    assert [key.run for key in layer.wanted(picked)] == [0, 1, 10], "as far as they are held"
    with pytest.raises(OptionError, match=f"picked of {TOKENS}: 900 are held"):
        layer.attend(rows()[0][0], picked=picked)
    tiers.close()


def test_several_queries_padding_and_logits(tmp_path):
    _, k, v = rows()
    tiers, layer = layer_of(tmp_path, 3)
    q, first = torch.randn(1, HEADS, 70, SIZE), torch.tensor([130])
    out, _ = layer.attend(q, first)
    at = torch.arange(TOKENS)
    seen = (at >= 130) & (at <= torch.arange(TOKENS - 70, TOKENS)[:, None])
    exact = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    torch.testing.assert_close(out, exact, rtol=0, atol=4e-6)
    logits = torch.full((HEADS, TOKENS), float("nan"))

    def rank(found: torch.Tensor, start: int) -> None:
        logits[:, start : start + found.shape[1]] = found

    layer.attend(q[:, :, :1], rank=rank)
    want = (q[0, :, :1] @ k[0].repeat_interleave(HEADS // KEY_HEADS, 0).mT)[:, 0]
    torch.testing.assert_close(logits, want, rtol=0, atol=2e-4)
    layer.crop(100)
    assert (layer.length, layer.runs) == (100, 2)
    got, _ = layer.attend(q[:, :, :1])
    want = F.scaled_dot_product_attention(q[:, :, :1], k[:, :, :100], v[:, :, :100], enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
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
