"""Hadamard matrices are orthogonal exactly, the fast transform is the dense one, sizes find their base."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.finite_field import Constant, prove_equal
from tilewright.compiler.hadamard import (
    HadamardPlan,
    base_matrix,
    dense,
    find_base,
    plan_for,
    random_signs,
    sylvester_matrix,
    transform,
    transform_rows,
)

# Published table of sizes -> order of the dense factor (power-of-two factor is the rest).
TABLE = {
    64: 1, 576: 36, 1536: 12, 192: 12, 768: 12, 3072: 12, 896: 28, 3584: 28, 640: 20, 2560: 20, 1152: 36,
    2304: 36, 960: 60, 1408: 44, 5632: 44, 4864: 76, 8960: 140, 5504: 344, 11008: 344, 6912: 108, 13824: 108,
    18944: 148, 3200: 100, 1440: 180, 29568: 924,
}  # fmt: skip


@pytest.mark.parametrize(
    "order", [1, 4, 8, 12, 20, 24, 28, 36, 44, 48, 52, 60, 76, 84, 100, 108, 140, 148, 180, 344]
)
def test_base_is_hadamard_exactly(order):
    matrix = base_matrix(order).long()
    assert matrix.shape == (order, order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize(("size", "order"), TABLE.items())
def test_sizes_find_the_published_base(size, order):
    assert find_base(size) == order
    plan = plan_for(size)
    assert plan is not None
    assert (plan.block, plan.base, plan.base * plan.sylvester) == (size, order, size)


@pytest.mark.parametrize(("size", "block"), [(16 * 239, 16), (92, None), (2 * 9, None), (577, None)])
def test_sizes_without_a_base(size, block):
    """4 * 23 and 4 * 239 need tables of their own: blocks of the largest power of two from 16, or nothing."""
    assert find_base(size) is None
    plan = plan_for(size)
    assert (plan.block if plan else None) == block


def test_sylvester():
    for order in (1, 2, 64):
        matrix = sylvester_matrix(order)
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order))
        assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("size", [2, 12, 64, 576, 1536])
@pytest.mark.parametrize("signed", [False, True])
def test_transform_is_the_dense_matrix_and_its_inverse(size, signed):
    plan = plan_for(size)
    assert plan is not None
    signs = random_signs(size, 3) if signed else None
    base = base_matrix(plan.base) if plan.base > 1 else None
    matrix = dense(plan, signs)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-13, rtol=0)
    x = torch.randn(3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = transform(x, plan.block, base, signs)
    assert float((turned - x @ matrix).abs().max()) < 1e-12
    back = transform(turned, plan.block, base, signs, inverse=True)
    assert float((back - x).abs().max()) < 1e-12
    assert float((transform_rows(x, plan.block, base, signs) - turned).abs().max()) < 1e-12
    if size >= 64:
        single = transform(x.float(), plan.block, base, signs).double()
        assert float((single - x @ matrix).norm() / x.norm()) < 4e-7


def test_blocks_are_transformed_apart():
    plan, x = HadamardPlan(144, 16, 1), torch.randn(4, 144, generator=torch.Generator().manual_seed(2))
    want = x.double() @ dense(plan)
    assert float((transform(x, 16).double() - want).abs().max()) < 1e-5
    assert torch.equal(transform(x, 16)[:, 16:32], transform(x[:, 16:32].contiguous(), 16))


def test_direction_matters():
    """H_12 is not symmetric: a transform with H for H^T is another function."""
    base = base_matrix(12)
    assert not torch.equal(base, base.T)
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(transform(x, 24, base), transform(x, 24, base, inverse=True))


def test_signs_are_seeded():
    assert torch.equal(random_signs(100, 4), random_signs(100, 4))
    assert not torch.equal(random_signs(100, 4), random_signs(100, 5))
    assert set(random_signs(100, 0).tolist()) == {-1.0, 1.0}


def test_field_proves_the_inverse_and_refuses_the_other_direction():
    base, signs = Constant(base_matrix(36)), Constant(random_signs(144, 1))
    x = torch.empty(2, 144)

    def round_trip(x, base, signs):
        return ops.hadamard(ops.hadamard(x, 144, base, signs), 144, base, signs, True)

    def same_way_twice(x, base, signs):
        return ops.hadamard(ops.hadamard(x, 144, base, signs), 144, base, signs)

    assert prove_equal(round_trip, lambda x, *_: x, lambda _: [x, base, signs])
    assert prove_equal(same_way_twice, lambda x, *_: x, lambda _: [x, base, signs]).verdict == "different"


def test_op_keeps_dtype_and_takes_symbolic_rows():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert ops.hadamard(torch.ones(2, 8, dtype=dtype), 8).dtype == dtype
    compiled = torch.compile(lambda x: ops.hadamard(x, 8), dynamic=True, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    assert torch.allclose(compiled(x), ops.hadamard(x, 8))


def test_orders_that_do_not_exist_are_an_error():
    with pytest.raises(ValueError, match="order = 92"):
        base_matrix(92)
