"""Attention with scores of 8 bits: the definition's error, and the generated Triton in the interpreter."""

from __future__ import annotations

import ast
import os

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.block_layout import BlockLayout, Predicate
from tilewright.compiler.ops.quantized_attention import quantize_rows
from tilewright.compiler.parity import assert_parity
from tilewright.kernels.block_sparse_attention.family import (
    BLOCK_SPARSE_ATTENTION_FP8,
    BLOCK_SPARSE_ATTENTION_INT8,
)
from tilewright.kernels.common.family import KernelFamily
from tilewright.kernels.load import build_kernel
from tilewright.runtime.contracts import KernelKey, Refusal, Target

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(19)


INT8, FP8 = BLOCK_SPARSE_ATTENTION_INT8, BLOCK_SPARSE_ATTENTION_FP8
OPS = {INT8.op: ops.block_sparse_attention_int8, FP8.op: ops.block_sparse_attention_fp8}
MOST = {INT8.op: 0.03, FP8.op: 0.15}
"""Relative RMS of the result that codes may cost on normal queries and keys of this size."""


def key_of(
    args: tuple[object, ...], target: str = "sm_80", family: KernelFamily = INT8
) -> KernelKey | Refusal:
    moved = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    return family.configure(moved, Target("cuda", target))


def check(
    family: KernelFamily, target: str, size: int, tensors: dict[str, torch.Tensor], queries: int, keys: int
) -> None:
    layout = BlockLayout.from_tensors(tensors, [Predicate.causal(90, sink=5, shift=100)])
    q = torch.randn(2, 4, queries, size).half()
    k = (torch.randn(2, 2, keys, size) + 3 * torch.randn(2, 2, 1, size)).half()
    v = torch.randn(2, 2, keys, 40).half()
    args = (q, k, v, *layout.arguments(), 0.2)
    key = key_of(args, target, family)
    assert isinstance(key, KernelKey), str(key)
    out, lse = build_kernel(family, key).op(*family.rewrite_args(key, args))
    want, total = OPS[family.op](*args)
    assert_parity(out, want, rms=1e-3, ulps=4.0)
    torch.testing.assert_close(lse, total, rtol=1e-4, atol=1e-4)
    exact, exact_lse = ops.block_sparse_attention(*args)
    torch.testing.assert_close(lse, exact_lse, rtol=0.02, atol=0.1)
    assert 1e-4 < float((out - exact).float().norm() / exact.float().norm()) < MOST[family.op]


def layout() -> BlockLayout:
    return BlockLayout.from_block_mask(
        torch.tensor([[True, False, True], [True, True, True], [False, False, False]]),
        [0, 30, 47, 150],
        [0, 70, 137, 150],
        4,
        flag=torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0]]),
        predicates=[Predicate.causal(90, sink=5, shift=100)],
    )


@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.parametrize("family", [INT8, FP8], ids=["int8", "fp8"])
def test_blocks_that_cut_across_the_rows_of_a_scale(family: KernelFamily) -> None:
    """Tile, block and scale borders all differ; a row of blocks is empty; keys by descriptors."""
    check(family, "sm_90", 32, layout().as_tensors(), 150, 150)


@pytest.mark.slow
@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.parametrize(("family", "target"), [(INT8, "sm_80"), (INT8, "sm_90"), (FP8, "sm_120")])
def test_gathered_tokens_and_short_keys(family: KernelFamily, target: str) -> None:
    tensors = layout().as_tensors()
    tensors["src_q"] = torch.randperm(160, dtype=torch.int32)[None, :150].contiguous()
    tensors["src_k"] = torch.randperm(200, dtype=torch.int32)[None, :150].contiguous()
    tensors["k_valid"] = torch.tensor([150, 100], dtype=torch.int32)
    check(family, target, 24, tensors, 160, 200)


def test_codes_are_within_half_a_step_and_zeros_stay() -> None:
    x = torch.randn(2, 3, 100, 8) * torch.logspace(-3, 2, 100)[:, None]
    x[:, :, 64:100] = 0
    codes, scale = quantize_rows(x, 32)
    assert scale.shape == (2, 3, 4)
    assert int(codes.abs().max()) == 127
    error = (x - codes * scale.repeat_interleave(32, 2)[:, :, :100, None]).abs()
    assert bool((error <= scale.repeat_interleave(32, 2)[:, :, :100, None] * 0.5001).all())
    assert not codes[:, :, 64:].any()


def test_e4m3_codes_keep_three_bits_and_rows_of_zeros() -> None:
    """Within half a step of e4m3: 2^-4 of a size, or of the smallest normal number."""
    x = torch.randn(2, 3, 100, 8) * torch.logspace(-3, 2, 100)[:, None]
    x[:, :, 64:100] = 0
    codes, scale = quantize_rows(x, 32, torch.float8_e4m3fn)
    size = scale.repeat_interleave(32, 2)[:, :, :100, None]
    assert float(codes.float().abs().max()) == 448
    step = torch.maximum(x.abs() / 16, size * 2.0**-10)
    assert bool(((x - codes.float() * size).abs() <= step * 1.0001).all())
    assert not codes[:, :, 64:].float().any()


def test_a_code_of_each_kind_by_hand() -> None:
    """Sizes 448, 17 and 300 of one scale: 17 is between 16 and 18 of e4m3 (to even), 300 nearest to 288."""
    x = torch.tensor([448.0, 17.0, 300.0]).view(1, 1, 1, 3)
    codes, scale = quantize_rows(x, 128, torch.float8_e4m3fn)
    assert (scale.item(), codes.float().flatten().tolist()) == (1.0, [448.0, 16.0, 288.0])
    assert quantize_rows(x, 128)[0].flatten().tolist() == [127, 5, 85]


def test_smoothing_takes_away_what_keys_share() -> None:
    """Error: relative RMS of the result. Keys with a large common part cost no more than keys without it."""
    q, v = torch.randn(1, 2, 200, 64), torch.randn(1, 2, 200, 64)
    noise, shared = torch.randn(1, 2, 200, 64), 20 * torch.randn(1, 2, 1, 64)
    given = BlockLayout.dense(200, 200, 2).arguments()

    def error(k: torch.Tensor) -> float:
        exact, exact_lse = ops.block_sparse_attention(q, k, v, *given)
        got, lse = ops.block_sparse_attention_int8(q, k, v, *given)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-2, atol=2e-2)
        return float((got - exact).norm() / exact.norm())

    assert 0 < error(noise) < 0.02
    assert error(noise + shared) < 1.01 * error(noise) + 1e-4


def test_what_is_refused_and_what_the_text_holds() -> None:
    q = torch.empty(1, 4, 64, 64, dtype=torch.bfloat16)
    given = BlockLayout.dense(64, 64, 4).arguments()
    key = key_of((q, q, q, *given, None), "sm_90")
    text = BLOCK_SPARSE_ATTENTION_INT8.source(key)[1]
    ast.parse(text)
    assert text.count("tl.dot(q_tile, k_tile).to(tl.float32)") == 2
    assert dict(BLOCK_SPARSE_ATTENTION_INT8.triton.parameters(key))["k_rows"] == "tensordesc<i8[64,64]>"
    key = key_of((q, q, q, *given, None), "sm_90", FP8)
    text = FP8.source(key)[1]
    ast.parse(text)
    assert "with fp8 scores" in text
    assert dict(FP8.triton.parameters(key))["k_rows"] == "tensordesc<fp8e4nv[64,64]>"
    assert "int8 runs there" in str(key_of((q, q, q, *given, None), "sm_80", FP8))
    amd = FP8.configure((q, q, q, *given, None), Target("hip", "gfx942"))
    assert "OCP e4m3" in str(amd)
    narrow = q[..., :24]
    assert not dict(key_of((narrow, narrow, q, *given, None), "sm_90").config)["descriptor"]
    assert "16 bits" in str(key_of((q.float(), q.float(), q.float(), *given, None)))
    cpu = BLOCK_SPARSE_ATTENTION_INT8.configure((q, q, q, *given, None), Target("cpu", "avx2"))
    assert "AVX2" in str(cpu)
