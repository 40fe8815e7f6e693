"""Attention with int8 scores: the definition's error, and the generated Triton in the interpreter."""

from __future__ import annotations

import ast
import os

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.block_layout import BlockLayout, Predicate
from tilewright.compiler.ops.int8_attention import quantize_rows
from tilewright.compiler.parity import assert_parity
from tilewright.kernels.block_sparse_attention.family import BLOCK_SPARSE_ATTENTION_INT8
from tilewright.kernels.load import build_kernel
from tilewright.runtime.contracts import KernelKey, Refusal, Target

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(19)


def key_of(args: tuple[object, ...], target: str = "sm_80") -> KernelKey | Refusal:
    moved = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    return BLOCK_SPARSE_ATTENTION_INT8.configure(moved, Target("cuda", target))


def check(target: str, size: int, tensors: dict[str, torch.Tensor], queries: int, keys: int) -> None:
    layout = BlockLayout.from_tensors(tensors, [Predicate.causal(90, sink=5, shift=100)])
    q = torch.randn(2, 4, queries, size).half()
    k = (torch.randn(2, 2, keys, size) + 3 * torch.randn(2, 2, 1, size)).half()
    v = torch.randn(2, 2, keys, 40).half()
    args = (q, k, v, *layout.arguments(), 0.2)
    key = key_of(args, target)
    assert isinstance(key, KernelKey), str(key)
    family = BLOCK_SPARSE_ATTENTION_INT8
    out, lse = build_kernel(family, key).op(*family.rewrite_args(key, args))
    want, total = ops.block_sparse_attention_int8(*args)
    assert_parity(out, want, rms=1e-3, ulps=4.0)
    torch.testing.assert_close(lse, total, rtol=1e-4, atol=1e-4)
    exact, exact_lse = ops.block_sparse_attention(*args)
    torch.testing.assert_close(lse, exact_lse, rtol=0.02, atol=0.1)
    assert 1e-4 < float((out - exact).float().norm() / exact.float().norm()) < 0.03


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
def test_blocks_that_cut_across_the_rows_of_a_scale() -> None:
    """Tile, block and scale borders all differ; a row of blocks is empty; keys by descriptors."""
    check("sm_90", 32, layout().as_tensors(), 150, 150)


@pytest.mark.slow
@pytest.mark.interpreter
@needs_interpreter
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_gathered_tokens_and_short_keys(target: str) -> None:
    tensors = layout().as_tensors()
    tensors["src_q"] = torch.randperm(160, dtype=torch.int32)[None, :150].contiguous()
    tensors["src_k"] = torch.randperm(200, dtype=torch.int32)[None, :150].contiguous()
    tensors["k_valid"] = torch.tensor([150, 100], dtype=torch.int32)
    check(target, 24, tensors, 160, 200)


def test_codes_are_within_half_a_step_and_zeros_stay() -> None:
    x = torch.randn(2, 3, 100, 8) * torch.logspace(-3, 2, 100)[:, None]
    x[:, :, 64:100] = 0
    codes, scale = quantize_rows(x, 32)
    assert scale.shape == (2, 3, 4)
    assert int(codes.abs().max()) == 127
    error = (x - codes * scale.repeat_interleave(32, 2)[:, :, :100, None]).abs()
    assert bool((error <= scale.repeat_interleave(32, 2)[:, :, :100, None] * 0.5001).all())
    assert not codes[:, :, 64:].any()


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
    narrow = q[..., :24]
    assert not dict(key_of((narrow, narrow, q, *given, None), "sm_90").config)["descriptor"]
    assert "16 bits" in str(key_of((q.float(), q.float(), q.float(), *given, None)))
    cpu = BLOCK_SPARSE_ATTENTION_INT8.configure((q, q, q, *given, None), Target("cpu", "avx2"))
    assert "AVX2" in str(cpu)
