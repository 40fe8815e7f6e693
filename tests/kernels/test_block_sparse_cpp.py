"""The C++ kernels of block-sparse, dense and causal attention against their definitions."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.compiler.block_layout import BlockLayout, Kind, Predicate
from tilewright.compiler.diagnostics import ParityError
from tilewright.compiler.ops import all_ops
from tilewright.compiler.parity import assert_parity, float64_evaluation
from tilewright.kernels.block_sparse_attention.family import BLOCK_SPARSE_ATTENTION
from tilewright.kernels.common.abi import HEADER, TORCH_ABI
from tilewright.kernels.table import KernelChoice, full_args, host_target, select_for_node
from tilewright.runtime.build import LIBRARY, compile_cpp
from tilewright.runtime.contracts import Refusal, Target

TARGET, AVX2 = host_target(), Target("cpu", "avx2")
pytestmark = pytest.mark.skipif(TARGET.arch == "generic", reason="kernels need AVX2")
BOUNDS = {
    torch.float32: {"rms": 2e-6, "ulps": 256.0},
    torch.bfloat16: {"rms": 4e-3, "ulps": 2.0},
    torch.float16: {"rms": 5e-4, "ulps": 2.0},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(9)


def _status(field: str) -> int:
    """Of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:")) // 1024


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (1.5 * torch.randn(*shape)).to(dtype)


def choose(op: str, args: tuple[Any, ...], training: bool = False) -> KernelChoice:
    found = select_for_node(op, args, TARGET, training=training)
    assert isinstance(found, KernelChoice), str(found)
    return found


def run(layout: BlockLayout, q: Any, k: Any, v: Any, scale: float | None = 0.3) -> Any:
    args = (q, k, v, *layout.arguments(), scale)
    choice = choose("block_sparse_attention", args)
    given, _ = choice.rewrite_args(args)
    return choice.op(*given)


def check(layout: BlockLayout, q: Any, k: Any, v: Any, scale: float | None = 0.3) -> None:
    out, lse = run(layout, q, k, v, scale)
    definition = all_ops()["block_sparse_attention"].definition
    args = (q, k, v, *layout.arguments(), scale)
    want, total = definition(*args)
    exact, exact_total = float64_evaluation(definition, args)
    assert lse.dtype == torch.float32
    if q.dtype == torch.float32:
        assert_parity(out, want, reference64=exact, **BOUNDS[q.dtype])
        torch.testing.assert_close(lse.double(), exact_total, rtol=1e-5, atol=1e-5)
    else:
        assert_parity(out, want, **BOUNDS[q.dtype])
        torch.testing.assert_close(lse, total, rtol=1e-5, atol=1e-5)


def ragged(heads: int, queries: int, keys: int, flags: bool = False, **more: Any) -> BlockLayout:
    """Three groups of random blocks of odd sizes, one empty row, one block of size 0."""
    q_off = [0, 7, 7, 90, queries]
    k_off = [0, 17, 17, 30, 161, keys]
    mask = torch.rand(3, 4, 5) > 0.4
    mask[1, 2] = False
    mask[0, 3] = True
    group = torch.arange(heads)[None] % 3
    flag = torch.randint(0, 2, mask.shape) if flags else None
    return BlockLayout.from_block_mask(mask, q_off, k_off, heads, head_group=group, flag=flag, **more)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(("size", "value"), [(64, 64), (128, 128), (8, 24), (72, 40)])
def test_ragged_groups_and_grouped_heads(dtype: torch.dtype, size: int, value: int) -> None:
    q, k, v = (
        randn(2, 6, 131, size, dtype=dtype),
        randn(2, 2, 203, size, dtype=dtype),
        randn(2, 2, 203, value, dtype=dtype),
    )
    check(ragged(6, 131, 203), q, k, v, size**-0.5)


@pytest.mark.parametrize("size", [16, 24, 256])
def test_other_head_sizes(size: int) -> None:
    q, k, v = (randn(1, 3, n, size) for n in (131, 203, 203))
    check(ragged(3, 131, 203), q, k, v, size**-0.5)


RULES = (
    Predicate.band(20, sink=5),
    Predicate.band(2, unit=13),
    Predicate.causal(33, sink=20, shift=40),
    Predicate.block_causal(21, shift=63),
    Predicate.sink_columns(29),
    Predicate.slot_valid(12, 7),
)


@pytest.mark.parametrize("rule", [*RULES, Predicate.pad_self(), Predicate.user()], ids=str)
def test_every_predicate(rule: Predicate) -> None:
    extra = {}
    tensors = ragged(3, 131, 203).as_tensors()
    tensors["flag"] = torch.randint(0, 3, tensors["col"].shape, dtype=torch.int32).clamp_max(1)
    if rule.kind is Kind.PAD_SELF:
        extra["limit"] = torch.tensor([60, 190], dtype=torch.int32)
    if rule.kind is Kind.USER:
        extra["mask"] = (torch.rand(2, 1, 203, 131) > 0.5).transpose(2, 3)
    layout = BlockLayout.from_tensors({**tensors, **extra}, [rule])
    check(layout, *(randn(2, 3, n, 32) for n in (131, 203, 203)))


def test_two_predicates_a_column_mask_and_valid_lengths() -> None:
    tensors = ragged(3, 131, 203).as_tensors()
    tensors["flag"] = torch.randint(0, 4, tensors["col"].shape, dtype=torch.int32)
    tensors["mask"] = torch.rand(1, 3, 1, 203) > 0.5
    tensors["k_valid"] = torch.tensor([203, 70], dtype=torch.int32)
    tensors["q_valid"] = torch.tensor([40, 131], dtype=torch.int32)
    layout = BlockLayout.from_tensors(tensors, [RULES[0], Predicate.user(), RULES[2]])
    check(layout, *(randn(2, 3, n, 32) for n in (131, 203, 203)))


@pytest.mark.parametrize("groups", [1, 3])
def test_index_maps(groups: int) -> None:
    maps = {
        "src_q": torch.stack([torch.randperm(150)[:131] for _ in range(groups)]).int(),
        "src_k": torch.stack([torch.randperm(220)[:203] for _ in range(groups)]).int(),
    }
    q, k, v = randn(2, 6, 150, 32), randn(2, 2, 220, 32), randn(2, 2, 220, 32)
    check(ragged(6, 131, 203).with_(**maps), q, k, v)
    check(ragged(6, 131, 203).with_(src_k=maps["src_k"]), q[:, :, :131], k, v)


def test_borders_per_group_and_layouts_per_item() -> None:
    tensors = ragged(4, 131, 203).as_tensors()
    tensors["k_off"] = torch.tensor(
        [[0, 17, 17, 30, 161, 203], [0, 1, 2, 3, 4, 200], [0, 0, 64, 128, 129, 180]], dtype=torch.int32
    )
    tensors["q_off"] = torch.tensor(
        [[0, 7, 7, 90, 131], [0, 0, 130, 130, 131], [0, 33, 64, 65, 100]], dtype=torch.int32
    )
    tensors["head_group"] = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]], dtype=torch.int32)
    q, k, v = randn(2, 4, 131, 32), randn(2, 2, 203, 32), randn(2, 2, 203, 32)
    check(BlockLayout.from_tensors(tensors), q, k, v)


def test_views_of_a_fused_projection_and_rows_far_apart() -> None:
    q, k, v = randn(2, 131, 3, 5, 32).unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert not q.is_contiguous()
    check(BlockLayout.causal(131, 131, 5, window=40, sink=3), q, k, v)
    check(BlockLayout.dense(131, 131, 5), q.transpose(2, 3).contiguous().transpose(2, 3), k, v)


def test_scores_far_beyond_the_range_of_exp() -> None:
    q, k, v = randn(1, 1, 70, 16), randn(1, 1, 300, 16), randn(1, 1, 300, 16)
    k[:, :, ::7] *= 40.0  # maxima that jump from piece to piece
    check(BlockLayout.dense(70, 300, 1), q, k, v, 1.0)
    out, lse = run(BlockLayout.dense(70, 300, 1), q * 0 + 1e4, k.abs() * 0 + 1e3, v, 1.0)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=1e-4, atol=1e-5)
    assert bool((lse > 1e8).all())


def test_a_nan_key_reaches_exactly_the_rows_that_attend_it() -> None:
    layout = BlockLayout.from_block_mask(torch.eye(2, dtype=torch.bool), [0, 64, 128], [0, 64, 128], 1)
    q, k = randn(1, 1, 128, 16), randn(1, 1, 128, 16)
    k[0, 0, 70, 3] = float("nan")
    out, _ = run(layout, q, k, randn(1, 1, 128, 16))
    assert bool(out[0, 0, 64:].isnan().all())
    assert not bool(out[0, 0, :64].isnan().any())


def test_memory_kept_from_call_to_call_carries_nothing_over() -> None:
    q, k, v = (randn(1, 2, 320, 64) for _ in range(3))
    layout = BlockLayout.from_block_mask(
        torch.eye(5, dtype=torch.bool), list(range(0, 321, 64)), list(range(0, 321, 64)), 2
    )
    want = run(layout, q, k, v)
    run(layout, q, torch.full_like(k, math.nan), v)  # larger and smaller calls, all NaN
    run(BlockLayout.dense(320, 1000, 2), q, torch.full((1, 2, 1000, 64), math.nan), randn(1, 2, 1000, 64))
    some = run(BlockLayout.dense(64, 40, 2), q[:, :, :64], k[:, :, :40], v[:, :, :40])
    assert not some[0].isnan().any()  # the rest of its last panel is not what was there
    for got, before in zip(run(layout, q, k, v), want, strict=True):
        assert torch.equal(got, before)


def test_calls_at_the_same_time_have_memory_of_their_own() -> None:
    layout = BlockLayout.causal(2000, 2000, 2, window=900, sink=3)
    given = [[randn(1, 2, 2000, 32) for _ in range(3)] for _ in range(4)]
    want = [run(layout, *qkv) for qkv in given]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda qkv: run(layout, *qkv), given))
            assert all(
                torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)
            )


def test_rows_wait_for_panels_that_another_thread_packs() -> None:
    """Two threads, a block of keys for each to pack, and both blocks attended by both."""
    q, k, v = (randn(1, 1, n, 64) for n in (16, 256, 256))
    both = torch.ones(2, 2, dtype=torch.bool)
    layout = BlockLayout.from_block_mask(both, [0, 8, 16], [0, 128, 256], 1)
    want, nothing = run(layout, q, k, v), torch.full_like(k, math.nan)
    for _ in range(100):
        run(layout, q, nothing, nothing)  # what is there before the panels are
        got = run(layout, q, k, v)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_memory_is_bounded_and_not_spent_on_blocks_without_readers() -> None:
    """Packed, the keys and values would be 128 MiB: more than a library keeps."""
    keys, block = 1 << 18, 1 << 12
    q, k, v = (randn(1, 1, n, 64) for n in (64, keys, keys))
    borders = list(range(0, keys + 1, block))
    one = torch.zeros(1, keys // block, dtype=torch.bool)
    one[0, 3] = True
    sparse = BlockLayout.from_block_mask(one, [0, 64], borders, 1)
    dense = BlockLayout.from_block_mask(torch.ones_like(one), [0, 64], borders, 1)
    for layout, most in ((sparse, 32), (dense, 160)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        start = _status("VmRSS")
        run(layout, q, k, v)
        assert _status("VmRSS") < start + 32
        assert _status("VmHWM") < start + most
    assert _status("VmHWM") > start + 96, "the peak does not show panels"


def test_nothing_to_do() -> None:
    layout = BlockLayout.from_block_mask(torch.zeros(2, 2, dtype=torch.bool), [0, 4, 8], [0, 4, 8], 2)
    out, lse = run(layout, *(randn(1, 2, 8, 16) for _ in range(3)))
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


def test_a_wrong_layout_is_an_error_and_not_a_crash() -> None:
    layout = ragged(3, 131, 203)
    q, k, v = (randn(1, 3, n, 32) for n in (131, 203, 203))
    args = [q, k, v, *layout.arguments(), 0.3]
    for at, change, text in (
        (4, args[4] + 100, "col names a key block"),
        (3, args[3] * 50, "row_ptr must rise"),
        (6, args[6] + 1, "k_off must rise"),
        (7, args[7] + 3, "head_group names a group"),
    ):
        broken = [*args[:at], change, *args[at + 1 :]]
        choice = choose("block_sparse_attention", tuple(broken))
        given, _ = choice.rewrite_args(tuple(broken))
        with pytest.raises(RuntimeError, match=text):
            choice.op(*given)


def test_training_differentiates_through_the_kernel() -> None:
    layout = ragged(4, 131, 203, flags=True, predicates=(RULES[0],))
    q, k, v = (x.requires_grad_() for x in (randn(1, 4, 131, 16), randn(1, 2, 203, 16), randn(1, 2, 203, 16)))
    args = (q, k, v, *layout.arguments(), 0.3)
    choice = choose("block_sparse_attention", args, training=True)
    given, _ = choice.rewrite_args(args)
    torch.library.opcheck(
        choice.op, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    seed = torch.randn(1, 4, 131, 16)
    mine = torch.autograd.grad(choice.op(*given)[0], (q, k, v), seed)
    theirs = torch.autograd.grad(all_ops()["block_sparse_attention"].overload(*args)[0], (q, k, v), seed)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float32), (72, torch.float32), (128, torch.bfloat16)])
def test_dense_and_causal_attention(causal: bool, size: int, dtype: torch.dtype) -> None:
    q, k, v = (
        randn(2, 6, 517, size, dtype=dtype),
        randn(2, 2, 517, size, dtype=dtype),
        randn(2, 2, 517, size, dtype=dtype),
    )
    args = (q, k, v, None, None, causal, 0.0, None)
    choice = choose("attention", args)
    given, _ = choice.rewrite_args(args)
    definition = all_ops()["attention"].definition
    inside = randn(2, 517, 6, size, dtype=dtype).transpose(1, 2)
    for one in (q, inside):  # views that follow were made for the strides of the definition
        want = definition(one, *args[1:]).stride()
        assert choice.op(one, *given[1:]).stride() == want
        assert choice.family.fake(choice.key)(one, *given[1:]).stride() == want
    torch.testing.assert_close(choice.op(inside, *given[1:]), choice.op(inside.contiguous(), *given[1:]))
    exact = float64_evaluation(definition, args)
    if dtype == torch.float32:
        assert_parity(choice.op(*given), definition(*args), reference64=exact, rms=2e-6, ulps=128.0)
    else:
        assert_parity(choice.op(*given), exact.to(dtype), **BOUNDS[dtype])


def test_attention_is_for_inference_but_differentiates_and_takes_other_lengths() -> None:
    q, k, v = (randn(1, 2, n, 16).requires_grad_() for n in (300, 520, 520))
    args = (q, k, v, None, 0.2, False, 0.0, None)
    refused = select_for_node("attention", args, TARGET, training=True)
    assert isinstance(refused, Refusal)
    assert "in training" in refused.reason
    choice = KernelChoice(choose("attention", args).key, training=True)
    given, _ = choice.rewrite_args(args)
    torch.library.opcheck(choice.op, given, test_utils=("test_schema", "test_faketensor"))
    seed = torch.randn(1, 2, 300, 16)
    mine = torch.autograd.grad(choice.op(*given), (q, k, v), seed)
    theirs = torch.autograd.grad(all_ops()["attention"].definition(*args), (q, k, v), seed)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_refusals_of_attention_name_the_value() -> None:
    q = torch.empty(1, 4, 512, 64, device="meta")

    def reason(*args: Any, target: Target = AVX2) -> str:
        found = select_for_node("attention", full_args("attention", args), target, training=False)
        assert isinstance(found, Refusal)
        return found.reason

    more = torch.empty(1, 4, 513, 64, device="meta")
    assert "513 queries under a mask" in reason(more, q, q, torch.empty(513, 512, device="meta"))
    assert "a softcap" in reason(q, q, q, None, None, False, 30.0)
    assert "1 queries" in reason(q[:, :, :1], q, q)
    assert "512 queries and 300 keys" in reason(q, q[:, :, :300], q[:, :, :300], None, None, True)
    assert "multiples of 8" in reason(q[..., :60], q[..., :60], q)
    assert "4, 3, 3 axes" in reason(q, q[0], q[0])
    assert "3 key heads" in reason(q, q[:, :3], q[:, :3])
    assert "torch.float16" in reason(q, q.half(), q)
    assert "flash attention" in reason(q, q, q, target=Target("cuda", "sm_90"))


def test_what_is_off_is_absent_from_the_text() -> None:
    def text(layout: BlockLayout, arch: str = "avx2", dtype: torch.dtype = torch.float32) -> str:
        q = torch.empty(1, 2, 300, 64, dtype=dtype)
        key = BLOCK_SPARSE_ATTENTION.configure((q, q, q, *layout.arguments(), None), Target("cpu", arch))
        assert not isinstance(key, Refusal)
        return BLOCK_SPARSE_ATTENTION.source(key)[1]

    plain = text(BlockLayout.dense(300, 300, 2))
    for word in ("span_of", "Rule", "flag", "src", "k_valid", "uint8_t* mask", "bf16", "_mm512"):
        assert word not in plain, word
    assert "span_of" in text(BlockLayout.causal(300, 300, 2))
    assert "by_element" not in text(BlockLayout.causal(300, 300, 2))
    wide = text(BlockLayout.causal(300, 300, 2), "avx512", torch.bfloat16)
    assert "_mm512" in wide
    assert "kNR = 32" in wide


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_avx512_source_compiles(dtype: torch.dtype) -> None:
    """This machine may lack AVX-512: the text is compiled, not run."""
    q = torch.empty(1, 3, 131, 72, dtype=dtype)
    layout = ragged(3, 131, 203, flags=True, predicates=(RULES[0],))
    key = BLOCK_SPARSE_ATTENTION.configure((q, q, q, *layout.arguments(), None), Target("cpu", "avx512"))
    assert not isinstance(key, Refusal)
    folder = compile_cpp(BLOCK_SPARSE_ATTENTION.source(key)[1], "avx512", {HEADER: TORCH_ABI})
    assert (folder / LIBRARY).stat().st_size > 0


def test_the_bounds_reject_a_kernel_without_its_predicate() -> None:
    """The recorded mutant: partial blocks computed whole."""
    layout = BlockLayout.causal(131, 131, 2, window=40)
    whole = BlockLayout.from_tensors({n: t for n, t in layout.as_tensors().items() if n != "flag"})
    q, k, v = (randn(1, 2, 131, 32) for _ in range(3))
    want = all_ops()["block_sparse_attention"].definition(q, k, v, *layout.arguments(), 0.3)[0]
    with pytest.raises(ParityError):
        assert_parity(run(whole, q, k, v)[0], want, **BOUNDS[torch.float32])
