"""What quantization costs SmolLM2-135M, row by row beside the band it is expected in.

Text: `pydoc_data.topics` of CPython 3.11, values in the order of their keys, windows of 512 tokens from an
empty cache. The measure is the mean over positions of the loss less that of the model as it is, paired
position by position, in nats; with the standard error of that mean, and as a ratio of perplexities.

The weights of this model lie on a 4-bit grid (Q4_1), which forms with that grid keep and others do not. With
`--off-grid` model and forms are judged on weights that lie on none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.quantizers import split, spread
from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.calibration import calibrate, token_windows
from tilewright.frontends.loaded_model import Call, LoadedModel
from tilewright.frontends.loaders import resolve

LENGTH, CALIBRATED_FROM, CALIBRATED_WINDOWS = 512, 40_960, 4
TEXT_SHA256 = "71f2ff5d99bdc1f9c48c5c2353ad1382"
"""Of the text that the bands were measured on, its beginning."""
ROTATED = "fold-norm-scale,rotate-hadamard"


@dataclass(frozen=True)
class Row:
    """A pipeline, and between what its loss in nats is expected; FILE stands for its calibration.

    The band says that the pipeline does what it is named for, which may be to lose a lot; a goal that it is
    good enough.
    """

    name: str
    pipeline: str
    low: float
    high: float
    calibrated: str | None = None
    """The passes behind which its statistics are taken; None where it needs none."""
    cached: bool = False
    """Each window goes through a StaticCache, which it fills."""
    goal: float | None = None
    """The largest ratio of perplexities that is wanted of the best form of a scheme; its plain form is beside
    it."""


def _linear(weight: str, group: int = 0, activation: str = "none", more: str = "") -> str:
    return f"quantize-linear{{weight={weight},group={group},activation={activation}{more}}}"


STATIC = ",calibration=FILE"
STEADY = f"{STATIC},dynamic_above=6"
GPTQ = ",rounding=gptq,calibration=FILE"
ROWS = (
    Row("rotated, 16 bits", ROTATED, -1e-5, 1e-5),
    Row("W4 g32 float-zero", _linear("int4", 32, more=",mode=float-zero"), -1e-3, 1e-3),
    Row(
        "W4A8 g32 float-zero",
        _linear("int4", 32, "int8-group", ",mode=float-zero"),
        -0.01,
        math.log(1.03),
        goal=1.03,
    ),
    Row("W8 per channel", _linear("int8"), -0.01, 0.01),
    Row("W8A8 token", _linear("int8", 0, "int8-token"), 0.015, 0.045),
    Row("W8A8 token, rotated", f"{ROTATED},{_linear('int8', 0, 'int8-token')}", -0.015, 0.015),
    Row(
        "W8A8 token, GPTQ, rotated",
        f"{ROTATED},{_linear('int8', 0, 'int8-token', GPTQ)}",
        -0.005,
        0.015,
        ROTATED,
        goal=1.005,
    ),
    Row(
        "W8A8 token, g32, rotated",
        f"{ROTATED},{_linear('int8', 32, 'int8-token')}",
        -0.005,
        0.015,
        goal=1.005,
    ),
    Row("W8A8 static", _linear("int8", 0, "int8-static", STATIC), 0.6, 0.9, ""),
    Row(
        "W8A8 static, rotated",
        f"{ROTATED},{_linear('int8', 0, 'int8-static', STATIC)}",
        0.06,
        0.15,
        ROTATED,
    ),
    Row(
        "W8A8 static, steady, rotated",
        f"{ROTATED},{_linear('int8', 0, 'int8-static', STEADY)}",
        0.0,
        0.1,
        ROTATED,
        goal=1.08,
    ),
    Row("W8A4 token", _linear("int8", 0, "int4-token"), 4.0, 9.0),
    Row("W8A4 token, rotated", f"{ROTATED},{_linear('int8', 0, 'int4-token')}", 0.5, 0.7),
    Row("W4A4 token", _linear("int4", 0, "int4-token"), 5.0, 9.0),
    Row(
        "W4A4 token, GPTQ, rotated", f"{ROTATED},{_linear('int4', 0, 'int4-token', GPTQ)}", 0.5, 1.09, ROTATED
    ),
    Row("W4 per channel", _linear("int4"), 0.58, 0.74),
    Row("W4 g128", _linear("int4", 128), 0.45, 0.60),
    Row("W4 g32", _linear("int4", 32), 0.23, 0.35),
    Row("W8 fp8 e4m3", _linear("fp8-e4m3"), 0.0, 0.04),
    Row("W8 fp8 e5m2", _linear("fp8-e5m2"), 0.02, 0.1),
    Row("W8A8 fp8 token", _linear("fp8-e4m3", 0, "fp8-token"), -0.01, 0.1),
    Row("W4 NVFP4", _linear("nvfp4"), 0.20, 0.29),
    Row("W4A8 token", _linear("int4", 0, "int8-token"), 0.61, 0.78),
    Row(
        "W4A8 token, GPTQ, rotated",
        f"{ROTATED},{_linear('int4', 0, 'int8-token', GPTQ)}",
        0.12,
        0.26,
        ROTATED,
    ),
    Row("KV8", "quantize-kv", -0.01, 0.01, cached=True),
    Row("KV4", "quantize-kv{bits=4}", 0.1, 0.35, cached=True),
    Row("KV4 rotated", "quantize-kv{bits=4,rotate=true}", 0.03, 0.15, cached=True),
)


@dataclass(frozen=True)
class Measured:
    """One row as it was found."""

    name: str
    pipeline: str
    delta: float
    """Nats a token more than the model as it is."""
    error: float
    """Standard error of delta."""
    ratio: float
    """Perplexity over that of the model as it is."""
    low: float
    high: float
    goal: float | None = None

    @property
    def inside(self) -> bool:
        """The loss lies in its band."""
        return self.low <= self.delta <= self.high

    @property
    def good(self) -> bool:
        """The loss lies in its band, and the goal is met where there is one."""
        return self.inside and (self.goal is None or self.ratio <= self.goal)

    def line(self) -> str:
        """One line of the table."""
        said = "inside" if self.inside else "OUTSIDE"
        if self.goal is not None:
            said += f", goal {self.goal:g} {'met' if self.ratio <= self.goal else 'MISSED'}"
        return (
            f"{self.name:<28} {self.delta:+.5f} +- {self.error:.5f}  ppl x {self.ratio:.4f}  "
            f"[{self.low:g}, {self.high:g}] {said}"
        )


def topics() -> tuple[str, bool]:
    """(the text, whether it is the one that the bands were measured on)."""
    from pydoc_data.topics import topics as found

    text = "\n\n".join(found[key] for key in sorted(found))
    return text[:400_000], hashlib.sha256(text.encode()).hexdigest().startswith(TEXT_SHA256)


def off_grid(module: torch.nn.Module, *, columns: int = 32) -> None:
    """Move the weights of linear layers off their 4-bit grid, each by less than half a step of its group.

    Uniform noise of the size that rounding took away: what a weight of full precision could have been.
    Weights that an embedding shares stay.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Embedding)}
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and id(layer.weight) not in tables:
            blocks = split(layer.weight.detach(), columns)
            step = (blocks.amax(-1) - blocks.amin(-1)) / 15
            noise = torch.rand(layer.weight.shape, generator=generator) - 0.5
            layer.weight.data = layer.weight.detach() + noise * spread(step, layer.in_features, columns)


def losses(model: Any, calls: Sequence[Call], cached: Any = None) -> Tensor:
    """float64 [positions]: the loss at every position but the first of each window.

    cached: the module that `model` is or compiles; every window then goes through an empty StaticCache of its
    length.
    """
    from transformers import StaticCache

    rows = []
    with torch.no_grad():
        for args, kwargs in calls:
            if cached is not None:
                config = cached.config
                heads, size = config.num_key_value_heads, config.head_dim
                cache = StaticCache(config=config, max_cache_len=LENGTH)
                # before the call: one that a call makes is no input of its program
                cache.early_initialization(1, heads, size, torch.float32, torch.device("cpu"))
                kwargs = {**kwargs, **cache_arguments(cached, cache)}
            logits = model(*args, **kwargs).logits[0, :-1].double()
            rows.append(F.cross_entropy(logits, kwargs["input_ids"][0, 1:], reduction="none"))
    return torch.cat(rows)


def measure(model: LoadedModel, rows: Sequence[Row], text: str, windows: int) -> Iterator[Measured]:
    """Every row in turn, on the first windows of the text."""
    calls, _ = token_windows(model.tokenizer, text, length=LENGTH, samples=windows)
    base = losses(model.module, calls)
    statistics: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            pipeline = row.pipeline
            if row.calibrated is not None:
                if row.calibrated not in statistics:
                    statistics[row.calibrated] = Path(folder) / f"{len(statistics)}.safetensors"
                    hessian = any("gptq" in r.pipeline for r in rows if r.calibrated == row.calibrated)
                    _calibrated(model, text, row.calibrated, hessian).save(statistics[row.calibrated])
                pipeline = pipeline.replace("FILE", str(statistics[row.calibrated]))
            torch._dynamo.reset()
            options: dict[str, Any] = {"pipeline": pipeline, "lower": "eager", "replay": False}
            candidate = torch.compile(model.module, backend="tilewright", options=options, dynamic=False)
            more = losses(candidate, calls, model.module if row.cached else None) - base
            delta = float(more.mean())
            error = float(more.std() / math.sqrt(more.numel()))
            ratio = math.exp(delta)
            yield Measured(row.name, row.pipeline, delta, error, ratio, row.low, row.high, row.goal)


def _calibrated(model: LoadedModel, text: str, pipeline: str, hessian: bool) -> Any:
    calls, source = token_windows(
        model.tokenizer, text, length=LENGTH, samples=CALIBRATED_WINDOWS, first=CALIBRATED_FROM
    )
    return calibrate(model.module, calls, pipeline=pipeline, source=source, hessian=hessian)


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns 0 when every row lies in its band and meets its goal, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tilewright.tools.quality_table", description=__doc__)
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens (default 4, as the bands)")
    parser.add_argument("--row", action="append", metavar="NAME", help="only this row; may repeat")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--off-grid", action="store_true", help="weights on no 4-bit grid: bands do not apply"
    )
    args = parser.parse_args(argv)
    known = {row.name: row for row in ROWS}
    unknown = sorted(set(args.row or ()) - set(known))
    if unknown:
        parser.error(f"--row {unknown[0]!r}: expected one of {', '.join(known)}")
    if not 1 <= args.windows <= 80:
        parser.error(f"--windows {args.windows}: expected 1 to 80, before the calibration text")
    text, same = topics()
    if not same:
        sys.stderr.write("this Python's text is not CPython 3.11.7's: the bands do not apply\n")
    model = resolve("smollm2")
    if args.off_grid:
        off_grid(model.module)
        sys.stderr.write("weights moved off their grid: the bands do not apply\n")
    found = []
    for row in measure(model, [known[n] for n in args.row or known], text, args.windows):
        found.append(row)
        data = asdict(row) | {"inside": row.inside, "good": row.good}
        sys.stdout.write((json.dumps(data) if args.json else row.line()) + "\n")
        sys.stdout.flush()
    return 0 if all(row.good for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
