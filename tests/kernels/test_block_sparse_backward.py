"""Generated Triton gradients of block-sparse attention in the interpreter, against autograd in float64."""

from __future__ import annotations

import ast
import os

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition

from tilewright.compiler.block_layout import BlockLayout, Kind, Predicate
from tilewright.compiler.ops import all_ops
from tilewright.kernels.block_sparse_attention.by_key import rows_by_key
from tilewright.kernels.block_sparse_attention.family import (
    BLOCK_SPARSE_ATTENTION,
    BLOCK_SPARSE_ATTENTION_BACKWARD,
)
from tilewright.kernels.load import build_kernel
from tilewright.runtime.contracts import KernelKey, Refusal, Target

TARGET = Target("cuda", "sm_80")
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3}
"""Largest error of a gradient by the largest value of it."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(17)


def to_meta(values: tuple[object, ...]) -> list[object]:
    return [x.to("meta") if isinstance(x, torch.Tensor) else x for x in values]


def gradients(
    layout: BlockLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, with_lse: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(through autograd of the forward kernel's op, through autograd of the definition in float64)."""
    given = (*layout.arguments(), 0.4)
    key = BLOCK_SPARSE_ATTENTION.configure(to_meta((q, k, v, *given)), TARGET)
    assert isinstance(key, KernelKey), str(key)
    dout, dlse = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), torch.randn(q.shape[:3])

    def grads(function: object, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = function(*inputs)
        rows = torch.isfinite(lse)  # the gradient of -inf means nothing
        loss = (out * dout.to(out.dtype)).sum()
        loss = loss + (lse[rows] * dlse.to(lse.dtype)[rows]).sum() if with_lse else loss
        return list(torch.autograd.grad(loss, inputs))

    kernel = build_kernel(BLOCK_SPARSE_ATTENTION, key).train_op
    mine = grads(lambda *x: kernel(*BLOCK_SPARSE_ATTENTION.rewrite_args(key, (*x, *given))), q.dtype)
    definition = all_ops()["block_sparse_attention"].definition
    return mine, grads(lambda *x: definition(*x, *given), torch.float64)


def check(
    layout: BlockLayout, queries: int, keys: int, size: int, dtype: torch.dtype, **options: int
) -> None:
    heads, key_heads = layout.head_group.shape[1], options.get("key_heads", 2)
    q = torch.randn(2, heads, queries, size).to(dtype)
    k, v = (torch.randn(2, key_heads, keys, n).to(dtype) for n in (size, options.get("value", size)))
    for mine, want in zip(*gradients(layout, q, k, v), strict=True):
        assert mine.dtype == dtype
        assert mine.shape == want.shape
        error = float((mine.double() - want).abs().max() / want.abs().max())
        assert error < BOUNDS[dtype], error


def ragged(**more: object) -> BlockLayout:
    """Two groups over 47 queries and 51 keys; an empty row, an empty key block, an empty column of blocks."""
    mask = torch.rand(2, 3, 4) > 0.3
    mask[0, 1] = False
    mask[1, 2] = True
    mask[:, :, 2] &= torch.tensor([[True], [False]])
    return BlockLayout.from_block_mask(
        mask, [0, 5, 40, 47], [0, 3, 3, 37, 51], 4, head_group=torch.tensor([[0, 1, 1, 0]]), **more
    )


@pytest.mark.interpreter
@needs_interpreter
def test_a_group_of_heads_under_a_rule() -> None:
    """Ragged blocks, an empty row, two query heads a key head, a rule on some blocks; in 16 bits."""
    tensors = ragged().as_tensors()
    tensors["flag"] = torch.randint(0, 2, tensors["col"].shape, dtype=torch.int32)
    check(BlockLayout.from_tensors(tensors, [Predicate.causal(12, shift=4)]), 47, 51, 24, torch.float16)


class TestInTheInterpreter:
    pytestmark = [pytest.mark.interpreter, pytest.mark.slow, needs_interpreter]

    @pytest.mark.parametrize(
        ("size", "value", "dtype"),
        [(16, 16, torch.float32), (24, 40, torch.float32), (16, 16, torch.float16)],
    )
    @pytest.mark.parametrize("key_heads", [1, 2, 4])
    def test_ragged_groups(self, size: int, value: int, dtype: torch.dtype, key_heads: int) -> None:
        if key_heads == 2 or (size, dtype) == (24, torch.float32):
            check(ragged(), 47, 51, size, dtype, value=value, key_heads=key_heads)

    @pytest.mark.parametrize(
        "rule",
        [
            Predicate.band(9, sink=3),
            Predicate.causal(12, sink=5, shift=4),
            Predicate.block_causal(7),
            Predicate.slot_valid(6, 4),
            Predicate.pad_self(),
            Predicate.user(),
        ],
        ids=str,
    )
    def test_every_predicate(self, rule: Predicate) -> None:
        tensors = ragged().as_tensors()
        tensors["flag"] = torch.randint(0, 2, tensors["col"].shape, dtype=torch.int32)
        if rule.kind is Kind.PAD_SELF:
            tensors["limit"] = torch.tensor([20, 45], dtype=torch.int32)
        if rule.kind is Kind.USER:
            tensors["mask"] = torch.rand(1, 4, 47, 51) > 0.4
            tensors["mask"][:, 1:3, 3:9] = False
        check(BlockLayout.from_tensors(tensors, [rule]), 47, 51, 16, torch.float32)

    def test_two_predicates_and_blocks_longer_than_a_step(self) -> None:
        layout = BlockLayout.from_block_mask(
            torch.ones(2, 2, dtype=torch.bool),
            [0, 70, 75],
            [0, 67, 80],
            3,
            flag=torch.tensor([[0, 1], [2, 0]]),
            predicates=[Predicate.causal(shift=5), Predicate.band(40)],
        )
        check(layout, 75, 80, 16, torch.float32, key_heads=1)

    def test_index_maps_valid_lengths_and_layouts_per_item(self) -> None:
        tensors = ragged().as_tensors()
        tensors["head_group"] = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.int32)
        tensors["k_valid"] = torch.tensor([51, 30], dtype=torch.int32)
        tensors["q_valid"] = torch.tensor([31, 47], dtype=torch.int32)
        tensors["src_q"] = torch.randperm(50, dtype=torch.int32)[None, :47].contiguous()
        tensors["src_k"] = torch.stack([torch.randperm(60)[:51] for _ in range(2)]).int()
        check(BlockLayout.from_tensors(tensors), 50, 60, 16, torch.float32)

    @pytest.mark.parametrize("dtype", list(BOUNDS))
    def test_key_blocks_that_differ_between_the_heads_of_a_key_head(self, dtype: torch.dtype) -> None:
        """A program of keys then serves one query head, and the parts are added."""
        tensors = ragged().as_tensors()
        tensors["k_off"] = torch.tensor([[0, 3, 3, 37, 51], [0, 20, 21, 51, 51]], dtype=torch.int32)
        tensors["q_off"] = torch.tensor([[0, 5, 40, 47], [0, 0, 33, 47]], dtype=torch.int32)
        check(BlockLayout.from_tensors(tensors), 47, 51, 16, dtype)

    def test_equal_bits_with_and_without_what_the_caller_prepared(self) -> None:
        q, k = torch.randn(2, 4, 47, 16), torch.randn(2, 2, 51, 16)
        lse, out = torch.zeros(2, 4, 47), torch.randn(2, 4, 47, 16)
        tensors = ragged().as_tensors()
        tensors["flag"] = torch.randint(0, 2, tensors["col"].shape, dtype=torch.int32)
        layout = BlockLayout.from_tensors(tensors, [Predicate.band(9)])
        given = (out + 1, lse + 2, q, k, k, out, lse, *layout.arguments(), 0.3)
        key = BLOCK_SPARSE_ATTENTION_BACKWARD.configure(to_meta(given), TARGET)
        kernel = build_kernel(BLOCK_SPARSE_ATTENTION_BACKWARD, key).op
        plain = BLOCK_SPARSE_ATTENTION_BACKWARD.rewrite_args(key, given)
        delta = ((out + 1) * out).sum(-1) - (lse + 2)
        rows = rows_by_key(layout.row_ptr, layout.col, layout.flag, 4)
        for mine, other in zip(kernel(*plain), kernel(*plain, delta, *rows), strict=True):
            assert torch.equal(mine, other)
        want = all_ops()["block_sparse_attention_backward"].definition(*given)
        for mine, other in zip(kernel(*plain), want, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    def test_two_compiled_layers_share_the_rows_by_key_of_one_layout(self) -> None:
        layout, q = ragged(), torch.randn(1, 4, 47, 16)
        k = torch.randn(1, 4, 51, 16)
        given = (*layout.arguments(), 0.4)
        key = BLOCK_SPARSE_ATTENTION.configure(to_meta((q, k, k, *given)), TARGET)
        kernel, seen = build_kernel(BLOCK_SPARSE_ATTENTION, key).train_op, []
        fixed = BLOCK_SPARSE_ATTENTION.rewrite_args(key, (q, k, k, *given))[3:]

        def model(x: torch.Tensor, k: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            middle = kernel(x, k, k, *tensors, 0.4)[0]
            return kernel(middle, k, k, *tensors, 0.4)[0]

        def backward_compiler(graph: torch.fx.GraphModule, inputs: object) -> object:
            seen.append([str(node.target) for node in graph.graph.nodes])
            return make_boxed_func(graph)

        def forward_compiler(graph: torch.fx.GraphModule, inputs: object) -> object:
            return make_boxed_func(graph)

        compiled = aot_function(
            model,
            fw_compiler=forward_compiler,
            bw_compiler=backward_compiler,
            partition_fn=min_cut_rematerialization_partition,
        )
        x = q.requires_grad_()
        (mine,) = torch.autograd.grad(compiled(x, k, *fixed[:-1]).sum(), x)
        (want,) = torch.autograd.grad(model(x, k, *fixed[:-1]).sum(), x)
        assert torch.equal(mine, want)
        (ops,) = seen
        assert sum("block_sparse_attention_backward" in name for name in ops) == 2
        assert sum(name.startswith("aten.sort") for name in ops) == 1


def test_rows_by_key_are_the_transpose() -> None:
    mask = torch.rand(3, 5, 4) > 0.5
    mask[0, :, 1] = False
    mask[1] = False
    layout = BlockLayout.from_block_mask(
        mask,
        list(range(6)),
        list(range(5)),
        3,
        flag=torch.arange(20).view(5, 4) % 3,
        predicates=[Predicate.band(1), Predicate.band(2)],
    )
    key_ptr, row, flag = rows_by_key(layout.row_ptr, layout.col, layout.flag, 4)
    for g in range(3):
        for c in range(4):
            at = slice(int(key_ptr[g, c]), int(key_ptr[g, c + 1]))
            rows = mask[g, :, c].nonzero()[:, 0]
            assert row[g, at].tolist() == rows.tolist()
            assert flag[g, at].tolist() == [(int(r) * 4 + c) % 3 for r in rows]


def test_what_is_off_is_absent_from_the_text_and_a_cpu_is_refused() -> None:
    example = BLOCK_SPARSE_ATTENTION_BACKWARD.examples()
    keys = [BLOCK_SPARSE_ATTENTION_BACKWARD.configure(args, TARGET) for args in example[:2]]
    plain, causal = (BLOCK_SPARSE_ATTENTION_BACKWARD.source(key)[1] for key in keys)
    ast.parse(plain)
    for word in ("flag", "src_", "valid", "limit", "mask_", "d_real", "e_real", "pass1", "kind"):
        assert word not in plain, word
    assert plain.count("tl.dot") == 14  # 4 a step of the keys' role, 3 of the queries', whole and short
    ast.parse(causal)
    assert "pass1" in causal
    assert "pass2" not in causal
    refused = BLOCK_SPARSE_ATTENTION_BACKWARD.configure(example[0], Target("cpu", "avx2"))
    assert isinstance(refused, Refusal)
    assert "CPU" in refused.reason
