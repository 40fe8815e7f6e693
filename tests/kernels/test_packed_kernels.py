"""The generated C++ over packed rows against the definitions, and the way eager callers reach it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tilewright.compiler.ops import all_ops
from tilewright.compiler.ops.packed import pack_rows, packed_width, unpack_rows
from tilewright.compiler.parity import assert_parity
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.paged.call import callable_for, reason_for
from tilewright.kernels.paged.packed_family import PACKED_FAMILIES
from tilewright.kernels.table import KernelChoice, host_target, select_for_node
from tilewright.runtime.build import compile_cpp
from tilewright.runtime.contracts import Refusal, Target

TARGET = host_target()
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")
BOUNDS = {
    torch.float32: {"rms": 2e-6, "ulps": 256.0},
    torch.bfloat16: {"rms": 4e-3, "ulps": 2.0},
    torch.float16: {"rms": 5e-4, "ulps": 2.0},
}
F32, BF16, F16 = BOUNDS
CASES = [
    (8, 0, 16, 64, 64, F32), (4, 0, 8, 64, 32, BF16), (4, 32, 32, 128, 96, F32), (8, 16, 64, 48, 16, F16),
]  # fmt: skip
"""bits, group, page, head, value, dtype."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(31)


def pool(case: tuple[Any, ...], lengths: list[int], hkv: int) -> tuple[torch.Tensor, ...]:
    """(k_pages, v_pages, page_table, lengths): pages in any order, rows of NaNs where no token was written,
    a page of the first sequence given up."""
    bits, group, page, size, value, dtype = case
    width = -(-max(lengths) // page) + 1
    count = sum(-(-n // page) for n in lengths) + 2
    k, v = ((1.5 * torch.randn(count, hkv, page, d)).to(dtype) for d in (size, value))
    table = torch.full((len(lengths), width), -1, dtype=torch.int32)
    order = iter(torch.randperm(count).tolist())
    for b, n in enumerate(lengths):
        for i in range(-(-n // page)):
            table[b, i] = at = next(order)
            k[at, :, min(page, n - i * page) :] = math.nan
            v[at, :, min(page, n - i * page) :] = math.nan
    for at in order:
        k[at], v[at] = math.nan, math.nan
    table[0, 1] = -1
    return pack_rows(k, bits, group), pack_rows(v, bits, group), table, torch.tensor(lengths)


def check(args: tuple[Any, ...]) -> None:
    assert reason_for("packed_attention", args) == ""
    out, lse = callable_for("packed_attention", args)(*args)
    want, total = all_ops()["packed_attention"].definition(*args)
    assert_parity(out, want, **BOUNDS[out.dtype])
    torch.testing.assert_close(lse, total, rtol=1e-5, atol=2e-5)
    assert not out[total == -math.inf].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: tuple[Any, ...]) -> None:
    """Ragged lengths, G = 1 to 5, one and several new tokens, more rows than a task takes, padding."""
    for hkv, heads, tokens in ((3, 9, 1), (4, 4, 5), (1, 5, 3), (2, 8, 40)):
        given = pool(case, [700, 5, 131, 16], hkv)
        q = 2 * torch.randn(4, heads, tokens, case[3]).to(case[5])
        check((q, *given, *case[:2]))
    rows, first = q.transpose(1, 2).contiguous().transpose(1, 2), torch.tensor([3, 5, 0, 17])
    check((rows, *given, *case[:2], first if case[0] == 8 else None, 0.3))


def test_the_parts_of_a_long_sequence_are_merged() -> None:
    given = pool(CASES[0], [9000], 3)
    args = (torch.randn(1, 9, 1, 64), *given, 8)
    want, total = all_ops()["packed_attention"].definition(args[0].double(), *args[1:])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, lse = callable_for("packed_attention", args)(*args)
            assert_parity(out, want.float(), rms=3e-6, ulps=256.0)
            torch.testing.assert_close(lse, total.float(), rtol=1e-6, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_append_writes_the_bytes_of_the_definition(case: tuple[Any, ...]) -> None:
    """Chunks that begin and end inside pages, rows of zeros, of one sign, of one value."""
    bits, group, page, size, value, dtype = case
    pools = [
        torch.randint(0, 256, (40, 3, page, packed_width(d, bits, group)), dtype=torch.uint8)
        for d in (size, value)
    ]
    mine, theirs = ([x.clone() for x in pools] for _ in range(2))
    table, at = torch.randperm(40)[:36].view(3, 12).to(torch.int32), torch.tensor([0, 7, 31])
    for tokens in (1, 5, page, 2 * page + 3):
        k, v = torch.randn(3, 3, tokens, size), torch.randn(3, tokens, 3, value).transpose(1, 2)
        k[0, 0, 0], k[1, 1, 0], k[2, 2, 0] = 0.0, k[1, 1, 0].abs() + 2, -3.0
        args = (table, at, k.to(dtype), v.to(dtype), bits, group)
        assert reason_for("packed_append", (*mine, *args)) == ""
        callable_for("packed_append", (*mine, *args))(*mine, *args)
        all_ops()["packed_append"].definition(*theirs, *args)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        at = at + tokens


def test_what_is_not_finite_stands_for_nans_in_its_group() -> None:
    x = torch.randn(1, 1, 3, 64)
    x[0, 0, 0, 3], x[0, 0, 1, 40], x[0, 0, 2, 0] = math.nan, math.inf, -math.inf
    pools = [torch.zeros(1, 1, 8, packed_width(64, 8, 32), dtype=torch.uint8) for _ in range(2)]
    args = (*pools, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0]), x, x, 8, 32)
    callable_for("packed_append", args)(*args)
    rows = unpack_rows(pools[0][0, 0, :3], 8, 32).unflatten(-1, (2, 32))
    assert rows.isnan().all(-1).tolist() == [[True, False], [False, True], [True, False]]
    assert not rows[0, 1].isnan().any()


def test_what_no_kernel_takes_runs_the_definition_and_says_why() -> None:
    for case, reason in (
        ((4, 0, 16, 8, 8, F32), "do not fill vectors"),
        ((8, 0, 24, 64, 64, F32), "pages of 24"),
        ((4, 8, 16, 64, 64, F32), "groups of 8 at 4 bits do not fill"),
    ):
        given = pool(case, [40], 1)
        args = (torch.randn(1, 3, 1, case[3]), *given, *case[:2])
        assert reason in reason_for("packed_attention", args)
        want = all_ops()["packed_attention"].definition(*args)
        torch.testing.assert_close(callable_for("packed_attention", args)(*args), want)
    found = select_for_node("packed_attention", args, TARGET, training=True)
    assert isinstance(found, Refusal)
    assert "no gradient" in found.reason


def wrong_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    k, v, table, lengths = pool(CASES[0], [40], 1)
    q, rows = torch.randn(1, 3, 1, 64), torch.randn(1, 1, 1, 64)
    return {
        "names a page": ("packed_attention", (q, k, v, table + 100, lengths, 8)),
        "lengths must be int64": ("packed_attention", (q, k, v, table, lengths.int(), 8)),
        "has no page": ("packed_append", (k, v, table, lengths + 1000, rows, rows, 8)),
    }


@pytest.mark.parametrize("message", sorted(wrong_calls()))
def test_a_wrong_index_is_an_error_and_not_a_read_outside(message: str) -> None:
    op, args = wrong_calls()[message]
    with pytest.raises(RuntimeError, match=message):
        callable_for(op, args)(*args)


@pytest.mark.parametrize("op", ["packed_attention", "packed_append"])
def test_ops_agree_with_their_fakes(op: str) -> None:
    k, v, table, lengths = pool(CASES[0], [70, 5], 3)
    table[0, 1] = k.shape[0] - 1
    args = (torch.randn(2, 9, 1, 64), k, v, table, lengths, 8, 0, None, None)
    if op == "packed_append":
        args = (k, v, table, lengths - 1, *[torch.randn(2, 3, 1, 64)] * 2, 8, 0)
    choice = select_for_node(op, args, TARGET, training=False)
    assert isinstance(choice, KernelChoice), str(choice)
    given, _ = choice.rewrite_args(args)
    torch.library.opcheck(choice.op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["avx2", "avx512"])
def test_every_instruction_set_compiles(arch: str) -> None:
    for family in PACKED_FAMILIES:
        for args in family.examples():
            key = family.configure(args, Target("cpu", arch))
            assert not isinstance(key, Refusal), str(key)
            compile_cpp(family.source(key)[1], arch, {HEADER: TORCH_ABI})
