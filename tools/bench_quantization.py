"""Time and peak memory of quantizing a model behind a rotation: by rounding to nearest, and by GPTQ with its
calibration.

Each step runs in a process of its own, which reads the model first; times are without that. The peak is the
most that was resident of the whole process, pages of files included while they are in it; "above" is that
less what was resident before the model was loaded, when torch and this package were. Both are given over the
model's weights in float32.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import tilewright
from tilewright.compiler.paging import SCRATCH
from tilewright.compiler.pipeline import Pipeline
from tilewright.frontends.calibration import calibrate, token_windows
from tilewright.frontends.loaded_model import Call, LoadedModel
from tilewright.frontends.loaders import resolve

STEPS = ("rtn", "calibrate", "gptq")
SECONDS = {"rtn": 20.0, "gptq": 240.0}
"""At most; GPTQ's with its calibration."""
MEMORY = 2.5
"""The peak over the weights in float32, at most."""
_MIB = 1 << 20
_TOKENS = 32
"""Of the call that the model is quantized on."""


def resident(row: str = "VmRSS") -> int:
    """Bytes of this process in memory; `VmHWM`: the most there were."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{row}:")).split()[1]) << 10


def samples(model: LoadedModel, given: argparse.Namespace) -> tuple[list[Call], str]:
    """Windows of the source of a module of the standard library, and a digest of it; a model without a
    tokenizer gets its example call."""
    if model.tokenizer is None:
        return [model.example(length=given.length)], ""
    text = inspect.getsource(argparse)
    return token_windows(model.tokenizer, text, length=given.length, samples=given.samples)


def work(model: LoadedModel, given: argparse.Namespace) -> None:
    """One step."""
    if given.only == "calibrate":
        calls, source = samples(model, given)
        found = calibrate(model.module, calls, pipeline=given.before, source=source, hessian=True)
        found.save(given.file)
        return
    options = given.options
    if given.only == "gptq":
        options += f",rounding=gptq,calibration={given.file}"
    args, kwargs = model.example(length=_TOKENS)
    passes = [text for text in (given.before, f"quantize-linear{{{options}}}") if text]
    tilewright.explain(model.module, args, passes, kwargs=kwargs)


def only(given: argparse.Namespace) -> None:
    """Print what one step takes, as JSON."""
    before = resident()
    model = resolve(given.model)
    weights = sum(4 * parameter.numel() for parameter in model.module.parameters())
    if given.offload:
        tilewright.offload_weights(model.module)
    started, used = time.perf_counter(), time.process_time()
    work(model, given)
    row = {"seconds": time.perf_counter() - started, "processor": time.process_time() - used}
    print(json.dumps({**row, "peak": resident("VmHWM"), "before": before, "weights": weights}))


def in_a_process(given: argparse.Namespace, step: str, file: Path) -> dict[str, float]:
    """What `only` prints of one step."""
    command = [sys.executable, "-m", "tilewright.tools.bench_quantization", given.model, "--only", step]
    command += ["--file", str(file), "--before", given.before, "--options", given.options]
    command += ["--samples", str(given.samples), "--length", str(given.length)]
    command += ["--offload"] if given.offload else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(given: argparse.Namespace) -> bool:
    """Print every step and whether it keeps to the goals; True when all do."""
    rows: dict[str, dict[str, float]] = {}
    with TemporaryDirectory(dir=given.folder) as folder:
        for step in STEPS:
            row = rows[step] = in_a_process(given, step, Path(folder) / "statistics")
            peak, above, weights = row["peak"], row["peak"] - row["before"], row["weights"]
            text = f"{step:<10}{row['seconds']:6.1f} s (processor {row['processor']:6.1f} s)"
            text += f"  peak {peak / _MIB:5.0f} MiB, {peak / weights:.2f} x the weights"
            text += f"; above {above / _MIB:5.0f} MiB, {above / weights:.2f} x"
            print(text + (" MISSED" if peak > MEMORY * weights else ""), flush=True)
    kept = all(row["peak"] <= MEMORY * row["weights"] for row in rows.values())
    times = {"rtn": rows["rtn"]["seconds"], "gptq": rows["calibrate"]["seconds"] + rows["gptq"]["seconds"]}
    for name, seconds in times.items():
        late = seconds > SECONDS[name]
        kept = kept and not late
        what = "with calibration " if name == "gptq" else ""
        print(f"{name} {what}{seconds:.1f} s, goal <= {SECONDS[name]:.0f} s{' MISSED' if late else ''}")
    print(f"goal of each peak: <= {MEMORY} x the weights")
    return kept


def main(argv: list[str] | None = None) -> int:
    """Print the figures; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="bench_quantization", description=" ".join((__doc__ or "").splitlines()[:2])
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument(
        "--before", default="fold-norm-scale,rotate-hadamard", metavar="P", help="passes in front"
    )
    parser.add_argument(
        "--options", default="weight=int4,activation=int8-token", metavar="O", help="of quantize-linear"
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="windows of the calibration")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each")
    parser.add_argument("--offload", action="store_true", help="move the model to a file first")
    parser.add_argument(
        "--folder", default=SCRATCH, metavar="DIR", help="for the statistics (default %(default)s)"
    )
    parser.add_argument("--only", choices=STEPS, help="this step, in here")
    parser.add_argument("--file", type=Path, help="the statistics, with --only")
    given = parser.parse_args(argv)
    Pipeline.parse(given.before or [])
    if given.only is None:
        return int(not compare(given))
    if given.only != "rtn" and given.file is None:
        parser.error(f"--only {given.only}: needs --file")
    only(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
