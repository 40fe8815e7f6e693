"""Generated Triton for the paged ops in the interpreter, against the definitions; its text."""

from __future__ import annotations

import ast
import math
import os
from typing import Any

import pytest
import torch

from tilewright.compiler.ops import all_ops
from tilewright.compiler.parity import assert_parity
from tilewright.kernels.load import build_kernel, store_triton_source
from tilewright.kernels.paged import triton
from tilewright.kernels.paged.family import PAGED_FAMILIES
from tilewright.kernels.paged.merge_family import MERGE_PARTS
from tilewright.kernels.table import full_args
from tilewright.runtime.contracts import KernelKey, Target
from tilewright.runtime.offline import compile_offline

TARGET = Target("cuda", "sm_80")
FAMILIES = {family.op: family for family in (*PAGED_FAMILIES, MERGE_PARTS)}
in_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
BOUNDS = {torch.float32: {"rms": 2e-6, "ulps": 256.0}, torch.float16: {"rms": 1e-3, "ulps": 4.0}}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(23)


def run(op: str, args: tuple[Any, ...]) -> Any:
    family, full = FAMILIES[op], full_args(op, args)
    shapes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in full]
    key = family.configure(shapes, TARGET)
    assert isinstance(key, KernelKey), str(key)
    return build_kernel(family, key).op(*family.rewrite_args(key, full))


def pool(page: int, size: int, value: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Three ragged sequences over shuffled pages, NaN where no token is; the first gave up a page."""
    lengths, width = [90, 7, 33], -(-90 // page) + 1
    count = 3 * width
    k, v = (torch.randn(count, 2, page, d).to(dtype) for d in (size, value))
    table = torch.randperm(count).view(3, width).to(torch.int32)
    for b, n in enumerate(lengths):
        for i in range(width):
            k[int(table[b, i]), :, max(0, n - i * page) :] = math.nan
            v[int(table[b, i]), :, max(0, n - i * page) :] = math.nan
        table[b, -(-n // page) :] = -1
    table[0, 1] = -1
    return k, v, table, torch.tensor(lengths)


def check(op: str, args: tuple[Any, ...]) -> None:
    out, lse = run(op, args)
    want, total = all_ops()[op].definition(*args)
    assert_parity(out, want, **BOUNDS[out.dtype])
    torch.testing.assert_close(lse, total, rtol=1e-4, atol=1e-4)


FIRST = torch.tensor([3, 0, 17])


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("parts", "tokens", "size", "dtype"),
    [(1, 1, 16, torch.float32), (5, 3, 24, torch.float32), (7, 1, 64, torch.float16)],
)
def test_parts_are_merged(parts: int, tokens: int, size: int, dtype: torch.dtype) -> None:
    """Also where some or all parts have no key."""
    outs, lses = torch.randn(parts, 4, tokens, size).to(dtype), 30 * torch.randn(parts, 4, tokens)
    lses[0, 1], lses[:, 2] = -math.inf, -math.inf
    outs[:, 2] = 0.0
    check("merge_parts", (outs.transpose(1, 2).contiguous().transpose(1, 2), lses))


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("page", "size", "value", "dtype", "tokens"),
    [(16, 16, 16, torch.float32, 1), (8, 24, 40, torch.float32, 5), (32, 16, 32, torch.float16, 20)],
)
def test_all_pages(page: int, size: int, value: int, dtype: torch.dtype, tokens: int) -> None:
    q, given = 2 * torch.randn(3, 6, tokens, size).to(dtype), pool(page, size, value, dtype)
    check("paged_attention", (q, *given))
    check("paged_attention", (q, *given, FIRST, None, 0.4))


@in_interpreter
@pytest.mark.interpreter
def test_many_parts_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of few keys, some of them empty."""
    monkeypatch.setattr(triton, "PART_KEYS", 16)
    q, given = torch.randn(3, 4, 1, 16), pool(16, 16, 16)
    check("paged_attention", (q, *given, FIRST))
    none = torch.full((3, 1, 40), -1, dtype=torch.int32)
    out, lse = run("paged_attention", (q, *given, None, none))
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


def lists(heads: int, size: int) -> torch.Tensor:
    entries = torch.where(torch.rand(3, heads, size) > 0.5, torch.arange(size), -1)
    return entries[:, :, torch.randperm(size)].to(torch.int32)


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize("heads", [1, 2])
def test_picked_pages_and_single_tokens(heads: int) -> None:
    q, given = torch.randn(3, 6, 3, 16), pool(8, 16, 16)
    width = given[2].shape[1]
    check("paged_attention", (q, *given, FIRST, lists(heads, width)))
    check("token_attention", (q, *given, lists(heads, width * 8), FIRST))


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize("planes", [True, False])
def test_append(planes: bool) -> None:
    k, v, table, _ = pool(8, 16, 24)
    table = torch.arange(table.numel(), dtype=torch.int32).view(table.shape)
    low, high = torch.randn(2, k.shape[0], 2, 16).unbind()
    mine, theirs = ([x.clone() for x in (k, v, low, high)] for _ in range(2))
    at = torch.tensor([0, 7, 31])
    for tokens in (1, 19):
        rows = torch.randn(3, 2, tokens, 16), torch.randn(3, 2, tokens, 24)
        rows[0][1, 0, 0, 3] = math.nan
        for pages, call in ((mine, run), (theirs, None)):
            args = (*pages[:2], table, at, *rows, *(pages[2:] if planes else ()))
            all_ops()["paged_append"].definition(*args) if call is None else call("paged_append", args)
        at = at + tokens
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize(("group", "first"), [("max", None), ("sum", FIRST)])
def test_bounds(group: str, first: torch.Tensor | None) -> None:
    k, _, table, lengths = pool(8, 24, 16)
    low, high = k.nan_to_num(math.inf).amin(2), k.nan_to_num(-math.inf).amax(2)
    args = (torch.randn(3, 6, 1, 24), low, high, table, lengths, 8, first, group)
    torch.testing.assert_close(run("page_bounds", args), all_ops()["page_bounds"].definition(*args))


def greatest(row: list[float], count: int) -> list[int]:
    """By sorting; a NaN is the greatest, of equal ones the first."""
    worth = [(math.isnan(x), 0.0 if math.isnan(x) else x) for x in row]
    best = sorted((i for i in range(len(row)) if row[i] != -math.inf), key=lambda i: worth[i], reverse=True)
    some = min(count, len(row))
    return (sorted(best[:some]) + [-1] * some)[:some]


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1, 40, 1024, 2500])
def test_top_pages(size: int) -> None:
    """Many ties, zeros of both signs, NaNs of both signs, infinities, digits that differ at the end only."""
    bounds = torch.randint(-3, 9, (2, 4, size)).float()
    bounds[0, 0], bounds[0, 1, 5:], bounds[1, 2, ::2] = -math.inf, -math.inf, -0.0
    bounds[1, 1, ::7], bounds[1, 1, 1::7], bounds[1, 0, ::3] = math.nan, -torch.tensor(math.nan), math.inf
    bounds[0, 3] = 1 + torch.randint(0, 40, (size,)) * 2.0**-23
    bounds[1, 3] = -bounds[0, 3].flip(0) * torch.finfo(torch.float32).tiny / 4
    for rows in (bounds, bounds.transpose(0, 1), bounds[:, :, : size // 2]):
        for count in (1, 17, size, size + 9):
            got = run("top_pages", (rows, count))
            assert got.dtype == torch.int32
            assert torch.equal(got, all_ops()["top_pages"].definition(rows, count))
            want = [greatest(row, count) for row in rows.flatten(0, 1).tolist()]
            assert got.flatten(0, 1).tolist() == want


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "padded"), [(torch.float32, True), (torch.float16, False)])
def test_pages_are_picked(dtype: torch.dtype, padded: bool) -> None:
    """Keys and queries of whole numbers, so that bounds are exact and often equal."""
    k, _, table, lengths = pool(8, 24, 16)
    low, high = (x.round().to(dtype) for x in (k.nan_to_num(9).amin(2), k.nan_to_num(-9).amax(2)))
    low[int(table[2, 3])] = math.nan
    lengths[1] = 0  # nothing is held, and yet the first page is forced
    for count, sink in ((1, True), (3, True), (2, False), (50, True)):
        q = torch.randint(-2, 3, (3, 6, 1, 24)).to(dtype)
        args = (q, low, high, table, lengths, 8, count, FIRST if padded else None, sink)
        got = run("pick_pages", args)
        assert got.shape == (3, 2, min(count, table.shape[1]))
        assert torch.equal(got, all_ops()["pick_pages"].definition(*args))
        bounds = all_ops()["page_bounds"].definition(*args[:6], args[7]).tolist()
        for b, sequence in enumerate(bounds):
            begin, newest = int(FIRST[b]) if padded else 0, int(lengths[b]) - 1
            forced = {newest // 8, *([begin // 8] if sink else [])}
            rows = [[math.inf if i in forced else x for i, x in enumerate(row)] for row in sequence]
            assert got[b].tolist() == [greatest(row, count) for row in rows]


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize(("causal", "first"), [(True, None), (False, torch.tensor([0, 9]))])
def test_mass(causal: bool, first: torch.Tensor | None) -> None:
    q, k, lse = torch.randn(2, 6, 21, 24), torch.randn(2, 2, 45, 24), torch.randn(2, 6, 21) + 5
    lse[1, 2, 3] = -math.inf
    args = (q, k, lse, first, 0.3, causal)
    got, want = run("attention_mass", args), all_ops()["attention_mass"].definition(*args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_is_off_is_absent_from_the_text() -> None:
    family = FAMILIES["paged_attention"]
    texts = []
    for args in family.examples():
        key = family.configure(args, TARGET)
        assert isinstance(key, KernelKey), str(key)
        text = family.source(key)[1]
        ast.parse(text)
        assert ("picked" in text) == (args[6] is not None)
        assert ("first" in text) == (args[5] is not None)
        texts.append(text)
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120"])
def test_the_tiles_of_a_prefill_chunk_do_not_spill(arch: str) -> None:
    family = FAMILIES["paged_attention"]
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
