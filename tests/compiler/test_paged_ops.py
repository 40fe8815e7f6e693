"""The definitions of the paged ops against attention over masks built token by token."""

from __future__ import annotations

import math

import pytest
import torch

from tilewright.compiler import ops


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(21)


class Pool:
    """Sequences kept twice: as plain rows [B, Hkv, S, D], and scattered over shuffled pages."""

    def __init__(self, lengths, hkv=3, page=8, size=16, value=24, dtype=torch.float32, spare=3):
        batch, most = len(lengths), max(lengths)
        self.page, self.width = page, -(-most // page) + 1
        count = sum(-(-n // page) for n in lengths) + spare
        self.k, self.v = (torch.randn(batch, hkv, self.width * page, d).to(dtype) for d in (size, value))
        self.k_pages = torch.full((count, hkv, page, size), math.nan, dtype=dtype)
        self.v_pages = torch.full((count, hkv, page, value), math.nan, dtype=dtype)
        self.table = torch.full((batch, self.width), -1, dtype=torch.int32)
        self.lengths = torch.tensor(lengths)
        order = iter(torch.randperm(count).tolist())
        for b, n in enumerate(lengths):
            for i in range(-(-n // page)):
                self.table[b, i] = at = next(order)
                here = range(i * page, min(n, i * page + page))
                self.k_pages[at, :, : len(here)] = self.k[b, :, here]
                self.v_pages[at, :, : len(here)] = self.v[b, :, here]

    def query(self, heads, tokens=1):
        return 2 * torch.randn(len(self.lengths), heads, tokens, self.k.shape[3]).to(self.k.dtype)

    def given(self):
        return self.k_pages, self.v_pages, self.table, self.lengths


def seen(pool, heads, tokens, first=None, chosen=None):
    """bool [B, H, T, S] of what each query attends to; chosen(b, kv head, position) says what is listed."""
    batch, hkv, keys = pool.k.shape[:3]
    kept = torch.zeros(batch, heads, tokens, keys, dtype=torch.bool)
    for b in range(batch):
        length, start = int(pool.lengths[b]), 0 if first is None else int(first[b])
        for h in range(heads):
            for t in range(tokens):
                for j in range(start, min(length, length - tokens + t + 1)):
                    held = int(pool.table[b, j // pool.page]) >= 0
                    kept[b, h, t, j] = held and (chosen is None or chosen(b, h // (heads // hkv), j))
    return kept


def masked(q, pool, kept, scale):
    group = q.shape[1] // pool.k.shape[1]
    k, v = (x.repeat_interleave(group, 1).double() for x in (pool.k, pool.v))
    scores = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~kept, -math.inf)
    out = torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, attn_mask=kept, scale=scale)
    return out.nan_to_num(0.0), torch.logsumexp(scores, -1)


def check(result, q, pool, kept, scale=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    (out, lse), (want, total) = result, masked(q, pool, kept, scale)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[q.dtype]
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), want, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), total, rtol=1e-5, atol=1e-5)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hkv", "heads", "tokens"), [(3, 9, 1), (4, 4, 5), (3, 9, 5), (1, 4, 1)])
def test_all_pages_of_ragged_sequences(dtype, hkv, heads, tokens) -> None:
    pool = Pool([37, 5, 16], hkv=hkv, dtype=dtype)
    q = pool.query(heads, tokens)
    check(ops.paged_attention(q, *pool.given()), q, pool, seen(pool, heads, tokens))


def test_padding_scale_and_pages_that_were_given_up() -> None:
    pool = Pool([37, 25, 16])
    pool.table[0, 1] = pool.table[1, 2] = -1
    first, q = torch.tensor([0, 11, 3]), pool.query(9, 5)
    result = ops.paged_attention(q, *pool.given(), first, None, 0.3)
    check(result, q, pool, seen(pool, 9, 5, first), 0.3)


def test_many_queries_go_in_parts() -> None:
    pool = Pool([300], hkv=1, size=8, value=8)
    q = pool.query(2, 290)
    check(ops.paged_attention(q, *pool.given()), q, pool, seen(pool, 2, 290))


def entries(pool, size, heads):
    """Lists in any order with -1 between, and the same as a predicate on (b, kv head, entry)."""
    listed = torch.rand(len(pool.lengths), heads, size) > 0.5
    index = torch.where(listed, torch.arange(size), -1)
    index = index[:, :, torch.randperm(size)].to(torch.int32)
    return index, lambda b, g, i: bool(listed[b, g if heads > 1 else 0, i])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_picked_pages(shared, tokens) -> None:
    pool = Pool([37, 9, 16])
    index, has = entries(pool, pool.width, 1 if shared else 3)
    q, first = pool.query(9, tokens), torch.tensor([2, 0, 9])
    kept = seen(pool, 9, tokens, first, lambda b, g, j: has(b, g, j // pool.page))
    check(ops.paged_attention(q, *pool.given(), first, index), q, pool, kept)


@pytest.mark.parametrize("shared", [True, False])
def test_single_tokens(shared) -> None:
    pool = Pool([37, 9, 16])
    index, has = entries(pool, pool.width * pool.page, 1 if shared else 3)
    q, first = pool.query(9, 5), torch.tensor([2, 0, 9])
    result = ops.token_attention(q, *pool.given(), index, first, 0.2)
    check(result, q, pool, seen(pool, 9, 5, first, has), 0.2)


def test_nothing_to_see_gives_zero_and_minus_infinity() -> None:
    pool = Pool([9, 16])
    none = torch.full((2, 1, 4), -1, dtype=torch.int32)
    for out, lse in (
        ops.paged_attention(pool.query(3), *pool.given(), None, none),
        ops.token_attention(pool.query(3), *pool.given(), none),
        ops.paged_attention(pool.query(3), *pool.given(), torch.tensor([9, 16])),
    ):
        assert bool((out == 0).all())
        assert bool((lse == -math.inf).all())


def test_parts_merge_to_the_whole() -> None:
    pool = Pool([37, 16])
    index = torch.arange(pool.width, dtype=torch.int32).expand(2, 1, -1)
    q = pool.query(9)
    one, two = (torch.where(keep, index, -1) for keep in (index % 2 == 0, index % 2 == 1))
    parts = [ops.paged_attention(q, *pool.given(), None, part) for part in (one, two)]
    out, lse = ops.merge_attention(*parts[0], *parts[1])
    want, total = ops.paged_attention(q, *pool.given())
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_the_rows_and_keeps_the_extremes(dtype) -> None:
    """Chunks of several sizes into used pages: what was there before the first slot is forgotten."""
    pool = Pool([40, 40], dtype=dtype)
    want_k, want_v = pool.k_pages.clone(), pool.v_pages.clone()
    k_pages, v_pages = torch.randn_like(pool.k_pages), torch.randn_like(pool.v_pages)
    low, high = torch.randn(2, *k_pages.shape[:2], 16).to(dtype).unbind()
    at = torch.tensor([0, 5])
    k_pages[pool.table[1, 0].item()] = want_k[pool.table[1, 0].item()]
    v_pages[pool.table[1, 0].item()] = want_v[pool.table[1, 0].item()]
    start = pool.k[1, :, :5]
    low[pool.table[1, 0].item()], high[pool.table[1, 0].item()] = start.amin(1), start.amax(1)
    for tokens in (1, 1, 9, 16, 8):
        rows = [torch.stack([x[b, :, a : a + tokens] for b, a in enumerate(at)]) for x in (pool.k, pool.v)]
        ops.paged_append(k_pages, v_pages, pool.table, at, *rows, low, high)
        at = at + tokens
    for b, end in enumerate(at.tolist()):
        for i in range(end // 8 + (end % 8 > 0)):
            page, n = int(pool.table[b, i]), min(8, end - i * 8)
            assert torch.equal(k_pages[page, :, :n], want_k[page, :, :n])
            assert torch.equal(v_pages[page, :, :n], want_v[page, :, :n])
            assert torch.equal(low[page], want_k[page, :, :n].amin(1))
            assert torch.equal(high[page], want_k[page, :, :n].amax(1))


def test_append_touches_nothing_else() -> None:
    pool = Pool([16, 16])
    before = pool.k_pages.clone()
    rows = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 24)
    ops.paged_append(pool.k_pages, pool.v_pages, pool.table, torch.tensor([3, 15]), *rows)
    changed = (pool.k_pages != before) & ~(pool.k_pages.isnan() & before.isnan())
    assert int(changed.any(-1).sum()) == 2 * 3


@pytest.mark.parametrize("group", ["max", "sum"])
def test_bounds_are_bounds_and_empty_pages_are_never_picked(group) -> None:
    pool = Pool([37, 9], hkv=3)
    pool.table[0, 1] = -1
    first, q = torch.tensor([0, 8]), pool.query(9)
    low = pool.k_pages.nan_to_num(math.inf).amin(2)
    high = pool.k_pages.nan_to_num(-math.inf).amax(2)
    score = ops.page_bounds(q, low, high, pool.table, pool.lengths, 8, first, group)
    assert score.shape == (2, 3, pool.width)
    for b in range(2):
        for i in range(pool.width):
            held = int(pool.table[b, i]) >= 0 and i * 8 < int(pool.lengths[b]) and i * 8 + 8 > int(first[b])
            assert bool((score[b, :, i] == -math.inf).all()) == (not held)
            if held:
                at, rows = int(pool.table[b, i]), q[b, :, 0].view(3, 3, 1, 16)
                want = torch.maximum(rows * low[at][:, None, None], rows * high[at][:, None, None])
                want = want.sum(-1)[..., 0]
                want = want.amax(1) if group == "max" else want.sum(1)
                torch.testing.assert_close(score[b, :, i], want)
                products = (rows * pool.k_pages[at].nan_to_num(-math.inf)[:, None]).sum(-1)
                if group == "max" and i * 8 + 8 <= int(pool.lengths[b]):
                    assert bool((products.amax((1, 2)) <= score[b, :, i] + 1e-5).all())


def test_top_pages_are_the_greatest_in_order() -> None:
    bounds = torch.randint(0, 9, (2, 3, 40)).float()  # many are equal
    bounds[0, 0] = -math.inf
    bounds[0, 1, 5:] = -math.inf
    bounds[1, 1, 7] = math.nan
    for count in (1, 12, 40, 50):
        picked = ops.top_pages(bounds, count)
        assert picked.dtype == torch.int32
        assert picked.shape == (2, 3, min(count, 40))
        for row, got in zip(bounds.flatten(0, 1).tolist(), picked.flatten(0, 1).tolist(), strict=True):
            worth = [math.inf if math.isnan(x) else x for x in row]
            best = sorted((i for i in range(40) if worth[i] > -math.inf), key=lambda i: (-worth[i], i))[
                :count
            ]
            assert got == sorted(best) + [-1] * (len(got) - len(best))


@pytest.mark.parametrize("causal", [True, False])
def test_mass_is_the_column_sum_of_the_probabilities(causal) -> None:
    q, k = torch.randn(2, 6, 300, 8), torch.randn(2, 2, 310, 8)
    first = torch.tensor([0, 305])
    kept = torch.arange(310) >= first[:, None, None, None]
    if causal:
        kept = kept & (torch.arange(310) <= 10 + torch.arange(300)[:, None])
    scores = (q @ k.repeat_interleave(3, 1).transpose(-1, -2) * 0.4).masked_fill(~kept, -math.inf)
    want = torch.softmax(scores.double(), -1).nan_to_num(0.0).sum(2).view(2, 2, 3, 310).sum(2)
    mass = ops.attention_mass(q, k, torch.logsumexp(scores, -1), first, 0.4, causal)
    torch.testing.assert_close(mass.double(), want, rtol=1e-4, atol=1e-5)


def wrong_calls():
    pool = Pool([16, 9])
    q, given = pool.query(9), pool.given()
    k = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 24)
    picked = torch.zeros(2, 2, 1, dtype=torch.int32)
    low = torch.zeros(pool.k_pages.shape[0], 3, 16)
    starts = torch.tensor([16, 3])
    return {
        "H a multiple": lambda: ops.paged_attention(q[:, :4], *given),
        "one floating dtype": lambda: ops.paged_attention(q.double(), *given),
        "page_table is": lambda: ops.paged_attention(q, *given[:2], given[2].long(), given[3]),
        "lengths is": lambda: ops.paged_attention(q, *given[:3], given[3].int()),
        "first is": lambda: ops.paged_attention(q, *given, torch.zeros(3, dtype=torch.int64)),
        "1 or Hkv = 3": lambda: ops.paged_attention(q, *given, None, picked),
        "outside -1 .. 2": lambda: ops.paged_attention(q, *given, None, picked[:, :1] + 3),
        "outside -1 .. 23": lambda: ops.token_attention(q, *given, picked[:, :1] - 2),
        "has no page": lambda: ops.paged_append(*given[:3], starts, *k),
        "come together": lambda: ops.paged_append(*given[:3], starts - 3, *k, low),
        "group = 'mean'": lambda: ops.page_bounds(q, low, low, *given[2:], 8, None, "mean"),
        "H, 1, D": lambda: ops.page_bounds(pool.query(9, 2), low, low, *given[2:], 8),
        "must be int64": lambda: ops.attention_mass(q, pool.k, q[..., 0], given[3].int()),
        "pick_pages: count": lambda: ops.pick_pages(q, low, low, *given[2:], 8, 0),
        "count = 0": lambda: ops.top_pages(q[..., 0], 0),
        "n of 1 or more": lambda: ops.merge_parts(q[:0], q[:0, ..., 0]),
        "float32 or float64": lambda: ops.merge_parts(q, q[..., 0].half()),
        "attention_mass: q": lambda: ops.attention_mass(q, pool.k, q),
    }


@pytest.mark.parametrize("message", sorted(wrong_calls()))
def test_a_wrong_argument_is_named(message) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        wrong_calls()[message]()


def test_all_ops_are_opaque_and_agree_with_their_fakes() -> None:
    pool = Pool([37, 16])
    q, rows = pool.query(9), (pool.k[:, :, :2].contiguous(), pool.v[:, :, :2].contiguous())
    low = torch.zeros(pool.k_pages.shape[0], 3, 16)
    index = torch.zeros(2, 1, 3, dtype=torch.int32)
    starts, tests = torch.tensor([3, 4]), ("test_schema", "test_faketensor")
    for op, args in (
        (ops.paged_attention, (q, *pool.given())),
        (ops.paged_attention, (q, *pool.given(), starts, index, 0.1)),
        (ops.token_attention, (q, *pool.given(), index)),
        (ops.paged_append, (*pool.given()[:3], starts, *rows)),
        (ops.paged_append, (*pool.given()[:3], starts, *rows, low, low.clone())),
        (ops.page_bounds, (q, low, low, *pool.given()[2:], 8)),
        (ops.page_bounds, (q, low, low, *pool.given()[2:], 8, starts, "sum")),
        (ops.top_pages, (q[..., 0].contiguous(), 2)),
        (ops.pick_pages, (q, low, low, *pool.given()[2:], 8, 2)),
        (ops.merge_parts, (q, q[..., 0].contiguous())),
        (ops.attention_mass, (q, pool.k, q[..., 0].contiguous())),
    ):
        torch.library.opcheck(op, args, test_utils=tests)


def test_append_then_attend_inside_torch_compile() -> None:
    """The write is seen by the read, and by the caller, through functionalisation."""
    pool = Pool([17, 10])
    q, rows = pool.query(9), (torch.randn(2, 3, 1, 16), torch.randn(2, 3, 1, 24))

    def step(k_pages, v_pages, q, k, v):
        ops.paged_append(k_pages, v_pages, pool.table, pool.lengths - 1, k, v)
        return ops.paged_attention(q, k_pages, v_pages, pool.table, pool.lengths)[0]

    mine, theirs = ([pool.k_pages.clone(), pool.v_pages.clone()] for _ in range(2))
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*mine, q, *rows)
    torch.testing.assert_close(got, step(*theirs, q, *rows))
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(mine, theirs, strict=True))


def test_flops_count_what_is_attended() -> None:
    pool, index = Pool([32]), torch.zeros(1, 1, 2, dtype=torch.int32)
    q = pool.query(9)
    per_key = 9 * (2 * 16 + 2 * 24 + 5)
    count = ops.all_ops()
    whole = count["paged_attention"].flops(q, *pool.given(), out=None)
    assert whole == pool.width * 8 * per_key
    assert count["paged_attention"].flops(q, *pool.given(), None, index, out=None) == 16 * per_key
    assert count["token_attention"].flops(q, *pool.given(), index, out=None) == 2 * per_key
