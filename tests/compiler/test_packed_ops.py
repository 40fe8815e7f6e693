"""The packed ops' definitions against rows built byte by byte, and attention over what they stand for."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.ops import packed
from tilewright.passes.quantize._kv_sites import rounded_by_formula

FORMS = [(8, 0), (4, 0), (8, 8), (4, 8)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(29)


def packed_by_hand(row: np.ndarray, bits: int, group: int) -> bytes:
    """One row in float32 arithmetic, value by value."""
    codes, numbers, levels = b"", b"", np.float32(2**bits - 1)
    for part in row.astype(np.float32).reshape(-1, group or len(row)):
        low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
        step = (high - low) / levels
        step = step if step > 0 else np.float32(1)
        zero = np.rint(-low / step)
        found = [int(min(max(np.rint(x / step) + zero, 0), levels)) for x in part]
        half = len(found) // 2
        codes += bytes(found if bits == 8 else [found[i] + 16 * found[half + i] for i in range(half)])
        numbers += struct.pack("<ff", step, -step * zero)
    return codes + numbers


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_a_row_is_its_codes_then_its_numbers(bits: int, group: int) -> None:
    x = 3 * torch.randn(6, 24)
    x[1], x[2], x[3] = 0.0, x[2].abs() + 1, 7.0
    rows = packed.pack_rows(x, bits, group)
    assert rows.shape[1] == packed.packed_width(24, bits, group)
    assert packed.packed_size(rows.shape[1], bits, group) == 24
    for row, values in zip(rows, x, strict=True):
        assert bytes(row.tolist()) == packed_by_hand(values.numpy(), bits, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_a_row_stands_for_what_quantize_kv_makes_of_it(bits: int, group: int, dtype: torch.dtype) -> None:
    x = (2 * torch.randn(3, 5, 24)).to(dtype)
    back = packed.unpack_rows(packed.pack_rows(x, bits, group), bits, group)
    assert torch.equal(back.to(dtype), ops.kv_round(x, bits, group))
    torch.testing.assert_close(back, rounded_by_formula(x.float(), bits, group, False))


def test_what_is_not_finite_is_not_hidden() -> None:
    x = torch.randn(3, 16)
    x[0, 3], x[1, 9], x[2, 0] = math.nan, math.inf, -math.inf
    back = packed.unpack_rows(packed.pack_rows(x, 8, 8), 8, 8).unflatten(-1, (2, 8))
    assert back.isnan().all(-1).tolist() == [[True, False], [False, True], [True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_attention_and_append_are_the_plain_ones_over_rounded_rows(
    bits: int, group: int, dtype: torch.dtype
) -> None:
    """Ragged, chunks across pages, grouped heads, padding; pages in use before."""
    starts, table = torch.tensor([0, 5]), torch.randperm(12).view(2, 6).to(torch.int32)
    plain = [torch.zeros(12, 3, 8, size, dtype=dtype) for size in (16, 24)]
    codes = [
        torch.randint(0, 256, (12, 3, 8, packed.packed_width(size, bits, group)), dtype=torch.uint8)
        for size in (16, 24)
    ]
    first = torch.tensor([2, 5])
    for tokens in (9, 1, 4):
        k, v = (torch.randn(2, 3, tokens, size).to(dtype) for size in (16, 24))
        ops.packed_append(*codes, table, starts, k, v, bits, group)
        rounded = (rounded_by_formula(x, bits, group, False) for x in (k, v))
        ops.paged_append(*plain, table, starts, *rounded)
        starts = starts + tokens
        q = torch.randn(2, 9, tokens, 16).to(dtype)
        out, lse = ops.packed_attention(q, *codes, table, starts, bits, group, first, 0.3)
        want, total = ops.paged_attention(q, *plain, table, starts, first, None, 0.3)
        assert out.dtype == dtype
        bound = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
        torch.testing.assert_close(out, want, rtol=bound, atol=bound)
        torch.testing.assert_close(lse, total, rtol=bound, atol=bound)


def test_append_touches_nothing_else() -> None:
    pools = [torch.randint(0, 256, (4, 1, 8, 24), dtype=torch.uint8) for _ in range(2)]
    before = [pool.clone() for pool in pools]
    rows = torch.randn(1, 1, 2, 16)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    ops.packed_append(*pools, table, torch.tensor([7]), rows, rows, 8)
    changed = [(a != b).any(-1).nonzero().tolist() for a, b in zip(pools, before, strict=True)]
    assert changed == [[[0, 0, 0], [2, 0, 7]]] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed.packed_width(64, 3, 0), "bits = 3: expected 8 or 4"),
        (lambda: packed.packed_width(64, 8, 24), "group = 24: expected 0 or a divisor of the 64"),
        (lambda: packed.packed_width(9, 4, 3), "group = 3.*an even number"),
        (lambda: packed.packed_size(31, 4, 16), "no row of bits = 4, group = 16 has 31 bytes"),
    ],
)
def test_rows_that_do_not_exist_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_pools_of_another_form_are_refused() -> None:
    pool, table = torch.zeros(4, 1, 8, 24, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int32)
    one, rows = torch.ones(1, dtype=torch.int64), torch.randn(1, 1, 1, 16)
    for args in ((rows, pool, pool, table, one, 4), (rows, pool.float(), pool.float(), table, one, 8)):
        with pytest.raises(ValueError, match="packed_attention: rows"):
            ops.packed_attention(*args)
    with pytest.raises(ValueError, match="must be .* of one dtype"):
        ops.packed_append(pool, pool, table, one, rows, rows.half(), 8)
    with pytest.raises(ValueError, match="no page"):
        ops.packed_append(pool, pool, table - 1, one, rows, rows, 8)


def test_operations_are_those_of_attention_and_of_restoring() -> None:
    count = ops.all_ops()
    pool, table = torch.zeros(4, 3, 8, 24, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int32)
    q, one = torch.randn(1, 9, 1, 16), torch.ones(1, dtype=torch.int64)
    found = count["packed_attention"].flops(q, pool, pool, table, one, 8, out=None)
    assert found == 16 * 9 * (2 * 16 + 2 * 16 + 5) + 16 * 3 * 2 * 32
