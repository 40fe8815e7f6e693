"""Generated Triton for block-sparse attention in the interpreter, against the definition; its text."""

from __future__ import annotations

import ast
import os
from dataclasses import replace

import pytest
import torch

from tilewright.compiler.block_layout import BlockLayout, Kind, Predicate
from tilewright.compiler.ops import all_ops
from tilewright.compiler.parity import assert_parity
from tilewright.kernels.block_sparse_attention import triton, triton_parts
from tilewright.kernels.block_sparse_attention.family import (
    BLOCK_SPARSE_ATTENTION,
    BLOCK_SPARSE_ATTENTION_INT8,
    descriptor_refusal,
    without_descriptors,
)
from tilewright.kernels.load import build_kernel
from tilewright.runtime.contracts import KernelKey, Target
from tilewright.runtime.offline import TARGETS
from tilewright.tools.offline_compile import compile_row

TARGET = Target("cuda", "sm_80")
in_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
BOUNDS = {torch.float32: {"rms": 1e-6, "ulps": 64.0}, torch.float16: {"rms": 1e-3, "ulps": 4.0}}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(13)


def key_of(layout: BlockLayout, *qkv: torch.Tensor, target: Target = TARGET) -> KernelKey:
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in (*qkv, *layout.arguments(), None)]
    key = BLOCK_SPARSE_ATTENTION.configure(args, target)
    assert isinstance(key, KernelKey), str(key)
    return key


def check(
    layout: BlockLayout, queries: int, keys: int, size: int, dtype: torch.dtype, value: int = 0
) -> None:
    heads = layout.head_group.shape[1]
    q = torch.randn(2, heads, queries, size).to(dtype)
    k, v = (torch.randn(2, 2, keys, n).to(dtype) for n in (size, value or size))
    args = (q, k, v, *layout.arguments(), 0.4)
    key = key_of(layout, q, k, v)
    out, lse = build_kernel(BLOCK_SPARSE_ATTENTION, key).op(*BLOCK_SPARSE_ATTENTION.rewrite_args(key, args))
    want, total = all_ops()["block_sparse_attention"].definition(*args)
    assert_parity(out, want, **BOUNDS[dtype])
    torch.testing.assert_close(lse, total, rtol=1e-4, atol=1e-4)


def ragged() -> BlockLayout:
    mask = torch.rand(2, 3, 4) > 0.3
    mask[0, 1] = False
    mask[1, 2] = True
    return BlockLayout.from_block_mask(
        mask, [0, 5, 40, 47], [0, 3, 3, 37, 51], 4, head_group=torch.tensor([[0, 1, 1, 0]])
    )


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("size", "value", "dtype"), [(16, 16, torch.float32), (24, 40, torch.float32), (16, 16, torch.float16)]
)
def test_ragged_groups(size: int, value: int, dtype: torch.dtype) -> None:
    check(ragged(), 47, 51, size, dtype, value)


RULES = (
    Predicate.band(9, sink=3),
    Predicate.causal(12, sink=5, shift=4),
    Predicate.block_causal(7),
    Predicate.slot_valid(6, 4),
    Predicate.pad_self(),
    Predicate.user(),
)


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_predicate(rule: Predicate) -> None:
    tensors = ragged().as_tensors()
    tensors["flag"] = torch.randint(0, 2, tensors["col"].shape, dtype=torch.int32)
    if rule.kind is Kind.PAD_SELF:
        tensors["limit"] = torch.tensor([20, 45], dtype=torch.int32)
    if rule.kind is Kind.USER:
        tensors["mask"] = torch.rand(1, 4, 47, 51) > 0.4
    check(BlockLayout.from_tensors(tensors, [rule]), 47, 51, 16, torch.float32)


@in_interpreter
@pytest.mark.interpreter
def test_index_maps_valid_lengths_and_layouts_per_item() -> None:
    tensors = ragged().as_tensors()
    tensors["head_group"] = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.int32)
    tensors["k_valid"] = torch.tensor([51, 30], dtype=torch.int32)
    tensors["q_valid"] = torch.tensor([31, 47], dtype=torch.int32)
    tensors["src_q"] = torch.randperm(50, dtype=torch.int32)[None, :47].contiguous()
    tensors["src_k"] = torch.stack([torch.randperm(60)[:51] for _ in range(2)]).int()
    check(BlockLayout.from_tensors(tensors), 50, 60, 16, torch.float32)


@in_interpreter
@pytest.mark.interpreter
def test_descriptors_load_whole_steps_of_keys() -> None:
    """Blocks of 70, 67 and 13 keys: whole steps by descriptors, the rest and a block under a rule without."""
    layout = BlockLayout.from_block_mask(
        torch.tensor([[True, False, True], [True, True, True]]),
        [0, 30, 47],
        [0, 70, 137, 150],
        4,
        flag=torch.tensor([[0, 0, 1], [1, 0, 0]]),
        predicates=[Predicate.causal(90, sink=5, shift=100)],
    )
    size, value = 24, 40
    q, whole = torch.randn(2, 4, 47, size).half(), torch.randn(2 * 2 * 150 * size + 4).half()
    k = whole[4:].view(2, 2, 150, size)  # 8 bytes off the alignment that descriptors need
    v = torch.randn(2, 2, 150, value).half()
    key = key_of(layout, q, k, v, target=Target("cuda", "sm_90"))
    assert "k_rows.load" in BLOCK_SPARSE_ATTENTION.source(key)[1]
    args = (q, k, v, *layout.arguments(), 0.4)
    out, lse = build_kernel(BLOCK_SPARSE_ATTENTION, key).op(*BLOCK_SPARSE_ATTENTION.rewrite_args(key, args))
    want, total = all_ops()["block_sparse_attention"].definition(*args)
    assert_parity(out, want, **BOUNDS[torch.float16])
    torch.testing.assert_close(lse, total, rtol=1e-4, atol=1e-4)


def test_descriptors_are_chosen_where_they_serve_and_the_refusal_says_why_not() -> None:
    layout, q = BlockLayout.dense(64, 64, 4), torch.empty(1, 4, 64, 64, dtype=torch.bfloat16)
    hopper = Target("cuda", "sm_90")
    chosen = key_of(layout, q, q, q, target=hopper)
    assert "k_rows.load" in BLOCK_SPARSE_ATTENTION.source(chosen)[1]
    assert dict(triton.parameters(chosen))["v_rows"] == "tensordesc<bf16[64,64]>"
    plain = without_descriptors(chosen)
    assert "_rows.load" not in BLOCK_SPARSE_ATTENTION.source(plain)[1]
    assert not any("tensordesc" in kind for _, kind in triton.parameters(plain))
    gathered = BlockLayout.from_tensors(
        {**layout.as_tensors(), "src_k": torch.arange(64, dtype=torch.int32)[None]}
    )
    assert not dict(key_of(gathered, q, q, q, target=hopper).config)["descriptor"]
    assert not dict(key_of(layout, q, q, q).config)["descriptor"]
    why = [
        descriptor_refusal(hopper, "bfloat16", gathered=True),
        descriptor_refusal(hopper, "float32", gathered=False),
        descriptor_refusal(Target("cuda", "sm_120"), "bfloat16", gathered=False),
        descriptor_refusal(TARGET, "bfloat16", gathered=False),
        descriptor_refusal(Target("hip", "gfx942"), "bfloat16", gathered=False),
    ]
    for reason, words in zip(why, ("src_k", "tensor cores", "registers", "sm_80", "gfx942"), strict=True):
        assert words in str(reason)


def of_blocks(size: int, heads: int, dtype: torch.dtype, target: Target) -> KernelKey:
    q = torch.empty(1, 4, 512, heads, dtype=dtype)
    return key_of(
        BlockLayout.causal(512, 512, 4, window=256, q_block=size, k_block=size), q, q, q, target=target
    )


def test_short_blocks_of_queries_take_short_programs() -> None:
    for size, rows in ((128, 128), (100, 128), (64, 64), (32, 64)):
        assert triton.blocks(of_blocks(size, 64, torch.float16, TARGET))[0] == rows
    assert triton.blocks(of_blocks(32, 128, torch.float16, Target("cuda", "sm_120")))[0] == 32


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(("heads", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_short_programs_do_not_spill(target: Target, heads: int, dtype: torch.dtype) -> None:
    key = of_blocks(64, heads, dtype, target)
    for family in (BLOCK_SPARSE_ATTENTION, BLOCK_SPARSE_ATTENTION_INT8):
        assert compile_row(family, replace(key, op=family.op), heads).complaint == ""


def test_tiles_cover_every_slot_once() -> None:
    q_off = torch.tensor([[0, 5, 5, 40, 47], [0, 0, 1, 46, 46]], dtype=torch.int32)
    block, first, end = triton_parts.tile_tables(q_off, 47, 16)
    for g in range(2):
        seen = []
        for tile in range(block.shape[1]):
            slots = range(int(first[g, tile]), int(end[g, tile]))
            assert len(slots) <= 16
            at = int(block[g, tile])
            assert all(q_off[g, at] <= s < q_off[g, at + 1] for s in slots)
            seen += slots
        assert sorted(seen) == list(range(int(q_off[g, -1])))


def test_what_is_off_is_absent_from_the_text() -> None:
    q = torch.empty(1, 4, 64, 64)
    plain = BLOCK_SPARSE_ATTENTION.source(key_of(BlockLayout.dense(64, 64, 4), q, q, q))[1]
    ast.parse(plain)
    for word in ("flag", "src_", "valid", "limit", "mask_", "d_real", "e_real", "pass1"):
        assert word not in plain, word
    assert plain.count("tl.dot") == 4  # whole steps, and the last short step of a block
    causal = BLOCK_SPARSE_ATTENTION.source(key_of(BlockLayout.causal(64, 64, 4), q, q, q))[1]
    ast.parse(causal)
    assert "pass1" in causal
    assert "pass2" not in causal
