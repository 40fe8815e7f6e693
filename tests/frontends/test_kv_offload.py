"""Offloaded caches: the same bits wherever extents lie, greedy tokens, the bound, and faults."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_choice import SharedChoice
from tilewright.passes.memory._early_choice import Ranking
from tilewright.passes.memory.lessismore_kv import LessIsMoreKV
from tilewright.runtime.kv_store.extents import ExtentError, FileIO
from tilewright.runtime.kv_store.transfers import TransferThreads

LAYERS = 4
EXTENT = 8192
"""Bytes: 32 tokens of a layer of this model."""


def make_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(batch: int, length: int = 150) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch)
    ids, mask = torch.randint(3, 64, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
    for row, padding in enumerate((0, 40, length - 2)[:batch]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, given: Any, count: int = 8, **how: Any) -> Any:
    return model.generate(**given, max_new_tokens=count, do_sample=False, **how)


def offload(frames: int, tmp_path: Path, **more: Any) -> str:
    options = {"fast_bytes": frames * EXTENT, "extent_bytes": EXTENT, "folder": str(tmp_path / "kv"), **more}
    return "offload-kv{" + ",".join(f"{k}={v}" for k, v in options.items()) + "}"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tier", ["disk", "host"])
def test_tokens_are_greedy_within_the_bound(batch: int, tier: str, tmp_path: Path) -> None:
    model, given = make_model(), prompts(batch)
    want = generate(model, given)
    with tw.kv_cache(model, offload(3, tmp_path, tier=tier)) as cache:
        assert torch.equal(generate(model, given, past_key_values=cache), want)
        seen = cache.statistics()
        assert seen["resident_bytes"] <= 3 * EXTENT < seen["held_bytes"] / 6
        assert seen["bytes_read"] > 0
        cache.reset()
        assert cache.nbytes == 0
        assert torch.equal(generate(model, given, past_key_values=cache), want), "again after reset"


@pytest.mark.parametrize("chosen", ["", ",lessismore-kv{budget=60,select_layers=0x2}"])
def test_placement_and_prefetch_change_no_bit(chosen: str, tmp_path: Path) -> None:
    model, given = make_model(), prompts(2)
    found = []
    for frames, ahead in ((1, 0), (3, 4), (100, 8)):
        with tw.kv_cache(model, offload(frames, tmp_path, prefetch=ahead) + chosen) as cache:
            found.append(
                generate(
                    model, given, past_key_values=cache, output_logits=True, return_dict_in_generate=True
                )
            )
            assert (cache.statistics()["misses"] > 0) == (frames < 100)
    for other in found[1:]:
        assert torch.equal(other.sequences, found[0].sequences)
        for ours, theirs in zip(other.logits, found[0].logits, strict=True):
            assert torch.equal(ours, theirs)


class PromptThreads(TransferThreads):
    """Transfers end before anything else happens, so that counts are the same on every machine."""

    def submit(self, jobs: Any) -> None:
        for job, _ in list(jobs):
            job.run()


@pytest.mark.parametrize("chosen", ["", ",lessismore-kv{budget=120,select_layers=0x2}"])
def test_every_extent_is_announced_before_it_is_wanted(
    chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across sequences, layers and steps: 40 extents through 24 frames, and none is waited for unasked."""
    monkeypatch.setattr("tilewright.runtime.kv_store.tier.TransferThreads", PromptThreads)
    model, ids = make_model(), prompts(2)["input_ids"]
    with torch.no_grad(), tw.kv_cache(model, offload(24, tmp_path, prefetch=6) + chosen) as cache:
        model(ids, past_key_values=cache)
        moved = []
        for _ in range(8):
            model(ids[:, -1:], past_key_values=cache)
            moved.append(cache.statistics())
        assert moved[-1]["misses"] == moved[3]["misses"]
        read = moved[-1]["bytes_read"] - moved[3]["bytes_read"]
        assert 0 < read < 4 * 30 * EXTENT, "what fits beside the layer at work stays"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("placed", [False, True])
def test_less_is_more_is_greedy_where_all_fits(batch: int, placed: bool, tmp_path: Path) -> None:
    model, given = make_model(), prompts(batch)
    want = generate(model, given)
    where = offload(3, tmp_path) + "," if placed else ""
    with tw.kv_cache(model, where + "lessismore-kv{budget=200}") as cache:
        assert torch.equal(generate(model, given, past_key_values=cache), want)
    with tw.kv_cache(model, where + "lessismore-kv{budget=8,select_layers=0}") as cache:
        assert not torch.equal(generate(model, given, past_key_values=cache), want), "the policy does nothing"


def test_both_places_attend_the_same_tokens(tmp_path: Path) -> None:
    model, given = make_model(), prompts(3)
    logits = []
    for where in ("", offload(2, tmp_path) + ","):
        with tw.kv_cache(model, where + "lessismore-kv{budget=40,select_layers=1x2}") as cache:
            out = generate(
                model, given, past_key_values=cache, output_logits=True, return_dict_in_generate=True
            )
            logits.append(torch.stack(out.logits))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("budget", "recent", "sinks"), [(20, 0.25, 4), (9, 0.0, 2), (12, 1.0, 3), (6, 0.5, 4)]
)
def test_positions_are_the_best_in_turn(budget: int, recent: float, sinks: int) -> None:
    policy = LessIsMoreKV(budget=budget, recent=recent, sinks=sinks)
    torch.manual_seed(budget)
    lengths, first = torch.tensor([70, 33, 12]), torch.tensor([0, 5, 9])
    logits = torch.randn(3, 4, 70)
    found = policy.positions(logits, lengths, first)
    choice = SharedChoice(policy, 1)
    for cuts in ([70], [13, 1, 40, 16]):
        rankings = [choice.ranking(*row) for row in zip(lengths.tolist(), first.tolist(), strict=True)]
        for row, ranking in enumerate(rankings):
            for at, part in zip((0, *itertools.accumulate(cuts)), logits[row].split(cuts, 1), strict=False):
                ranking.add(part, at)
        choice.choose_ranked(rankings, lengths, first)
        again = choice.of(0, 70)
        assert again is not None
        assert [set(x[0].tolist()) for x in again] == [set(x[0].tolist()) for x in found], "part by part"
    for row, (length, begin) in enumerate(zip(lengths.tolist(), first.tolist(), strict=True)):
        ranked = int(budget * (1 - recent))
        newest = budget - ranked
        head = sinks if newest >= sinks else 0
        tail = newest - head
        kept = [p for p in range(begin, begin + head) if p < length - tail]
        kept += range(max(begin, length - tail), length)
        middle = range(begin + head, max(begin + head, length - tail))
        orders = [sorted(middle, key=lambda p: -float(logits[row, h, p])) for h in range(4)]
        best: list[int] = []
        for turn in range(len(middle)):
            for order in orders:
                if order[turn] not in best and len(best) < ranked:
                    best.append(order[turn])
        got = found[row, 0].tolist()
        assert sorted(p for p in got if p >= 0) == sorted(kept + best)


def test_of_equal_logits_the_first_are_ranked_however_they_come() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0, 2.0, 2.0, float("-inf"), -0.5, 2.0, 0.0, 3.0, -2.0]])
    for cuts in ([11], [4, 4, 3], [1] * 11):
        ranking = Ranking(4, 0, 11)
        for at, part in zip((0, *itertools.accumulate(cuts)), logits.split(cuts, 1), strict=False):
            ranking.add(part, at)
        assert ranking.order().tolist() == [[9, 1, 3, 4]]
    ranking = Ranking(20, 1, 9)
    ranking.add(logits, 0)
    assert ranking.order().tolist() == [[1, 3, 4, 7, 8, 6, 2, 5]], "within its bounds alone"


def test_a_choice_of_another_step_is_refused() -> None:
    choice = SharedChoice(LessIsMoreKV(budget=4, select_layers=(1,)), LAYERS)
    choice.choose(torch.randn(1, 4, 30), torch.tensor([30]), None)
    assert choice.of(2, 30) is not None
    assert choice.of(0, 30) is None
    with pytest.raises(OptionError, match="layer 2: no layer before it chose"):
        choice.of(2, 31)


class Faulty(FileIO):
    """Fails where it is told to."""

    fail = ""

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        if self.fail == "short":
            return 0
        done = super().pread(fd, buffer, offset)
        if self.fail == "damage":
            buffer[100] ^= 1
        return done

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        if self.fail == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwrite(fd, buffer, offset)


@pytest.mark.parametrize(
    ("fault", "said"), [("full", "the disk is full"), ("short", "short, 0 of"), ("damage", "checksum")]
)
def test_a_fault_is_an_error_and_never_a_token(
    fault: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = Faulty()
    monkeypatch.setattr("tilewright.runtime.kv_store.extents.FileIO", lambda: io)
    model, given = make_model(), prompts(1)
    want = generate(model, given)
    with tw.kv_cache(model, offload(3, tmp_path)) as cache:
        io.fail = fault
        with pytest.raises(ExtentError, match=said):
            generate(model, given, past_key_values=cache)
        io.fail = ""
        cache.reset()
        assert torch.equal(generate(model, given, past_key_values=cache), want)


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("offload-kv{fast_bytes=4KiB}", "fast_bytes"),
        ("offload-kv{fast_bytes=lots}", "expected an integer"),
        ("offload-kv{tier=tape}", "tier"),
        ("offload-kv,offload-kv", "one pass at most"),
        ("offload-kv,quest-kv", "too late to read from a slow tier"),
        ("lessismore-kv{budget=0}", "expected 1 token or more"),
        ("lessismore-kv{recent=1.5}", "expected 0 to 1"),
        ("lessismore-kv{select_layers=2x1}", "ascending"),
        ("lessismore-kv{select_layers=1x9}", "the model has layers 0 to 3"),
    ],
)
def test_bad_input(pipeline: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        tw.kv_cache(make_model(), pipeline)


def test_an_extent_larger_than_the_fast_tier_and_beams(tmp_path: Path) -> None:
    model, given = make_model(), prompts(1)
    small = offload(1, tmp_path, fast_bytes=4100, extent_bytes=4097)
    for pipeline, beams, said in (
        (small, 1, "an extent of this model has"),
        (offload(3, tmp_path), 2, "cannot be reordered or repeated"),
    ):
        with tw.kv_cache(model, pipeline) as cache, pytest.raises(OptionError, match=said):
            generate(model, given, past_key_values=cache, num_beams=beams)


def test_sessions_leave_nothing_behind(tmp_path: Path) -> None:
    model, given = make_model(), prompts(1, 40)
    handles = Path("/proc/self/fd")
    counts = []
    for _ in range(12):
        with tw.kv_cache(model, offload(2, tmp_path)) as cache:
            generate(model, given, 2, past_key_values=cache)
        counts.append(len(list(handles.iterdir())))
    assert counts[-1] <= counts[2]
    assert not list((tmp_path / "kv").iterdir())


def test_tokens_taken_back_leave_no_trace(tmp_path: Path) -> None:
    model, ids = make_model(), prompts(1, 120)["input_ids"]
    with torch.no_grad(), tw.kv_cache(model, offload(2, tmp_path)) as cache:
        model(ids, past_key_values=cache, use_cache=True)
        held = cache.nbytes
        cache.crop(-50)
        assert cache.get_seq_length() == 70
        assert cache.nbytes < held
        again = model(ids[:, 70:], past_key_values=cache, use_cache=True).logits
        assert cache.nbytes == held
        want = model(ids).logits[:, 70:]
    torch.testing.assert_close(again, want, rtol=0, atol=1e-4)
