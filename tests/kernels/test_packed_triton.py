"""Generated Triton over packed rows in the interpreter, against the definitions; its text."""

from __future__ import annotations

import ast
import math
import os
from typing import Any

import pytest
import torch

from tilewright.compiler.ops import all_ops
from tilewright.compiler.ops.packed import pack_rows, packed_width, unpack_rows
from tilewright.compiler.parity import assert_parity
from tilewright.kernels.load import build_kernel, store_triton_source
from tilewright.kernels.paged import triton
from tilewright.kernels.paged.packed_family import PACKED_FAMILIES
from tilewright.kernels.table import full_args
from tilewright.runtime.contracts import KernelKey, Target
from tilewright.runtime.offline import compile_offline

TARGET = Target("cuda", "sm_80")
FAMILIES = {family.op: family for family in PACKED_FAMILIES}
in_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
# float16 products take keys and values that were rounded to it.
BOUNDS = {torch.float32: {"rms": 2e-6, "ulps": 256.0}, torch.float16: {"rms": 1e-3, "ulps": 8.0}}
FIRST = torch.tensor([3, 0, 17])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(37)


def run(op: str, args: tuple[Any, ...]) -> Any:
    family, full = FAMILIES[op], full_args(op, args)
    shapes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in full]
    key = family.configure(shapes, TARGET)
    assert isinstance(key, KernelKey), str(key)
    return build_kernel(family, key).op(*family.rewrite_args(key, full))


def pool(page: int, size: int, value: int, bits: int, group: int) -> tuple[torch.Tensor, ...]:
    """Three ragged sequences over shuffled pages, NaNs where no token is; the first gave up a page."""
    lengths, width = [90, 7, 33], -(-90 // page) + 1
    count = 3 * width
    k, v = (torch.randn(count, 2, page, d) for d in (size, value))
    table = torch.randperm(count).view(3, width).to(torch.int32)
    for b, n in enumerate(lengths):
        for i in range(width):
            k[int(table[b, i]), :, max(0, n - i * page) :] = math.nan
            v[int(table[b, i]), :, max(0, n - i * page) :] = math.nan
        table[b, -(-n // page) :] = -1
    table[0, 1] = -1
    return pack_rows(k, bits, group), pack_rows(v, bits, group), table, torch.tensor(lengths)


def check(args: tuple[Any, ...]) -> None:
    out, lse = run("packed_attention", args)
    want, total = all_ops()["packed_attention"].definition(*args)
    assert_parity(out, want, **BOUNDS[out.dtype])
    torch.testing.assert_close(lse, total, rtol=1e-4, atol=5e-3 if out.dtype == torch.float16 else 1e-4)


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("page", "size", "value", "bits", "group", "dtype", "tokens"),
    [
        (16, 16, 16, 8, 0, torch.float32, 1),
        (8, 24, 40, 4, 0, torch.float32, 5),
        (8, 24, 48, 4, 8, torch.float32, 1),
        (32, 16, 32, 8, 8, torch.float16, 20),
    ],
)
def test_attention(
    page: int, size: int, value: int, bits: int, group: int, dtype: torch.dtype, tokens: int
) -> None:
    q, given = 2 * torch.randn(3, 6, tokens, size).to(dtype), pool(page, size, value, bits, group)
    check((q, *given, bits, group))
    check((q, *given, bits, group, FIRST, 0.4))


@in_interpreter
@pytest.mark.interpreter
def test_many_parts_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "PART_KEYS", 16)
    check((torch.randn(3, 4, 1, 16), *pool(16, 16, 16, 4, 0), 4, 0, FIRST))


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 8)])
def test_append(bits: int, group: int) -> None:
    """Chunks that begin and end inside pages; codes agree bit for bit, -0 stands for 0 among the numbers."""
    pools = [
        torch.randint(0, 256, (12, 2, 8, packed_width(size, bits, group)), dtype=torch.uint8)
        for size in (16, 24)
    ]
    mine, theirs = ([x.clone() for x in pools] for _ in range(2))
    table, at = torch.arange(12, dtype=torch.int32).view(3, 4), torch.tensor([0, 7, 11])
    table[2, 3] = -1  # without a page nothing is written
    for tokens in (1, 17):
        rows = torch.randn(3, 2, tokens, 16), torch.randn(3, 2, tokens, 24)
        rows[0][0, 0, 0], rows[0][1, 1, 0] = 0.0, rows[0][1, 1, 0].abs() + 1
        args = (table, at, *rows, bits, group)
        run("packed_append", (*mine, *args))
        held = (table[:2], at[:2], rows[0][:2], rows[1][:2], bits, group)
        all_ops()["packed_append"].definition(*theirs, *held)
        short = (table[2:], at[2:], *[x[2:, :, : 24 - int(at[2])] for x in rows], bits, group)
        all_ops()["packed_append"].definition(*theirs, *short)
        at = at + tokens
        for a, b, size in zip(mine, theirs, (16, 24), strict=True):
            codes = size * bits // 8
            assert torch.equal(a[..., :codes], b[..., :codes])
            a, b = (unpack_rows(x, bits, group) for x in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@in_interpreter
@pytest.mark.interpreter
def test_what_is_not_finite_stands_for_nans_in_its_group() -> None:
    x = torch.randn(1, 1, 3, 16)
    x[0, 0, 0, 3], x[0, 0, 1, 9], x[0, 0, 2, 0] = math.nan, math.inf, -math.inf
    pools = [torch.zeros(1, 1, 8, packed_width(16, 4, 8), dtype=torch.uint8) for _ in range(2)]
    run("packed_append", (*pools, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0]), x, x, 4, 8))
    rows = unpack_rows(pools[0][0, 0, :3], 4, 8).unflatten(-1, (2, 8))
    assert rows.isnan().all(-1).tolist() == [[True, False], [False, True], [True, False]]


def test_what_is_off_is_absent_from_the_text() -> None:
    texts = []
    for args in FAMILIES["packed_attention"].examples():
        key = FAMILIES["packed_attention"].configure(args, TARGET)
        assert isinstance(key, KernelKey), str(key)
        text = FAMILIES["packed_attention"].source(key)[1]
        ast.parse(text)
        assert ("first" in text) == (args[7] is not None)
        assert ("shift" in text) == (args[5] == 4)
        assert ("k_place" in text) == (args[6] > 0)
        texts.append(text)
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120"])
def test_the_tiles_of_a_prefill_chunk_do_not_spill(arch: str) -> None:
    family = FAMILIES["packed_attention"]
    assert family.triton is not None
    for args in family.examples():
        key = family.configure(args, Target("cuda", arch))
        assert isinstance(key, KernelKey), str(key)
        name, text = family.source(key)
        parameters = dict(family.triton.parameters(key))
        used = compile_offline(
            store_triton_source(name, text), name, parameters, triton.many_rows(key), key.target, num_warps=8
        )
        assert used.spill_bytes == 0
