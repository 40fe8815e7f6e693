"""Time exported models beside the PyTorch executable: all sides take turns in one process, the least time of
several rounds counts.

    python -m tilewright.tools.bench_export video             # a block with sliding tiles, ONNX in both forms
    python -m tilewright.tools.bench_export decode DIR...     # decode steps of exported language models
    python -m tilewright.tools.bench_export int4 DIR...       # speed and perplexity beside onnxruntime's int4
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright as tw
from tilewright.compiler import ops
from tilewright.frontends.cache_argument import cache_arguments
from tilewright.frontends.export.artifact import read_manifest
from tilewright.frontends.export.onnx_file import session
from tilewright.frontends.export.package import load_package
from tilewright.frontends.loaders import resolve
from tilewright.tools.bench_attention import tile_case
from tilewright.tools.bench_peers import rewind
from tilewright.tools.onnx_peer import Peer
from tilewright.tools.quality_table import topics

Run = Callable[[], Any]
SPARSE = "sliding-tile-attention{tile=2x8x8,window=%s}"


def least_seconds(sides: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """The least seconds of each side over rounds in which every side runs once, a first round left out."""
    best = dict.fromkeys(sides, float("inf"))
    for number in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if number:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def block(frames: int, side: int) -> tuple[nn.Module, dict[str, Any]]:
    """One block of a Wan transformer, 4 heads of 64, and a call over frames x side x side tokens."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4,
        text_dim=64, freq_dim=64, ffn_dim=1024, num_layers=1, rope_max_seq_len=128,
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 4, frames, 2 * side, 2 * side),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 64),
        "return_dict": False,
    }
    return module.eval(), call


def opened(folder: Path, threads: int, entry: str = "") -> Any:
    """The onnxruntime session of an exported entry point, the first by default."""
    rows = {row["name"]: row for row in read_manifest(folder)["entries"]}
    row = rows[entry or next(iter(rows))]
    library = folder / row["library"] if row.get("library") else None
    return session(folder / row["file"], threads=threads, library=library)


class Attention(nn.Module):
    """Attention by a fixed layout, or dense without one."""

    def __init__(self, layout: Any = None) -> None:
        super().__init__()
        self.rest = [] if layout is None else list(layout.arguments())
        for i, value in enumerate(self.rest):
            if isinstance(value, Tensor):
                self.register_buffer(f"layout{i}", value)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.rest:
            return F.scaled_dot_product_attention(q, k, v)
        rest = [getattr(self, f"layout{i}") if isinstance(x, Tensor) else x for i, x in enumerate(self.rest)]
        found: Tensor = ops.block_sparse_attention(q, k, v, *rest, None)[0]
        return found


def compare(
    dense: nn.Module, sparse: nn.Module, passes: str, call: Mapping[str, Any], rounds: int, threads: int
) -> None:
    """Time the sparse form in both ONNX forms beside PyTorch's, and beside the dense form in onnxruntime."""
    feed = {name: value.numpy() for name, value in call.items() if isinstance(value, Tensor)}
    compiled = tw.optimize(sparse, (), passes, kwargs=dict(call))
    sides: dict[str, Run] = {"PyTorch executable": lambda: compiled(**call)}
    forms = {
        "dense": (dense, "exact", "standard"),
        "standard": (sparse, passes, "standard"),
        "custom": (sparse, passes, "custom"),
    }
    with tempfile.TemporaryDirectory() as work:
        for name, (module, pipeline, operators) in forms.items():
            tw.export(module, (), pipeline, Path(work) / name, kwargs=call, operators=operators)
            run = opened(Path(work) / name, threads).run
            sides[f"ONNX {name}"] = partial(run, None, feed)
        seconds = least_seconds(sides, rounds)
    for name, found in seconds.items():
        print(
            f"  {name:20s} {found * 1e3:8.1f} ms"
            f"  {seconds['PyTorch executable'] / found:5.2f} of the executable's speed"
            f"  {seconds['ONNX dense'] / found:5.2f} x dense ONNX",
            flush=True,
        )


def video(window: str, rounds: int, threads: int) -> None:
    """Sliding tiles of 2x8x8 over 12x24x24 tokens: attention alone, then a whole block."""
    sizes = [int(n) for n in window.split("x")]
    case = tile_case((12, 24, 24), (2, 8, 8), (sizes[0], sizes[1], sizes[2]), 4, 64)
    density = case.layout.density()
    print(f"{case.name}: density {density:.3f}, 0.6 / density = {0.6 / density:.2f}")
    torch.manual_seed(0)
    call = {name: torch.randn(1, 4, case.tokens, 64) for name in "qkv"}
    print("attention")
    compare(Attention(), Attention(case.layout), "exact", call, rounds, threads)
    module, inputs = block(12, 24)
    print("block")
    compare(module, module, SPARSE % window, inputs, rounds, threads)


def some_tokens(context: int) -> Tensor:
    """The same int64 [1, context] for every side."""
    return torch.randint(3, 2000, (1, context), generator=torch.Generator().manual_seed(0))


def _held_after(folder: Path, context: int, threads: int) -> dict[str, Any]:
    """The keys and values of `some_tokens`: numbers drawn at random make softmax underflow, which is slow."""
    model = opened(folder, threads, "prefill")
    names = [made.name for made in model.get_outputs() if made.name.startswith("present.")]
    given = {"input_ids": some_tokens(context).numpy(), "position_ids": np.arange(context)[None]}
    rows = zip(names, model.run(names, given), strict=True)
    return {name.replace("present.", "past."): value for name, value in rows}


def _onnx_step(folder: Path, context: int, threads: int) -> Run:
    """One decode step of an exported language model after `context` tokens; results stay in onnxruntime, and
    buffers that the export names as shared are input and output at once."""
    import onnxruntime

    row = next(row for row in read_manifest(folder)["entries"] if row["name"] == "decode")
    shared, buffers = row.get("shared", {}), {}
    held = _held_after(folder, context, threads)
    model = opened(folder, threads, "decode")
    binding = model.io_binding()
    for given in model.get_inputs():
        if given.name.startswith("past."):
            past = held[given.name]
            if given.name in shared:
                past = np.pad(past, ((0, 0), (0, 0), (0, given.shape[2] - context), (0, 0)))
            value = onnxruntime.OrtValue.ortvalue_from_numpy(past)
            binding.bind_ortvalue_input(given.name, value)
            if given.name in shared:
                buffers[shared[given.name]] = value
        else:
            number = 200 if given.name == "input_ids" else context
            binding.bind_cpu_input(given.name, np.full((1, 1), number, np.int64))
    for made in model.get_outputs():
        if made.name in buffers:
            binding.bind_ortvalue_output(made.name, buffers[made.name])
        else:
            binding.bind_output(made.name)
    return lambda: model.run_with_iobinding(binding)


def _package_step(folder: Path, context: int) -> Run:
    """The same of a pt2 package; prints how long loading it and the first call take."""
    row = next(row for row in read_manifest(folder)["entries"] if row["name"] == "decode")
    tokens, positions = some_tokens(context), torch.arange(context)[None]
    held = iter(load_package(folder, "prefill")(tokens, positions)[1:])
    given = []
    for spec in row["inputs"]:
        if spec["name"].startswith("past."):
            past = next(held)
            room = spec["shape"][2] - context if spec["name"] in row.get("written", ()) else 0
            given.append(torch.nn.functional.pad(past, (0, 0, 0, room)))
        else:
            given.append(torch.full((1, 1), 200 if spec["name"] == "input_ids" else context))
    started = time.perf_counter()
    step = load_package(folder, "decode")
    loaded = time.perf_counter()
    step(*given)
    first = time.perf_counter() - loaded
    print(f"  {folder.name}: loaded in {loaded - started:.2f} s, first call {first:.2f} s", flush=True)
    return lambda: step(*given)


def _torch_step(module: Any, context: int, pipeline: str) -> tuple[Run, Run]:
    """The same by the torch.compile backend, with the cache of fixed size that `tilewright run` uses; and
    what sets that cache back, since it counts its tokens."""
    from transformers import StaticCache

    compiled = torch.compile(module, backend="tilewright", options={"pipeline": pipeline}, dynamic=False)
    tokens = some_tokens(context)
    cache = StaticCache(config=module.config, max_cache_len=context + 64)
    given = cache_arguments(module, cache)
    with torch.no_grad():
        module(input_ids=tokens, **given)

    def step() -> None:
        with torch.no_grad():
            compiled(input_ids=torch.tensor([[200]]), position_ids=torch.tensor([[context]]), **given)

    return step, lambda: rewind(cache, context)


def _taking_turns(
    sides: Mapping[str, Run], rounds: int, before: Mapping[str, Run] | None = None
) -> dict[str, float]:
    """The least seconds of each side, every one 8 times a round, a first round left out; `before` each call
    of a side something may be done that is not timed."""
    seconds = dict.fromkeys(sides, float("inf"))
    for number in range(rounds + 1):
        for name, run in sides.items():
            for _ in range(8):
                if before and name in before:
                    before[name]()
                started = time.perf_counter()
                run()
                if number:
                    seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def decode(model: str, pipeline: str, folders: list[Path], context: int, rounds: int, threads: int) -> None:
    """One step after `context` tokens: the executable beside exports."""
    module = resolve(model).module
    step, back = _torch_step(module, context, pipeline)
    sides = {"PyTorch executable": step}
    for folder in folders:
        kind = read_manifest(folder)["kind"]
        sides[folder.name] = (
            _onnx_step(folder, context, threads) if kind == "onnx" else _package_step(folder, context)
        )
    seconds = _taking_turns(sides, rounds, {"PyTorch executable": back})
    for name, found in seconds.items():
        share = seconds["PyTorch executable"] / found
        print(f"  {name:20s} {found * 1e3:7.2f} ms  {share:5.2f} of the executable's speed", flush=True)


def int4(model: str, folders: list[Path], rounds: int, threads: int) -> None:
    """Exports beside onnxruntime's own int4 form: a step after 16 and 512 tokens, and what both make of
    2,048 tokens of text in windows of 512, each from an empty cache."""
    loaded = resolve(model)
    assert loaded.tokenizer is not None, "a language model has one"
    text = loaded.tokenizer(topics()[0][:20_000])["input_ids"]
    tokens = torch.tensor(text[:2048]).reshape(-1, 512)
    with tempfile.TemporaryDirectory() as work:
        peer = Peer(loaded.module, Path(work), 576, threads)
        for context in (16, 512):
            sides: dict[str, Run] = {"onnxruntime int4": peer.run}
            sides |= {folder.name: _onnx_step(folder, context, threads) for folder in folders}
            peer.logits(some_tokens(context).numpy())
            peer.give(np.full((1, 1), 200), context)
            seconds = _taking_turns(sides, rounds)
            for name, found in seconds.items():
                share = seconds["onnxruntime int4"] / found
                print(
                    f"  {name:20s} {found * 1e3:7.2f} ms after {context} tokens  {share:5.2f} x", flush=True
                )
            del sides
        forms: dict[str, Callable[[Tensor], Tensor]] = {
            "the model": lambda t: loaded.module(input_ids=t, use_cache=False).logits,
            "onnxruntime int4": lambda t: peer.logits(t.numpy()),
        }
        forms |= {folder.name: _prefill(folder, threads) for folder in folders}
        for name, logits in forms.items():
            print(f"  {name:20s} perplexity {_perplexity(logits, tokens):.3f}", flush=True)


def _prefill(folder: Path, threads: int) -> Callable[[Tensor], Tensor]:
    model = opened(folder, threads, "prefill")

    def logits(tokens: Tensor) -> Tensor:
        given = {"input_ids": tokens.numpy(), "position_ids": np.arange(tokens.shape[1])[None]}
        return torch.from_numpy(model.run(["logits"], given)[0])

    return logits


def _perplexity(logits: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(logits(w[None])[0, :-1], w[1:]).item() for w in windows]
    return float(np.exp(np.mean(losses)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", choices=["video", "decode", "int4"])
    parser.add_argument("folders", nargs="*", type=Path, help="artifacts of the model (decode, int4)")
    parser.add_argument("--window", default="3x1x3", help="tiles of the window (video)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pipeline", default="cpu-int4", help="of the executable (decode)")
    parser.add_argument("--context", type=int, default=16, help="tokens before the step (decode)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.case == "video":
        video(given.window, given.rounds, given.threads)
    elif given.case == "int4":
        int4(given.model, given.folders, given.rounds, given.threads)
    else:
        decode(given.model, given.pipeline, given.folders, given.context, given.rounds, given.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
