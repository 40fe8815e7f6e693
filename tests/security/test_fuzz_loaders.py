"""S7: hostile files give one LoadError (or load), within a second and without eating memory.

The mutators know the formats: they lie in lengths, counts, offsets and nesting, cut, splice and flip, and
keep the rest of the file right, so that the fault is met deep inside. 2,000 cases quick, 40,000 slow.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tilewright.compiler.diagnostics import LoadError, TilewrightError
from tilewright.frontends.gguf_check import check_gguf
from tilewright.frontends.loaders import resolve
from tilewright.frontends.model_files import read_json_object
from tilewright.frontends.safetensors_check import check_safetensors, check_weights_folder

EDGES = [
    0,
    1,
    2,
    7,
    8,
    31,
    127,
    128,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63,
    2**64 - 1,
]
WORDS = [
    "", "\0", "../../etc/passwd", "/dev/zero", "A" * 5000, "%s%n", "{0}", "\u202e", "'; rm -rf /",
    "__class__", "\ud800", "NaN", "nan", "-1", "torch.nn.Linear", "a\nb", "\x1b[2J",
]  # fmt: skip
SECONDS = 1.0
MEMORY = 512 << 20
LINE = (20_000, 1500)
"""Characters of an error: what the user typed may be echoed whole, what a file holds may not."""


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few changed bytes, mostly near the start, where the structure is."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        reach = len(out) if rng.random() < 0.4 else min(len(out), 800)
        out[rng.randrange(reach)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(out)


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece cut out, doubled, moved or replaced by noise."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    piece = data[a:b]
    return rng.choice(
        [data[:a], data[a:], data[:a] + data[b:], data[:b] + piece + data[b:], data + piece, piece, b"",
         data[:a] + rng.randbytes(min(len(piece), 300)) + data[b:]]
    )  # fmt: skip


def lie(data: bytes, rng: random.Random) -> bytes:
    """An 8- or 4-byte integer overwritten by an edge value at a likely place."""
    width = rng.choice([4, 8, 8])
    if len(data) < width + 4:
        return data + b"\xff" * width
    at = rng.randrange(min(len(data) - width, 1200))
    value = rng.choice(EDGES) % 256**width
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def mutate(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice([flip, splice, lie, lie])(data or b"\0", rng)
    return data


def value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value nobody expects."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(EDGES) * rng.choice([1, -1]),
        lambda: rng.choice([None, True, False, 0.5, -1e308, 1e-320]),
        lambda: rng.choice(WORDS),
    ]
    if depth < 3:
        kinds += [lambda: [value(rng, depth + 1) for _ in range(rng.randrange(4))]]
        kinds += [lambda: {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(3))}]
    return rng.choice(kinds)()


def mutate_json(data: Any, rng: random.Random) -> Any:
    """One place of a JSON tree replaced, dropped, renamed or added."""
    if isinstance(data, dict) and data and rng.random() < 0.9:
        key = rng.choice(list(data))
        out = dict(data)
        choice = rng.randrange(6)
        if choice == 0:
            del out[key]
        elif choice == 1:
            out[rng.choice(WORDS)] = out.pop(key)
        elif choice == 2:
            out[rng.choice(WORDS)] = value(rng)
        else:
            out[key] = mutate_json(out[key], rng)
        return out
    if isinstance(data, list) and data and rng.random() < 0.7:
        at = rng.randrange(len(data))
        return data[:at] + [mutate_json(data[at], rng)] + data[at + 1 :]
    return value(rng)


def json_bytes(data: Any, rng: random.Random) -> bytes:
    """The text of a mutated tree, sometimes damaged as text too."""
    text = json.dumps(data).encode()
    return mutate(text, rng) if rng.random() < 0.25 else text


class Targets:
    """One fuzzed file per call: writes a mutant and hands it to the code that must survive it."""

    def __init__(self, folder: Path, samples: Any) -> None:
        self.folder, self.samples = folder, samples
        self.model, self.plain = samples.folder(folder / "model"), samples.folder(folder / "plain")
        self.shards = samples.sharded(folder / "shards")
        self.config = json.loads((self.model / "config.json").read_text())
        self.index = json.loads((self.shards / "model.safetensors.index.json").read_text())

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def gguf(self, rng: random.Random) -> None:
        check_gguf(self.write("m.gguf", mutate(self.samples.gguf, rng)))

    def gguf_model(self, rng: random.Random) -> None:
        """The whole way through transformers: mutants whose structure is right and whose numbers lie."""
        path = self.folder / "m.gguf"
        while True:
            path.write_bytes(mutate(self.samples.gguf, rng))
            try:
                check_gguf(path)
            except LoadError:
                continue
            resolve(str(path))
            return

    def tokenizer(self, rng: random.Random) -> None:
        from tokenizers import Tokenizer, models

        made = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())
        made["added_tokens"] = [{"id": 3, "content": "<s>", "special": True, "normalized": False}]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "model_max_length": 32}
        which = rng.random() < 0.6
        for name, tree, hit in (("tokenizer", made, which), ("tokenizer_config", config, not which)):
            text = json_bytes(mutate_json(tree, rng), rng) if hit else json.dumps(tree).encode()
            self.write(f"plain/{name}.json", text)
        resolve(str(self.plain))

    def safetensors(self, rng: random.Random) -> None:
        data = self.samples.safetensors
        if rng.random() < 0.5:
            data = mutate(data, rng)
        else:
            length = struct.unpack("<Q", data[:8])[0]
            header = json_bytes(mutate_json(json.loads(data[8 : 8 + length]), rng), rng)
            data = struct.pack("<Q", len(header)) + header + data[8 + length :]
        check_safetensors(self.write("m.safetensors", data))

    def index_file(self, rng: random.Random) -> None:
        self.write("shards/model.safetensors.index.json", json_bytes(mutate_json(self.index, rng), rng))
        check_weights_folder(self.shards)

    def json_text(self, rng: random.Random) -> None:
        read_json_object(self.write("x.json", json_bytes(mutate_json(self.config, rng), rng)))

    def onnx(self, rng: random.Random) -> None:
        resolve(str(self.write("m.onnx", mutate(self.samples.onnx, rng))))

    def pt2(self, rng: random.Random) -> None:
        resolve(str(self.write("m.pt2", mutate(self.samples.pt2, rng))))

    def name(self, rng: random.Random) -> None:
        resolve(rng.choice(WORDS) + rng.choice(["", ".gguf", ":f", "/x", ".onnx", "smollm"]))

    def folder_config(self, rng: random.Random) -> None:
        """The whole way through transformers, on a one-layer model."""
        self.write("model/config.json", json_bytes(mutate_json(self.config, rng), rng))
        resolve(str(self.model))

    def pipeline_text(self, rng: random.Random) -> None:
        from tilewright.compiler.pipeline import Pipeline

        text = "match-rms-norm,fold-constants{a=1,b=2x3}"
        pieces = [*"{}=,:x\"'\\\n ", "match-", "=1", "{", "}", *WORDS]
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(pieces) + text[at + rng.randrange(3) :]
        Pipeline.parse(text)


CASES = {
    "gguf": 480, "safetensors": 480, "index_file": 150, "json_text": 200, "onnx": 150, "pt2": 150, "name": 50,
    "folder_config": 100, "pipeline_text": 150, "gguf_model": 40, "tokenizer": 50,
}  # fmt: skip
MOST_ARE_BAD = {"gguf", "safetensors", "index_file", "onnx", "pt2", "name"}


def attack(name: str, count: int, targets: Targets) -> None:
    rng = random.Random(f"fuzz-{name}")
    run = getattr(targets, name)
    refused = 0
    for case in range(count):
        seed = rng.getrandbits(64)
        start = time.process_time()
        try:
            run(random.Random(seed))
            line = ""
        except TilewrightError as error:
            refused += 1
            line = str(error)
        except BaseException as error:
            raise AssertionError(
                f"case {case} of {name} (seed {seed}) raised {type(error).__name__}"
            ) from error
        assert line.isprintable(), f"case {case} of {name} (seed {seed}): {line!a}"
        assert len(line) < LINE[name != "pipeline_text"], f"case {case} of {name} (seed {seed}): {line[:200]}"
        assert time.process_time() - start < SECONDS, f"case {case} of {name} (seed {seed}) took too long"
    if name in MOST_ARE_BAD:
        assert refused > count // 2, f"only {refused} of {count} mutants were refused: the mutator is blunt"


def run_all(tmp_path: Path, samples: Any, factor: int) -> None:
    targets = Targets(tmp_path, samples)
    resolve(str(targets.model))  # imports, outside of the measured part
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, count in CASES.items():
        attack(name, count * factor, targets)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"peak memory grew by {grown >> 20} MiB"


@pytest.mark.timeout(300)
def test_two_thousand_hostile_files(tmp_path, samples):
    assert sum(CASES.values()) == 2000
    run_all(tmp_path, samples, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_thousand_hostile_files(tmp_path, samples):
    run_all(tmp_path, samples, 20)
