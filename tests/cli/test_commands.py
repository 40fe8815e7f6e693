"""Each command does its job on a small model, in text and as JSON."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewright.frontends.cli import ANSWER_IS_NO, COMMANDS, OK, main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert code in (OK, ANSWER_IS_NO), err
    return code, out


def test_help_is_fast_and_names_every_command() -> None:
    def once() -> tuple[float, str]:
        started = time.process_time(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from tilewright.frontends.cli import main; main(['--help'])\n"
             "assert 'torch' not in sys.modules"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return time.perf_counter() - started[1], done.stdout

    _, out = once()
    assert all(name in out for name in COMMANDS)


def test_passes_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, "passes", "--json")
    data = json.loads(out)
    names = {p["name"] for p in data["passes"]}
    assert {"fuse-add-rmsnorm", "match-attention", "fold-norm-scale"} <= names
    _, out = run(capsys, "passes", "gqa-unrepeat")
    assert "option form" in out
    _, out = run(capsys, "passes", "cpu-int4")
    lines = out.splitlines()
    assert lines[0] == "gqa-unrepeat"
    assert "quantize-linear{weight=int4,group=32,mode=float-zero,activation=int8-group}" in lines


def test_explain_writes_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    _, out = run(
        capsys, "explain", "tiny-llama", "--html", str(page), "--json", "--error", "--require", "attention=2"
    )
    data = json.loads(out)
    applied = {p["name"]: len(p["applied"]) for p in data["passes"]}
    assert applied["match-attention"] == 2
    assert data["errors"]["tilewright"] <= 4 * data["errors"]["eager"] + 1e-6
    assert page.stat().st_size < 5_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_why_names_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, "why", "fuse-add-rmsnorm", "model.layers.0.input_layernorm", "tiny-llama")
    assert "embedding" in out


def test_run_generates_the_same_text_as_eager(capsys: pytest.CaptureFixture[str]) -> None:
    _, ours = run(capsys, "run", "tiny-llama", "--tokens", "5", "--json")
    _, eager = run(capsys, "run", "tiny-llama", "--tokens", "5", "--json", "--eager")
    assert json.loads(ours)["text"] == json.loads(eager)["text"]
    assert json.loads(ours)["applied"]["fuse-projections"] > 0


def test_evaluate_has_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, "evaluate", "tiny-llama", "--items", "2", "--length", "16", "--json")
    data = json.loads(out)
    assert data["measure"] == "perplexity"
    assert abs(data["ratio"] - 1) < 1e-4


def test_bisect_agrees_on_the_exact_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "bisect", "tiny-llama", "--length", "8", "--json")
    assert code == OK
    assert json.loads(out) == {"culprit": None}


def test_new_pass_is_green_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    from tilewright.compiler.selftest import selftest

    _, out = run(capsys, "new-pass", "drop-twice", "--folder", str(tmp_path), "--json")
    path = Path(json.loads(out)["path"])
    spec = importlib.util.spec_from_file_location("drop_twice", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["drop_twice"] = module
    spec.loader.exec_module(module)
    selftest(module.DropTwice)


def test_kernels_cache_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, "kernels", "--json")
    assert {"rms_norm", "linear"} <= {row["op"] for row in json.loads(out)}
    _, out = run(capsys, "cache", "--json")
    assert json.loads(out)["entries"] >= 0
    code, out = run(capsys, "cache", "verify", "--json")
    assert code == OK, out
    _, out = run(capsys, "doctor", "--json")
    assert {"python", "torch", "C++ compiler"} <= {c["what"] for c in json.loads(out)["checks"]}


def test_completion_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "bash"]) == OK
    assert "explain" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_compares_memory_in_fresh_processes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--memory", "--against", "eager", "--rounds", "1", "--json")
    code, out = run(capsys, "bench", "tiny-llama", *flags)
    data = json.loads(out)
    assert code == OK
    assert data["baseline"] == "eager"
    assert set(data["sides"]) == {"tilewright", "eager"}
    for side in data["sides"].values():
        assert 2**26 < side["peak_bytes_of_calls"] <= 1.01 * side["peak_bytes_with_compilation"] < 2**34
    # Compiling imports a compiler; eager does not.
    assert data["ratio"] > 1


def test_run_through_a_cache_within_a_bound(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    placed = f"offload-kv{{fast_bytes=8KiB,extent_bytes=4KiB,folder={tmp_path}/kv}}"
    pipeline = f"{placed},lessismore-kv{{budget=6}}"
    code, out = run(capsys, "run", "tiny-llama", "--tokens", "40", "--pipeline", pipeline, "--json")
    data = json.loads(out)
    assert code == OK
    assert data["new_tokens"] == 40
    assert data["cache"]["resident_bytes"] <= 8192 < data["cache"]["held_bytes"]
    assert data["cache"]["bytes_read"] > 0
    few = "spec-cache-kv{group=8,residual=8,budget=2}"
    code, out = run(capsys, "run", "tiny-llama", "--tokens", "40", "--pipeline", few, "--json")
    data = json.loads(out)
    assert code == OK
    assert data["new_tokens"] == 40
    assert 0 < data["cache"]["resident_bytes"] < data["cache"]["held_bytes"]
    assert run(capsys, "run", "tiny-llama", "--tokens", "30", "--pipeline", few)[1].count("fetches came late")
    assert main(["run", "tiny-llama", "--tokens", "2", "--pipeline", f"cpu-int4,{pipeline}"]) == 2
    assert "guides a cache, the others a compiled graph" in capsys.readouterr().err
