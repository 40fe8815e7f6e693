"""The generated C++ of the paged ops against their definitions, and the way eager callers reach it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.ops import all_ops
from tilewright.compiler.parity import assert_parity
from tilewright.frontends.api import explain
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.paged.call import callable_for, reason_for
from tilewright.kernels.paged.family import PAGED_FAMILIES
from tilewright.kernels.paged.rotate_family import ROTATE_ROWS
from tilewright.kernels.table import KernelChoice, host_target, select_for_node
from tilewright.passes.memory.quest_kv import QuestKV
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(17)


def pool(
    lengths: list[int], hkv: int, page: int, size: int, value: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """(k_pages, v_pages, page_table, lengths): pages in any order, NaN where no token was written, some
    pages of the first sequence given up."""
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
    table[0, 1 : width - 2 : 5] = -1
    return k, v, table, torch.tensor(lengths)


def lists(batch: int, heads: int, size: int) -> torch.Tensor:
    """int32 [batch, heads, size]: about half of 0 .. size - 1 in any order, -1 between."""
    entries = torch.where(torch.rand(batch, heads, size) > 0.5, torch.arange(size), -1)
    return entries[:, :, torch.randperm(size)].to(torch.int32)


def check(op: str, args: tuple[Any, ...]) -> None:
    """The kernel through the table and through `callable_for`, against the definition."""
    choice = select_for_node(op, args, TARGET, training=False)
    assert isinstance(choice, KernelChoice), str(choice)
    given, _ = choice.rewrite_args(args)
    assert reason_for(op, args) == ""
    results = choice.op(*given), callable_for(op, args)(*args)
    want = all_ops()[op].definition(*args)
    for got in results:
        compare(got, want)


def compare(got: Any, want: Any) -> None:
    (out, lse), (right, total) = got, want
    assert lse.dtype == torch.float32
    if not bool((total == -math.inf).all()):  # zeros would pass
        assert_parity(out, right, **BOUNDS[out.dtype])
    torch.testing.assert_close(lse, total, rtol=1e-5, atol=2e-5)
    empty = total == -math.inf
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))


RAGGED = [700, 5, 131, 16]


@pytest.mark.parametrize(
    ("page", "size", "value", "dtype"),
    [(8, 8, 24, F32), (16, 64, 64, F32), (32, 128, 128, BF16), (64, 40, 16, F16), (128, 96, 48, F32)],
)
def test_all_pages(page: int, size: int, value: int, dtype: torch.dtype) -> None:
    """Ragged lengths, G = 1 to 5, one and several new tokens, more rows than a task takes."""
    for hkv, heads, tokens in ((3, 9, 1), (4, 4, 5), (1, 5, 3), (3, 6, 2), (2, 8, 40), (1, 1, 1)):
        given = pool(RAGGED, hkv, page, size, value, dtype)
        q = 2 * torch.randn(4, heads, tokens, size).to(dtype)
        check("paged_attention", (q, *given))


def test_padding_scale_and_strides() -> None:
    k, v, table, lengths = pool(RAGGED, 3, 16, 64, 64, F32)
    first = torch.tensor([3, 5, 0, 17])
    rows = torch.randn(4, 5, 9, 64).transpose(1, 2)
    check("paged_attention", (rows, k, v, table, lengths, first, None, 0.3))
    wide = torch.stack([k, v], 1).flatten(1, 2)  # the pool as a slice of a larger one
    check("paged_attention", (rows, wide[:, :3], wide[:, 3:], table, lengths, first, None, 0.3))


@pytest.mark.parametrize(("page", "size", "dtype", "padded"), [(16, 64, F32, False), (8, 16, BF16, True)])
def test_picked_pages(page: int, size: int, dtype: torch.dtype, padded: bool) -> None:
    given = pool(RAGGED, 3, page, size, size, dtype)
    first = torch.tensor([3, 1, 0, 16]) if padded else None
    for heads, tokens, own in ((9, 1, 1), (9, 5, 3), (3, 1, 3)):
        q = torch.randn(4, heads, tokens, size).to(dtype)
        picked = lists(4, own, given[2].shape[1])
        check("paged_attention", (q, *given, first, picked))
    check("paged_attention", (q, *given, first, torch.full((4, 1, 3), -1, dtype=torch.int32)))


@pytest.mark.parametrize(("page", "size", "dtype", "padded"), [(16, 64, F32, False), (32, 24, F16, True)])
def test_single_tokens(page: int, size: int, dtype: torch.dtype, padded: bool) -> None:
    given = pool(RAGGED, 3, page, size, size, dtype)
    first = torch.tensor([3, 1, 0, 16]) if padded else None
    for heads, tokens, own in ((9, 1, 1), (9, 5, 3), (3, 1, 3)):
        q = torch.randn(4, heads, tokens, size).to(dtype)
        check("token_attention", (q, *given, lists(4, own, given[2].shape[1] * page), first))


def test_the_parts_of_a_long_sequence_are_merged() -> None:
    """More threads make parts of the keys; against float64, since float32 sums of 9000 differ by order."""
    given = pool([9000], 3, 16, 64, 64, F32)
    args = (torch.randn(1, 9, 1, 64), *given)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(callable_for("paged_attention", args)(*args))
    finally:
        torch.set_num_threads(before)
    wide = [x.double() if x.is_floating_point() else x for x in args]
    want, total = (x.float() for x in all_ops()["paged_attention"].definition(*wide))
    for out, lse in results:
        assert_parity(out, want, rms=3e-6, ulps=256.0)
        torch.testing.assert_close(lse, total, rtol=1e-6, atol=1e-5)


def test_a_key_that_is_not_a_number_is_not_hidden() -> None:
    k, v, table, lengths = pool([40], 1, 16, 64, 64, F32)
    table[0] = torch.arange(table.shape[1])
    k[1, 0, 3] = math.nan
    out, lse = callable_for("paged_attention", (torch.randn(1, 3, 1, 64), k, v, table, lengths))(
        torch.randn(1, 3, 1, 64), k, v, table, lengths
    )
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())


@pytest.mark.parametrize(
    ("page", "size", "value", "dtype", "planes"),
    [(16, 64, 64, F32, True), (8, 8, 24, BF16, True), (32, 24, 16, F16, False)],
)
def test_append(page: int, size: int, value: int, dtype: torch.dtype, planes: bool) -> None:
    """Chunks that begin and end inside pages, into pages in use; bit for bit."""
    k, v, table, lengths = pool([200, 180, 150], 3, page, size, value, dtype)
    table[0] = table.max() + 1 + torch.arange(table.shape[1]) if planes else table[0]
    more = (
        k.new_full((table.shape[1] + 1, *k.shape[1:]), 9.0),
        v.new_full((table.shape[1] + 1, *v.shape[1:]), 9.0),
    )
    k, v = torch.cat([k, more[0]]), torch.cat([v, more[1]])
    table[0] = torch.where(table[0] < 0, k.shape[0] - 1, table[0])
    low, high = (torch.randn(2, k.shape[0], 3, size).to(dtype)).unbind()
    mine, theirs = ([x.clone() for x in (k, v, low, high)] for _ in range(2))
    at = torch.tensor([0, 7, 31])
    for tokens in (1, 5, 1, page, 2 * page + 3):
        rows = torch.randn(3, 3, tokens, size).to(dtype), torch.randn(3, tokens, 3, value).to(dtype)
        rows[0][1, 2, 0, 3] = math.nan
        for pages, run in ((mine, callable_for), (theirs, None)):
            args = (*pages[:2], table, at, rows[0], rows[1].transpose(1, 2), *(pages[2:] if planes else ()))
            (run("paged_append", args) if run else all_ops()["paged_append"].definition)(*args)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        at = at + tokens
    assert reason_for("paged_append", args) == ""


@pytest.mark.parametrize(
    ("size", "dtype", "group", "padded"), [(64, F32, "max", False), (128, BF16, "sum", True)]
)
def test_bounds(size: int, dtype: torch.dtype, group: str, padded: bool) -> None:
    k, _, table, lengths = pool(RAGGED, 3, 16, size, size, dtype)
    low, high = k.nan_to_num(math.inf).amin(2), k.nan_to_num(-math.inf).amax(2)
    low[int(table[2, 0]), 0, 0] = math.nan
    first = torch.tensor([3, 1, 0, 16]) if padded else None
    for heads in (3, 9, 15):
        args = (torch.randn(4, heads, 1, size).to(dtype), low, high, table, lengths, 16, first, group)
        assert reason_for("page_bounds", args) == ""
        got, want = callable_for("page_bounds", args)(*args), all_ops()["page_bounds"].definition(*args)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("size", "dtype", "causal", "padded"), [(64, F32, True, False), (72, BF16, False, True)]
)
def test_mass(size: int, dtype: torch.dtype, causal: bool, padded: bool) -> None:
    for tokens, keys, heads in ((37, 101, 9), (1, 16, 3), (20, 20, 3)):
        q, k = torch.randn(2, heads, tokens, size).to(dtype), torch.randn(2, 3, keys, size).to(dtype)
        lse = torch.randn(2, heads, tokens) + 6
        lse[0, 0, 0] = -math.inf
        args = (q, k, lse, torch.tensor([0, 9]) if padded else None, None, causal)
        assert reason_for("attention_mass", args) == ""
        got = callable_for("attention_mass", args)(*args)
        torch.testing.assert_close(got, all_ops()["attention_mass"].definition(*args), rtol=2e-5, atol=1e-5)


def test_top_pages() -> None:
    bounds = torch.randint(-3, 9, (2, 3, 700)).float()
    bounds[0, 0], bounds[0, 1, 5:] = -math.inf, -math.inf
    bounds[1, 1, 7], bounds[1, 2, ::2], bounds[1, 0, ::3] = math.nan, -0.0, math.inf
    for rows in (bounds, bounds.transpose(0, 1), bounds[:, :, :9], bounds[:, :, :0]):
        for count in (1, 40, 900):
            assert reason_for("top_pages", (rows, count)) == ""
            got = callable_for("top_pages", (rows, count))(rows, count)
            assert torch.equal(got, all_ops()["top_pages"].definition(rows, count))


@pytest.mark.parametrize(("size", "dtype"), [(64, F32), (72, BF16), (8, F16), (128, F32)])
def test_merging_parts(size: int, dtype: torch.dtype) -> None:
    for parts, heads, tokens in ((12, 9, 1), (1, 3, 5), (3, 4, 40)):
        lses = torch.randn(parts, heads, tokens) * 30
        lses[0, 0], lses[:, -1, -1] = -math.inf, -math.inf
        outs = torch.randn(parts, heads, tokens, size).to(dtype)
        outs[:, -1, -1] = 0
        args = (outs.transpose(1, 2).contiguous().transpose(1, 2), lses)
        assert reason_for("merge_parts", args) == ""
        got = callable_for("merge_parts", args)(*args)
        weights = torch.softmax(lses.double(), 0).nan_to_num(0.0)
        want = torch.stack([(weights[..., None] * outs.double()).sum(0)]), lses.double().logsumexp(0)[None]
        for ours, theirs, exact in zip(got, all_ops()["merge_parts"].definition(*args), want, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-5)
            torch.testing.assert_close(theirs.double(), exact, rtol=2e-6, atol=1e-5)
        lses[0, 1, 0] = math.nan
        assert callable_for("merge_parts", args)(*args)[1].isnan().sum() == 1


@pytest.mark.parametrize(("dtype", "padded"), [(F32, True), (F32, False), (BF16, True)])
def test_pages_are_picked_as_the_policy_picks_them(dtype: torch.dtype, padded: bool) -> None:
    k, _, table, lengths = pool(RAGGED, 3, 16, 64, 64, dtype)
    low, high = k.nan_to_num(math.inf).amin(2), k.nan_to_num(-math.inf).amax(2)
    first = torch.tensor([3, 1, 0, 16]) if padded else None
    for count, sink in ((3, True), (2, False), (50, True)):
        q = torch.randn(4, 9, 1, 64).to(dtype)
        args = (q, low, high, table, lengths, 16, count, first, sink)
        assert reason_for("pick_pages", args) == ""
        got = callable_for("pick_pages", args)(*args)
        bounds = callable_for("page_bounds", (*args[:6], first, "max"))(*args[:6], first, "max")
        policy = QuestKV(budget=16 * max(3, count), sink_page=sink)
        if count >= 3:
            assert torch.equal(got, policy.picked(bounds, lengths, first))
        assert torch.equal(got, all_ops()["pick_pages"].definition(*args))
        newest = ((lengths - 1) // 16)[:, None, None]
        assert bool((got == newest).any(-1).all())


def test_what_no_kernel_takes_runs_the_definition_and_says_why() -> None:
    given = pool([40], 1, 16, 64, 64, F32)
    odd = pool([40], 1, 16, 12, 12, F32)
    for args, reason in (
        ((torch.randn(1, 3, 1, 64).double(), *(x.double() for x in given[:2]), *given[2:]), "float64"),
        ((torch.randn(1, 3, 1, 12), *odd), "12 is not a multiple of"),
        ((torch.randn(1, 3, 1, 64), *pool([40], 1, 24, 64, 64, F32)), "pages of 24"),
    ):
        assert reason in reason_for("paged_attention", args)
        want = all_ops()["paged_attention"].definition(*args)
        torch.testing.assert_close(callable_for("paged_attention", args)(*args), want)
    found = select_for_node("paged_attention", (torch.randn(1, 3, 1, 64), *given), TARGET, training=True)
    assert isinstance(found, Refusal)
    assert "no gradient" in found.reason


def wrong_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    k, v, table, lengths = pool([40], 1, 16, 64, 64, F32)
    q, rows, low = torch.randn(1, 3, 1, 64), torch.randn(1, 1, 1, 64), torch.zeros(k.shape[0], 1, 64)
    one = torch.zeros(1, 1, 1, dtype=torch.int32)
    return {
        "names a page": ("paged_attention", (q, k, v, table + 100, lengths)),
        "picked is outside": ("paged_attention", (q, k, v, table, lengths, None, one + 99)),
        "positions is outside": ("token_attention", (q, k, v, table, lengths, one - 2)),
        "lengths must be int64": ("paged_attention", (q, k, v, table, lengths.int())),
        "has no page": ("paged_append", (k, v, table, lengths + 1000, rows, rows)),
        "page_table must be int32": ("page_bounds", (q, low, low, table.long(), lengths, 16)),
        "outs must be": ("merge_parts", (q, torch.zeros(1, 2, 1))),
    }


@pytest.mark.parametrize("message", sorted(wrong_calls()))
def test_a_wrong_index_is_an_error_and_not_a_read_outside(message: str) -> None:
    op, args = wrong_calls()[message]
    with pytest.raises(RuntimeError, match=message):
        callable_for(op, args)(*args)


@pytest.mark.parametrize("op", ["paged_attention", "token_attention", "paged_append"])
def test_ops_agree_with_their_fakes(op: str) -> None:
    k, v, table, lengths = (
        x.nan_to_num() if x.is_floating_point() else x for x in pool(RAGGED, 3, 16, 64, 64, F32)
    )
    table[0] = torch.where(table[0] < 0, k.shape[0] - 1, table[0])
    args: dict[str, tuple[Any, ...]] = {
        "paged_attention": (torch.randn(4, 9, 1, 64), k, v, table, lengths),
        "token_attention": (torch.randn(4, 9, 1, 64), k, v, table, lengths, lists(4, 1, 30)),
        "paged_append": (
            k,
            v,
            table,
            lengths - 1,
            *[torch.randn(4, 3, 1, 64)] * 2,
            *torch.zeros(2, *k.shape[:2], 64),
        ),
    }
    choice = select_for_node(op, args[op], TARGET, training=False)
    assert isinstance(choice, KernelChoice), str(choice)
    given, _ = choice.rewrite_args(args[op])
    torch.library.opcheck(choice.op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_avx512_compiles(dtype: torch.dtype) -> None:
    """Nothing here can run it."""
    for family in (*PAGED_FAMILIES, ROTATE_ROWS):
        if family.op == "top_pages" and dtype != F32:
            continue  # bounds are always float32
        args = next(a for a in family.examples() if a[0].dtype == dtype)
        key = family.configure(args, Target("cpu", "avx512"))
        assert not isinstance(key, Refusal), str(key)
        compile_cpp(family.source(key)[1], "avx512", {HEADER: TORCH_ABI})


class Step(torch.nn.Module):
    """A decode step over a pool that it writes."""

    def forward(self, q: Any, k: Any, v: Any, k_pages: Any, v_pages: Any, table: Any, lengths: Any) -> Any:
        ops.paged_append(k_pages, v_pages, table, lengths - 1, k, v)
        return ops.paged_attention(q, k_pages, v_pages, table, lengths)[0] * 2


def test_a_compiled_step_writes_the_pool_and_runs_both_kernels() -> None:
    k_pages, v_pages, table, lengths = pool([100], 3, 16, 64, 64, F32)
    table[0] = torch.arange(table.shape[1]).clamp(max=k_pages.shape[0] - 1)
    k_pages, v_pages = k_pages.nan_to_num(), v_pages.nan_to_num()
    rows = torch.randn(1, 9, 1, 64), torch.randn(1, 3, 1, 64), torch.randn(1, 3, 1, 64)
    mine, theirs = ([k_pages.clone(), v_pages.clone()] for _ in range(2))
    step, options = Step().eval(), {"pipeline": "exact", "lower": "eager"}
    with torch.no_grad():
        report = explain(step, (*rows, *mine, table, lengths), **options)
        got = torch.compile(step, backend="tilewright", options=options)(*rows, *mine, table, lengths)
        want = step(*rows, *theirs, table, lengths)
    kernels = {row["op"]: row["kernel"] for row in report.kernels}
    assert kernels["paged_append"].startswith("paged_append_")
    assert kernels["paged_attention"].startswith("paged_attention_")
    torch.testing.assert_close(got, want)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1], theirs[1])
