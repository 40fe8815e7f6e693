"""Time quantized_linear on this CPU: cold weights, every side in turn in one process, the minimum of rounds.

Sides: torch float32, torch's int8 dynamic linear (fbgemm) and, where onnxruntime and onnx can be imported,
MatMulNBits with int8 activations. The read bandwidth of the machine (4 streams per thread) stands beside,
measured between the rounds: on a shared machine it changes from minute to minute.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.compiler.float_format import AnyFormat, FloatFormat
from tilewright.compiler.weight_format import WeightFormat
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.common.bench import COLD_BYTES, interleave
from tilewright.kernels.common.cpp import cpp_file, vector_text
from tilewright.kernels.load import build_kernel
from tilewright.kernels.quantized_linear.family import QUANTIZED_LINEAR
from tilewright.kernels.table import host_target
from tilewright.runtime.build import LIBRARY, compile_cpp
from tilewright.runtime.contracts import Refusal

DECODE = ((576, 576), (1536, 576), (576, 1536), (49152, 576), (8192, 2048))
PREFILL = ((576, 576), (1536, 576), (576, 1536), (8192, 2048))
FORMATS: dict[str, AnyFormat] = {
    "w4a8": WeightFormat(4, 32, "symmetric", "int8-group"),
    "w4a8 float-zero": WeightFormat(4, 32, "float-zero", "int8-group"),
    "w8a8": WeightFormat(8, 0, "symmetric", "int8-token"),
    "w4": WeightFormat(4, 32, "float-zero", "none"),
    "w8": WeightFormat(8, 0, "symmetric", "none"),
    "e4m3": FloatFormat("fp8-e4m3"),
    "e5m2": FloatFormat("fp8-e5m2"),
    "e4m3 fp8-token": FloatFormat("fp8-e4m3", activation="fp8-token"),
    "nvfp4": FloatFormat("nvfp4", 16),
}
Side = Callable[[int], object]
WHOLE = "ort MatMulNBits"
"""The side whose call runs every copy."""
READS = 3
"""Reads of 256 MiB after every round."""


@dataclass(frozen=True)
class Measured:
    """One side on one shape."""

    name: str
    seconds: float
    bytes: int


def _copies(size: int) -> int:
    return max(2, -(-COLD_BYTES // size))


def ours(weight: Tensor, x: Tensor, form: AnyFormat, copies: int) -> tuple[Side, int]:
    """(call, bytes of one packed weight)."""
    rows = weight.shape[0]
    if isinstance(form, FloatFormat):
        packed = form.pack_weight(weight)
    else:
        packed = form.pack(form.quantizer().quantize(weight))
    key = QUANTIZED_LINEAR.configure((x, packed, None, rows, form.text), host_target())
    if isinstance(key, Refusal):
        raise ValueError(f"{form.text}: {key}")
    op, sets = build_kernel(QUANTIZED_LINEAR, key).op, [packed.clone() for _ in range(copies)]
    return lambda i: op(x, sets[i % copies], rows), packed.numel()


def torch_float(weight: Tensor, x: Tensor, copies: int) -> tuple[Side, int]:
    sets = [weight.clone() for _ in range(copies)]
    return lambda i: F.linear(x, sets[i % copies]), weight.numel() * 4


def fbgemm(weight: Tensor, x: Tensor, copies: int) -> tuple[Side, int]:
    """torch's dynamically quantized int8 linear."""
    torch.backends.quantized.engine = "fbgemm"
    scale = weight.abs().amax(1) / 127
    whole = torch.quantize_per_channel(weight, scale, torch.zeros(len(scale)).long(), 0, torch.qint8)
    sets = [torch.ops.quantized.linear_prepack(whole, None) for _ in range(copies)]
    return lambda i: torch.ops.quantized.linear_dynamic(x, sets[i % copies], True), weight.numel()


def matmul_nbits(weight: Tensor, x: Tensor, copies: int) -> tuple[Side, int]:
    """onnxruntime's MatMulNBits, blocks of 32, int8 activations (accuracy_level 4); one session that runs
    all copies, so that what a session costs is shared. The copies differ: it keeps equal weights once."""
    onnx, onnxruntime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    helper, numpy_helper, proto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    rows, columns = weight.shape
    codes = WeightFormat(4, 32).quantizer().quantize(weight)
    nibbles = codes.codes.view(rows, columns // 32, 32)
    data = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).numpy()
    nodes: list[Any] = []
    constants: list[Any] = []
    for i in range(copies):
        constants.append(numpy_helper.from_array(data ^ i % 256, f"w{i}"))
        constants.append(numpy_helper.from_array((codes.scale + i * 1e-6).reshape(-1).numpy(), f"s{i}"))
        node = helper.make_node(
            "MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft",
            K=columns, N=rows, bits=4, block_size=32, accuracy_level=4,
        )  # fmt: skip
        nodes.append(node)
    given = [helper.make_tensor_value_info("x", proto.FLOAT, list(x.shape))]
    made = [helper.make_tensor_value_info(f"y{i}", proto.FLOAT, [x.shape[0], rows]) for i in range(copies)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", given, made, initializer=constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda i: session.run(None, feed), data.nbytes + rows * columns // 8


@functools.lru_cache(maxsize=1)
def read_op() -> Any:
    """An op that reads a float32 vector once, 4 streams per thread: the memory's read rate."""
    body = """void run(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]);
  const int64_t one = 1, threads = thread_count(), each = x.numel() / threads / 64 * 16;
  Tensor y(&one, 1, aoti_torch_dtype_float32());
  const float* data = x.data<float>();
  float* out = y.mutable_data<float>();
  parallel_for(0, threads, 1, [&](int64_t t, int64_t) {
    Vec sum[8] = {};
    const float* p = data + t * each * 4;
    for (int64_t i = 0; i + 16 <= each; i += 16)
      for (int s = 0; s < 4; ++s) {
        _mm_prefetch(reinterpret_cast<const char*>(p + s * each + i) + 1152, _MM_HINT_T0);
        sum[s] = vadd(sum[s], vload(p + s * each + i));
        sum[s + 4] = vadd(sum[s + 4], vload(p + s * each + i + 8));
      }
    for (int s = 1; s < 8; ++s) sum[0] = vadd(sum[0], sum[s]);
    out[0] = vsum(sum[0]);
  });
  stack[0] = y.release();
}"""
    text = cpp_file(
        title="Reads a vector once.", note="", target="cpu:avx2", vector=vector_text("avx2", {"sum"}),
        body=body, op="read_once", schema="(Tensor x) -> Tensor",
    )  # fmt: skip
    torch.ops.load_library(str(compile_cpp(text, "avx2", {HEADER: TORCH_ABI}) / LIBRARY))  # type: ignore[no-untyped-call]
    return torch.ops.tilewright_kernels.read_once


@functools.lru_cache(maxsize=1)
def _much() -> Tensor:
    return torch.ones(64 << 20)


def bandwidth(rounds: int) -> float:
    """Bytes per second of reading 256 MiB."""
    x, op = _much(), read_op()
    return x.numel() * 4 / interleave({"read": lambda _: op(x)}, 1, rounds)["read"]


def measure(
    rows: int, columns: int, tokens: int, formats: list[str], peers: bool, rounds: int
) -> tuple[list[Measured], float]:
    """Every side on one shape, interleaved, and the read bandwidth meanwhile."""
    torch.manual_seed(0)
    weight, x = torch.randn(rows, columns) * 0.05, torch.randn(tokens, columns)
    copies = _copies(rows * columns // 2) if tokens == 1 else 1
    sides = {"torch float32": torch_float(weight, x, _copies(rows * columns * 4) if tokens == 1 else 1)}
    for name in formats:
        sides[name] = ours(weight, x, FORMATS[name], copies)
    if peers:
        sides["fbgemm int8"] = fbgemm(weight, x, copies)
        if all(importlib.util.find_spec(m) for m in ("onnxruntime", "onnx")):
            sides[WHOLE] = matmul_nbits(weight, x, copies)
    seconds, limit = dict.fromkeys(sides, float("inf")), 0.0
    for _ in range(rounds):  # what runs all copies at once takes its turn between rounds of the others
        short = {name: run for name, (run, _) in sides.items() if name != WHOLE}
        for name, value in interleave(short, copies, 1).items():
            seconds[name] = min(seconds[name], value)
        if WHOLE in sides:
            whole = interleave({WHOLE: sides[WHOLE][0]}, 1, 1)[WHOLE] / copies
            seconds[WHOLE] = min(seconds[WHOLE], whole)
        limit = max(limit, bandwidth(READS))
    return [Measured(name, seconds[name], size) for name, (_, size) in sides.items()], limit


def main(argv: list[str] | None = None) -> int:
    """Print one table per shape."""
    parser = argparse.ArgumentParser(prog="bench_quantized", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", action="append", choices=sorted(FORMATS), help="may repeat; default: all")
    parser.add_argument("--tokens", type=int, default=1, metavar="M", help="rows of x (default 1: decode)")
    parser.add_argument("--shape", action="append", metavar="NxK", help="may repeat; default: SmolLM2's")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds over all copies")
    parser.add_argument("--no-peers", action="store_true", help="only torch float32 beside")
    options = parser.parse_args(argv)
    default = DECODE if options.tokens == 1 else PREFILL
    shapes = [tuple(int(s) for s in text.split("x")) for text in options.shape or ()] or default
    with torch.inference_mode():
        for rows, columns in shapes:
            found, limit = measure(
                rows, columns, options.tokens, options.format or list(FORMATS), not options.no_peers,
                options.rounds,
            )  # fmt: skip
            machine = f"{torch.get_num_threads()} threads, read bandwidth {limit / 1e9:.1f} GB/s"
            print(f"{rows} x {columns}, {options.tokens} rows of x, {machine}")
            for side in found:
                rate = 2 * rows * columns * options.tokens / side.seconds / 1e9
                read = side.bytes / side.seconds
                figures = f"{side.seconds * 1e6:>10.1f} us  {read / 1e9:>6.1f} GB/s  {read / limit:>5.2f}"
                ratio = found[0].seconds / side.seconds
                figures += f" of bandwidth  {rate:>7.1f} GOP/s  {ratio:>6.2f}x torch float32"
                print(f"  {side.name:<18} {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
