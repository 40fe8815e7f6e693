"""llama.cpp as a process of its own, asked by JSON lines; this file is also what the process runs.

The interpreter that has `llama-cpp-python` may be another than the one with torch, so the second half of this
file imports nothing else. One request is a list of tokens and the position of the first; the answer holds
the seconds that llama.cpp took and the token it ranks first.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def version_of(python: str) -> str | None:
    """Version of llama-cpp-python in that interpreter, None where it cannot be imported."""
    code = "import llama_cpp; print(llama_cpp.__version__)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def requantized(python: str, source: Path, target: Path) -> None:
    """Writes a gguf file in llama.cpp's Q4_0, from one in any of its formats."""
    subprocess.run(
        [python, __file__, "quantize", str(source), str(target)], check=True, capture_output=True, text=True
    )


class Llama:
    """One model in a process of its own. RuntimeError with the process's last words when it ends early."""

    def __init__(self, python: str, path: Path, *, capacity: int, threads: int, wide_cache: bool) -> None:
        words = [python, __file__, "serve", str(path), str(capacity), str(threads), str(int(wide_cache))]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "opened as a pipe"
        line = self._process.stdout.readline()
        if not line:
            said = self._process.communicate()[1].strip().splitlines()
            raise RuntimeError(f"llama.cpp ended: {said[-1] if said else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, tokens: list[int], start: int) -> tuple[float, int]:
        """(seconds, most likely next token) of tokens at positions from `start` on; what lies before stays
        as earlier calls left it."""
        assert self._process.stdin is not None, "opened as a pipe"
        self._process.stdin.write(json.dumps({"tokens": tokens, "start": start}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["token"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def _quantize(source: str, target: str) -> None:
    lib = importlib.import_module("llama_cpp")
    given = lib.llama_model_quantize_default_params()
    given.ftype, given.allow_requantize = lib.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(given)):
        sys.exit(f"{source} was not quantized")


def _serve(path: str, capacity: int, threads: int, wide_cache: int) -> None:
    lib = importlib.import_module("llama_cpp")
    kind = 0 if wide_cache else 1  # ggml's float32 and float16
    model = lib.Llama(
        path, n_ctx=capacity, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
        type_k=kind, type_v=kind, verbose=False,
    )  # fmt: skip
    vocabulary = model.n_vocab()
    print(json.dumps({"vocabulary": vocabulary}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        model.n_tokens = asked["start"]
        started = time.perf_counter()
        model.eval(asked["tokens"])
        seconds = time.perf_counter() - started
        logits = lib.llama_get_logits_ith(model.ctx, -1)[:vocabulary]
        print(json.dumps({"seconds": seconds, "token": logits.index(max(logits))}), flush=True)


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    if command == "quantize":
        _quantize(given[0], given[1])
    else:
        _serve(given[0], *map(int, given[1:]))
