"""The bench of engines side by side: what it refuses, what it says of engines that are missing, turns and
tables; and the process that answers for llama.cpp, with a stand-in for its library."""

from __future__ import annotations

import importlib.util
import stat
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.tools import bench_peers
from tilewright.tools.bench_peers import Case, Times, main, sides_of, table, taking_turns, torch_side
from tilewright.tools.llama_peer import Llama, requantized, version_of

LIBRARY = """
import sys
from types import SimpleNamespace

__version__ = "0.0.stand-in"
LLAMA_FTYPE_MOSTLY_Q4_0 = 2


class Llama:
    def __init__(self, path, n_ctx, n_threads, type_k, **_):
        if "broken" in path:
            sys.exit("cannot read that file")
        self.ctx, self.n_tokens, self.seen = self, 0, [0] * n_ctx
        self.first = n_threads * 10 + type_k

    def n_vocab(self):
        return 97

    def eval(self, tokens):
        for token in tokens:
            self.seen[self.n_tokens] = token
            self.n_tokens += 1


def llama_get_logits_ith(model, _):
    best = (model.first + sum(model.seen[: model.n_tokens])) % 97
    return [float(i == best) for i in range(97)] + [2.0]


class Params(__import__("ctypes").Structure):
    _fields_ = [(n, __import__("ctypes").c_int) for n in ("ftype", "allow_requantize")]


def llama_model_quantize_default_params():
    return Params()


def llama_model_quantize(source, target, _):
    if b"broken" in source:
        return 1
    with open(target, "wb") as file:
        file.write(b"q4_0 of " + source)
    return 0
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that has a stand-in for llama-cpp-python: the answer is a sum of what it was given."""
    (tmp_path / "llama_cpp.py").write_text(LIBRARY)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.fixture
def llama(python: str) -> Iterator[Llama]:
    made = Llama(python, Path("some.gguf"), capacity=16, threads=2, wide_cache=False)
    yield made
    made.close()


def test_the_process_answers_line_by_line_and_keeps_what_lies_before_the_start(llama: Llama) -> None:
    seconds, token = llama.run([3, 4, 5], 0)
    assert token == 21 + 12
    assert seconds >= 0.0
    assert llama.run([7], 3)[1] == 21 + 12 + 7
    assert llama.run([1], 2)[1] == 21 + 3 + 4 + 1, "what was at 2 and behind it is gone"


def test_the_width_of_the_cache_reaches_the_library(python: str) -> None:
    wide = Llama(python, Path("some.gguf"), capacity=16, threads=2, wide_cache=True)
    assert wide.run([3], 0)[1] == 20 + 3
    wide.close()


def test_a_process_that_ends_gives_its_last_words(python: str) -> None:
    with pytest.raises(RuntimeError, match="llama.cpp ended: cannot read that file"):
        Llama(python, Path("broken.gguf"), capacity=16, threads=1, wide_cache=False)


def test_the_library_writes_the_other_format_or_says_that_it_cannot(python: str, tmp_path: Path) -> None:
    requantized(python, Path("some.gguf"), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"q4_0 of some.gguf"
    with pytest.raises(Exception, match="exit status 1"):
        requantized(python, Path("broken.gguf"), tmp_path / "out.gguf")


def test_the_version_is_that_of_the_interpreter_given(python: str, tmp_path: Path) -> None:
    assert version_of(python) == "0.0.stand-in"
    assert version_of(str(tmp_path / "nothing")) is None


def test_a_peer_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(bench_peers, "eager_side", lambda _: "eager")
    monkeypatch.setattr(bench_peers, "tilewright_side", lambda *_: "ours")
    monkeypatch.setattr(bench_peers, "exported", lambda _, folder: folder)
    monkeypatch.setattr(bench_peers, "package_side", lambda folder: folder.name)
    nowhere = str(tmp_path / "python")
    given = {"pipeline": "cpu-int4", "llama_python": nowhere, "threads": 1, "package": None}
    with ExitStack() as stack:
        found = sides_of(Namespace(side=None, **given), None, tmp_path, stack)
        assert list(found) == ["eager", "tilewright", "tilewright package"]
        said = capsys.readouterr().out
        assert "onnxruntime int4: not installed (onnxruntime, onnx)" in said
        assert f"llama.cpp: {nowhere} has no llama-cpp-python; --llama-python names one that has" in said
        assert list(sides_of(Namespace(side=["eager"], **given), None, tmp_path, stack)) == ["eager"]
        with pytest.raises(SystemExit, match="--side 'llama.cpp Q4_1': not installed"):
            sides_of(Namespace(side=["eager", "llama.cpp Q4_1"], **given), None, tmp_path, stack)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--side", "pytorch"], "argument --side: invalid choice: 'pytorch'"),
        (["--case", "decode-7"], "argument --case: invalid choice: 'decode-7'"),
        (["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["--threads", "-2"], "--threads -2: expected 1 or more"),
    ],
)
def test_what_lies_out_of_range_is_refused_before_a_model_is_read(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peers, "resolve", lambda _: pytest.fail("a model was read"))
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_sides_take_turns_and_what_is_held_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "PAUSE", 0.0)
    calls: list[tuple[str, int, int]] = []

    def side(name: str) -> Any:
        def run(tokens: torch.Tensor, start: int) -> tuple[float, int]:
            calls.append((name, tokens.shape[1], start))
            return float(len(calls)), 5

        return run

    found = taking_turns({"a": side("a"), "b": side("b")}, Case(4, 1, 2), 2)
    once, step = [("a", 4, 0)], [("a", 1, 4)]
    other = [("b", n, s) for _, n, s in once + step * 2]
    turn = step * 2 + [("b", 1, 4)] * 2
    assert calls == once + step * 2 + other + turn * 2
    assert found["a"].seconds == [7.0, 8.0, 11.0, 12.0]
    assert (found["a"].least, found["a"].median) == (7.0, 9.5)


def test_the_table_gives_how_many_times_as_fast_ours_is(capsys: pytest.CaptureFixture[str]) -> None:
    table("decode-0", {"eager": Times(3, [0.04, 0.05]), "tilewright": Times(3, [0.01, 0.02])})
    said = capsys.readouterr().out
    assert "tilewright is  4.00x as fast,  3.00x by medians  next token 3" in said


def test_a_cache_is_set_back_to_the_start_of_a_call() -> None:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    tokens = bench_peers.some_tokens(6)
    with torch.no_grad():
        want = int(module(tokens).logits[0, -1].argmax())
    for cache in (StaticCache(config=config, max_cache_len=8), DynamicCache(config=config)):
        run = torch_side(module, module.forward, cache)
        run(tokens[:, :5], 0)
        for _ in range(2):
            assert run(tokens[:, 5:], 5)[1] == want
            assert int(cache.get_seq_length()) == 6


def test_whole_texts_are_timed_by_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself stands for its package: the same tokens, and nothing of it is changed."""
    from tilewright.frontends.loaders import resolve

    module: Any = resolve("tiny-llama").module
    monkeypatch.setattr(bench_peers, "some_tokens", lambda count: torch.arange(3, 3 + count)[None])
    monkeypatch.setattr(bench_peers.tw, "load_language_model", lambda folder: module, raising=False)
    plain = module.forward
    found = bench_peers.generating(module, "exact", Path("made"), ["eager", "tilewright package"], 4, 2)
    assert list(found) == ["eager", "tilewright package"]
    assert len({times.token for times in found.values()}) == 1
    assert [len(times.seconds) for times in found.values()] == [2, 2]
    assert list(bench_peers.generating(module, "exact", Path("made"), ["eager"], 2, 1)) == ["eager"]
    assert module.forward == plain
