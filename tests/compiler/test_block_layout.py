"""Layouts and the definition of block-sparse attention against masks built pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.block_layout import (
    BlockLayout,
    Kind,
    Predicate,
    flat,
    offsets,
    rows_from_block_mask,
    unflatten,
)
from tilewright.compiler.diagnostics import OptionError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def holds(rule: Predicate, i: int, j: int, limit: int = 0) -> bool:
    """The predicate, written out for one pair."""
    if rule.kind is Kind.SLOT:
        return j % rule.unit < rule.before
    if rule.kind is Kind.PAD_SELF:
        return (i + rule.shift < limit) == (j < limit)
    distance = (i + rule.shift) // rule.unit - j // rule.unit
    sink = j < rule.sink
    if rule.kind is Kind.CAUSAL:
        return distance >= -rule.after and (distance <= rule.before or sink)
    return (-rule.after <= distance <= rule.before) or sink


def pairs(layout: BlockLayout, batch: int, queries: int, keys: int) -> torch.Tensor:
    """bool [B, H, queries, keys] in slot order, entry by entry."""
    heads = layout.head_group.shape[1]
    kept = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            g = int(layout.head_group[b if layout.head_group.shape[0] > 1 else 0, h])
            q, k = (off[g if off.shape[0] > 1 else 0].tolist() for off in (layout.q_off, layout.k_off))
            ptr = layout.row_ptr[g].tolist()
            for row in range(len(ptr) - 1):
                for e in range(ptr[row], ptr[row + 1]):
                    block = int(layout.col[g, e])
                    flag = 0 if layout.flag is None else int(layout.flag[g, e])
                    for i in range(q[row], q[row + 1]):
                        for j in range(k[block], k[block + 1]):
                            rule = layout.predicates[flag - 1] if flag else None
                            if rule is not None and rule.kind is Kind.USER:
                                m = layout.mask.expand(batch, heads, queries, keys)
                                good = bool(m[b, h, i, j])
                            else:
                                limit = 0 if layout.limit is None else int(layout.limit[b])
                                good = rule is None or holds(rule, i, j, limit)
                            kept[b, h, i, j] = good
            if layout.k_valid is not None:
                kept[b, :, :, int(layout.k_valid[b]) :] = False
            if layout.q_valid is not None:
                kept[b, :, int(layout.q_valid[b]) :] = False
    return kept


def masked(q, k, v, kept, scale):
    """Attention over a boolean mask, with its log-sum-exp, in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
    scores = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~kept, -math.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return p @ v, lse


def check(layout, queries, keys, batch=2, hkv=2, size=8):
    heads = layout.head_group.shape[1]
    q = 2 * torch.randn(batch, heads, queries, size)
    k, v = (2 * torch.randn(batch, hkv, keys, size) for _ in range(2))
    out, lse = ops.block_sparse_attention(q, k, v, *layout.arguments(), 0.3)
    want, total = masked(q, k, v, pairs(layout, batch, queries, keys), 0.3)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), total, rtol=1e-5, atol=1e-5)
    return out, lse


RULES = (
    Predicate.band(4, sink=3),
    Predicate.band(1, unit=5),
    Predicate.causal(6, sink=2, shift=4),
    Predicate.block_causal(7),
    Predicate.sink_columns(9),
    Predicate.slot_valid(6, 4),
)


@pytest.mark.parametrize("rule", [*RULES, Predicate.pad_self(), Predicate.user()], ids=lambda r: r.kind.name)
def test_every_predicate_against_single_pairs(rule: Predicate) -> None:
    mask = torch.rand(2, 3, 4) > 0.3
    mask[:, 1] = False  # a query block without keys
    extra = {}
    if rule.kind is Kind.PAD_SELF:
        extra["limit"] = torch.tensor([11, 25], dtype=torch.int32)
    if rule.kind is Kind.USER:
        extra["mask"] = torch.rand(1, 4, 1, 31) > 0.5
    layout = BlockLayout.from_block_mask(
        mask,
        [0, 9, 14, 23],
        [0, 6, 6, 19, 31],
        4,
        head_group=torch.tensor([[0, 1, 1, 0]]),
    ).with_(**extra)
    flag = torch.randint(0, 2, layout.col.shape, dtype=torch.int32)
    layout = BlockLayout.from_tensors({**layout.as_tensors(), "flag": flag}, [rule])
    out, lse = check(layout, 23, 31)
    assert bool((out[:, :, 9:14] == 0).all())
    assert bool((lse[:, :, 9:14] == -math.inf).all())
    if rule in RULES:
        groups = pairs(layout.with_(head_group=torch.tensor([[0, 1]], dtype=torch.int32)), 1, 23, 31)
        assert layout.density() == pytest.approx(float(groups.double().mean()))


def test_valid_lengths_per_item_and_layouts_per_item_and_head() -> None:
    layout = BlockLayout.from_block_mask(
        torch.rand(3, 3, 3) > 0.3,
        [0, 8, 15, 20],
        [0, 8, 16, 24],
        4,
        head_group=torch.tensor([[0, 1, 2, 1], [2, 0, 0, 1]]),
    )
    layout = layout.with_(
        k_valid=torch.tensor([24, 13], dtype=torch.int32), q_valid=torch.tensor([11, 20], dtype=torch.int32)
    )
    check(layout, 20, 24)


def test_index_maps_are_permutations_of_tokens() -> None:
    layout = BlockLayout.causal(20, 26, 4, window=9, sink=2, shift=6, q_block=8, k_block=5)
    src_q, src_k = (torch.randperm(n, dtype=torch.int32)[None] for n in (20, 26))
    q, k, v = 2 * torch.randn(1, 4, 20, 8), 2 * torch.randn(1, 2, 26, 8), 2 * torch.randn(1, 2, 26, 6)
    moved = layout.with_(src_q=src_q, src_k=src_k)
    out, lse = ops.block_sparse_attention(q, k, v, *moved.arguments())
    at_q, at_k = src_q[0].long(), src_k[0].long()
    want, total = ops.block_sparse_attention(q[:, :, at_q], k[:, :, at_k], v[:, :, at_k], *layout.arguments())
    torch.testing.assert_close(out[:, :, at_q], want)
    torch.testing.assert_close(lse[:, :, at_q], total)
    assert not torch.allclose(out, want)


def test_tokens_that_no_slot_holds_give_zero() -> None:
    src = torch.tensor([[4, 1, 7]], dtype=torch.int32)
    layout = BlockLayout.dense(3, 10, 2, q_block=2).with_(src_q=src)
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 10, 8)
    out, lse = ops.block_sparse_attention(q, k, k, *layout.arguments())
    empty = [0, 2, 3, 5, 6, 8]
    assert bool((out[:, :, empty] == 0).all())
    assert bool((lse[:, :, empty] == -math.inf).all())
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, src[0].long()], k, k)
    torch.testing.assert_close(out[:, :, src[0].long()], want)


def test_dense_and_causal_equal_attention_over_several_row_chunks() -> None:
    q, k, v = (2 * torch.randn(1, h, 300, 8) for h in (4, 2, 2))
    for layout, causal in ((BlockLayout.dense(300, 300, 4), False), (BlockLayout.causal(300, 300, 4), True)):
        out, _ = ops.block_sparse_attention(q, k, v, *layout.arguments())
        torch.testing.assert_close(out, ops.attention(q, k, v, causal=causal), rtol=1e-5, atol=1e-5)
    assert BlockLayout.dense(300, 200, 4).density() == 1.0
    assert BlockLayout.causal(300, 300, 4).density() == pytest.approx(301 / 600)


def test_gradients_with_both_outputs() -> None:
    layout = BlockLayout.from_block_mask(
        torch.tensor([[[1, 0, 1], [1, 1, 0]], [[1, 1, 1], [0, 1, 1]]]).bool(),
        [0, 3, 7],
        [0, 2, 5, 9],
        4,
        head_group=torch.tensor([[0, 1, 1, 0]]),
    )
    layout = layout.with_(src_k=torch.randperm(9, dtype=torch.int32)[None])
    shapes = ((1, 4, 7, 3), (1, 2, 9, 3), (1, 2, 9, 2))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def run(*given):
        return ops.block_sparse_attention(*given, *layout.arguments(), 0.7)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    torch.library.opcheck(ops.block_sparse_attention, (*inputs, *layout.arguments(), 0.7))


def test_rows_without_keys_have_zero_gradient() -> None:
    layout = BlockLayout.from_block_mask(torch.tensor([[True], [False]]), [0, 2, 4], [0, 3], 1)
    q, k = torch.randn(1, 1, 4, 8, requires_grad=True), torch.randn(1, 1, 3, 8)
    out, _ = ops.block_sparse_attention(q, k, k, *layout.arguments())
    (dq,) = torch.autograd.grad(out.sum() + 0, q)
    assert bool((dq[:, :, 2:] == 0).all())
    assert bool((dq[:, :, :2] != 0).any())


def test_merge_is_attention_over_the_union() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 9, 9))
    whole = BlockLayout.dense(5, 9, 3).arguments()
    parts = [
        ops.block_sparse_attention(q, k[:, :, s], v[:, :, s], *BlockLayout.dense(5, n, 3).arguments())
        for s, n in ((slice(0, 4), 4), (slice(4, 9), 5))
    ]
    out, lse = ops.merge_attention(*parts[0], *parts[1])
    want, total = ops.block_sparse_attention(q, k, v, *whole)
    torch.testing.assert_close((out, lse), (want, total))
    mine = torch.autograd.grad((out.sin().sum(), lse.sin().sum()), (q, k, v))
    theirs = torch.autograd.grad((want.sin().sum(), total.sin().sum()), (q, k, v))
    torch.testing.assert_close(mine, theirs)


def test_merge_with_an_empty_side() -> None:
    out, lse = torch.randn(1, 1, 2, 4, requires_grad=True), torch.tensor([[[0.5, -math.inf]]])
    nothing, none = torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -math.inf)
    got, total = ops.merge_attention(out, lse, nothing, none)
    torch.testing.assert_close(got[:, :, 0], out[:, :, 0])
    assert bool((got[:, :, 1] == 0).all())
    assert total[0, 0].tolist() == [0.5, -math.inf]
    (grad,) = torch.autograd.grad(got.sum(), out)
    assert bool(torch.isfinite(grad).all())


def test_csr_of_a_mask_traces_and_round_trips() -> None:
    mask = torch.rand(2, 5, 7) > 0.5
    row_ptr, col, _ = torch.compile(rows_from_block_mask, backend="eager", fullgraph=True)(mask)
    for g in range(2):
        for row in range(5):
            got = col[g, row_ptr[g, row] : row_ptr[g, row + 1]].tolist()
            assert got == mask[g, row].nonzero()[:, 0].tolist()


def test_tensors_and_predicates_round_trip() -> None:
    layout = BlockLayout.causal(50, 50, 2, window=8, sink=1, q_block=16, k_block=16)
    again = BlockLayout.from_tensors(layout.as_tensors(), unflatten(flat(layout.predicates)))
    assert all(torch.equal(v, again.as_tensors()[n]) for n, v in layout.as_tensors().items())
    assert again.predicates == layout.predicates
    assert offsets(7, 3) == [0, 3, 6, 7]


def _broken(**changes):
    made = BlockLayout.from_block_mask(torch.ones(2, 2, dtype=torch.bool), [0, 4, 8], [0, 4, 8], 2)
    return lambda: made.with_(**changes)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_broken(col=torch.tensor([[0, 0, 0, 1]], dtype=torch.int32)), "key block 0 is twice in row 0"),
        (_broken(col=torch.tensor([[0, 2, 0, 1]], dtype=torch.int32)), "names key block 2; there are 2"),
        (_broken(col=torch.tensor([[0, 1, 0, 1]])), "must have 2 axes of torch.int32"),
        (_broken(row_ptr=torch.tensor([[0, 2, 9]], dtype=torch.int32)), "at most 4, it ends at 9"),
        (_broken(k_off=torch.tensor([[0, 5, 3]], dtype=torch.int32)), "k_off must start at 0 and never fall"),
        (_broken(head_group=torch.tensor([[0, 1]], dtype=torch.int32)), "head_group must lie in 0..0"),
        (_broken(flag=torch.ones(1, 4, dtype=torch.int32)), "flag 1 in group 0; there are 0 predicates"),
        (_broken(src_q=torch.zeros(1, 8, dtype=torch.int32)), "src_q names a token twice"),
        (_broken(src_k=torch.arange(6, dtype=torch.int32)[None]), "6 slots, the blocks reach 8"),
        (lambda: offsets(8, 0), "block size 0"),
        (lambda: BlockLayout.causal(8, 8, 1, window=0), "window=0"),
        (lambda: unflatten([9, 0, 0, 0, 0, 0]), "kind 1..5"),
    ],
)
def test_bad_layouts_are_one_clear_error(make, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        make()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_predicates_that_miss_their_tensor_or_range() -> None:
    layout = BlockLayout.dense(8, 8, 1)
    flag = torch.ones_like(layout.col)
    for rule, text in ((Predicate.user(), "no mask"), (Predicate.pad_self(), "no limit")):
        with pytest.raises(OptionError, match=text):
            BlockLayout.from_tensors({**layout.as_tensors(), "flag": flag}, [rule])
    with pytest.raises(OptionError, match="unit >= 1"):
        BlockLayout.from_tensors({**layout.as_tensors(), "flag": flag}, [Predicate(Kind.BAND, unit=0)])
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        ops.block_sparse_attention(*(torch.randn(1, h, 8, 8) for h in (1, 2, 2)), *layout.arguments())
