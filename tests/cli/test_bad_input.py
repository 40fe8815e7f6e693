"""Bad input: one clear line on stderr, exit 2, nothing half-written. At least 60 cases."""

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest

from tilewright.frontends.cli import BAD_INPUT, main

GGUF_MAGIC = b"GGUF"


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of broken model files."""
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "short.gguf").write_bytes(GGUF_MAGIC + b"\x03\0\0\0")
    (tmp_path / "magic.gguf").write_bytes(b"GGML" + b"\0" * 64)
    (tmp_path / "version.gguf").write_bytes(GGUF_MAGIC + struct.pack("<IQQ", 99, 0, 0))
    (tmp_path / "many.gguf").write_bytes(GGUF_MAGIC + struct.pack("<IQQ", 3, 1 << 62, 1))
    (tmp_path / "string.gguf").write_bytes(GGUF_MAGIC + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + b"x" * 9)
    (tmp_path / "not.onnx").write_bytes(b"hello, this is no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "not.pt2").write_bytes(b"PK not really")
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as z:
        z.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch canary'\ntR.")
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    for name, payload in {
        "empty": b"",
        "short": b"\x10\0\0",
        "lying": struct.pack("<Q", 1 << 62) + b"{}",
        "json": safetensors(b"{not json"),
        "offsets": safetensors({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}, b"\0" * 16),
        "dtype": safetensors({"w": {"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
        "negative": safetensors({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, b"\0" * 16),
        "overflow": safetensors(
            {"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}}, b"\0" * 16
        ),
    }.items():
        folder = tmp_path / f"hf-{name}"
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
        )
        (folder / "model.safetensors").write_bytes(payload)
    (tmp_path / "hf-none").mkdir()
    (tmp_path / "hf-config").mkdir()
    (tmp_path / "hf-config" / "config.json").write_text("{")
    (tmp_path / "hf-pickle").mkdir()
    (tmp_path / "hf-pickle" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "hf-pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    os.symlink("/etc/hostname", tmp_path / "link.gguf")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff\xfe")
    return tmp_path


OPTION_CASES = [
    (["explain"], "MODEL"),
    (["frobnicate"], "invalid choice"),
    (["explain", "tiny-llama", "--pipelin=exact", "--frob"], "unrecognized"),
    (["explain", "tiny-lama"], "did you mean 'tiny-llama'"),
    (["explain", ""], "not a model"),
    (["explain", "tiny-llama", "--pipeline", "fuse-add-rmsnrm"], "did you mean 'fuse-add-rmsnorm'"),
    (["explain", "tiny-llama", "--pipeline", "exact{x=1}"], "takes no options"),
    (["explain", "tiny-llama", "--pipeline", "exact,"], "ends with ','"),
    (["explain", "tiny-llama", "--pipeline", "fold-constants{max_elements"], "never closed"),
    (["explain", "tiny-llama", "--pipeline", "fold-constants{max_elements}"], "option=value"),
    (["explain", "tiny-llama", "--pipeline", "fold-constants{max_elements=}"], "option=value"),
    (["explain", "tiny-llama", "--pipeline", "fold-constants{max_elements=a}"], "an integer"),
    (["explain", "tiny-llama", "--pipeline", "fold-constants{max_elements=1.5}"], "an integer"),
    (["explain", "tiny-llama", "--pipeline", "fold-constants{max_elements=-1}"], "at least 1"),
    (["explain", "tiny-llama", "--pipeline", "fold-constants{max_elements=1,max_elements=2}"], "twice"),
    (["explain", "tiny-llama", "--pipeline", "fold-constants{max_elemnts=1}"], "did you mean 'max_elements'"),
    (["explain", "tiny-llama", "--pipeline", "gqa-unrepeat{form=fast}"], "one of auto, gqa, packed"),
    (["explain", "tiny-llama", "--pipeline", "fuse-add-rmsnorm,dead-code"], "put dead-code before"),
    (["explain", "tiny-llama", "--pipeline", "Dead-Code"], "expected a pass name at column 1"),
    (["explain", "tiny-llama", "--pipeline", "dead-code;exact"], "expected ','"),
    (["explain", "tiny-llama", "--pipeline", "dead-code}"], "expected ','"),
    (["explain", "tiny-llama", "--pipeline", "{}"], "column 1"),
    (["explain", "tiny-llama", "--pipeline", "x" * 200_000], "at most 100000"),
    (["explain", "tiny-llama", "--call", "prefil"], "did you mean 'prefill'"),
    (["explain", "tiny-llama", "--length", "0"], "length is 0"),
    (["explain", "tiny-llama", "--length", "-3"], "length is -3"),
    (["explain", "tiny-llama", "--length", "many"], "invalid int"),
    (["explain", "tiny-llama", "--length", "99999999"], "length is 99999999"),
    (["explain", "tiny-llama", "--fact", "video_grid"], "NAME=VALUE"),
    (["explain", "tiny-llama", "--fact", "=3"], "NAME=VALUE"),
    (["explain", "tiny-llama", "--fact", "video_gird=1x2x3"], "video_grid"),
    (["explain", "tiny-llama", "--require", "attention"], "NAME=VALUE"),
    (["explain", "tiny-llama", "--require", "attention=lots"], "whole number"),
    (["explain", "tiny-llama", "--require", "attention=99"], "99 required"),
    (["explain", "tiny-llama", "--html", "/nonexistent/folder/x.html"], "/nonexistent/folder"),
    (["explain", "tiny-llama", "--html", "/proc/x.html"], "/proc"),
    (["why", "match-atention", "x", "tiny-llama"], "did you mean 'match-attention'"),
    (["why", "match-attention"], "NODE"),
    (["run", "tiny-llama", "--tokens", "0"], "expected 1 to 4096"),
    (["run", "tiny-llama", "--tokens", "5000"], "expected 1 to 4096"),
    (["bench", "tiny-llama", "--against", "tensorrt"], "eager, inductor"),
    (["bench", "tiny-llama", "--rounds", "0"], "1 to 10000"),
    (["evaluate", "tiny-llama", "--items", "0"], "1 to 100000"),
    (["evaluate", "tiny-llama", "--text", "/nonexistent.txt"], "/nonexistent.txt"),
    (["evaluate", "tiny-llama", "--text", "{files}/latin.txt"], "not UTF-8"),
    (["bisect", "tiny-llama", "--tolerance", "2"], "between 0 and 1"),
    (["bisect", "tiny-llama", "--tolerance", "nan"], "between 0 and 1"),
    (["kernels", "rms_nrm"], "did you mean 'rms_norm'"),
    (["cache", "explode"], "one of where"),
    (["cache", "why-miss"], "JSON object"),
    (["cache", "why-miss", "[1]"], "JSON object"),
    (["new-pass", "Bad_Name"], "kebab-case"),
    (["new-pass", "dead-code"], "exists already"),
    (["new-pass", "try-something", "--folder", "/nonexistent/here"], "cannot be written"),
    (["passes", "dead-cod"], "did you mean 'dead-code'"),
    (["--print-completion", "fish-shell"], "expected one of"),
]

FILE_CASES = [
    "empty.gguf",
    "short.gguf",
    "magic.gguf",
    "version.gguf",
    "many.gguf",
    "string.gguf",
    "link.gguf",
    "absent.gguf",
    "not.onnx",
    "empty.onnx",
    "not.pt2",
    "zip.pt2",
    "model.bin",
    "hf-empty",
    "hf-short",
    "hf-lying",
    "hf-json",
    "hf-offsets",
    "hf-dtype",
    "hf-negative",
    "hf-overflow",
    "hf-none",
    "hf-config",
    "hf-pickle",
]
FACTORY_CASES = ["nopackage:model", "json:nothing", "json:dumps", "json:__all__", "os:getcwd", "a:b:c"]


def one_line(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    code = main(argv)
    out, err = capsys.readouterr()
    assert code == BAD_INPUT, (out, err)
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_there_are_sixty_cases() -> None:
    assert len(OPTION_CASES) + len(FILE_CASES) + len(FACTORY_CASES) >= 60


@pytest.mark.parametrize(
    ("argv", "text"), OPTION_CASES, ids=lambda v: None if isinstance(v, str) else " ".join(v)[:60]
)
def test_options(argv: list[str], text: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in one_line(capsys, [a.replace("{files}", str(files)) for a in argv])


@pytest.mark.parametrize("name", FILE_CASES)
def test_files(name: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in files.rglob("*"))
    line = one_line(capsys, ["explain", str(files / name)])
    assert name in line
    assert sorted(p.name for p in files.rglob("*")) == before


@pytest.mark.parametrize("name", FACTORY_CASES)
def test_factories(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name.split(":")[0] in one_line(capsys, ["explain", name])
