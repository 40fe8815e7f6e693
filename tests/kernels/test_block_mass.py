"""The generated kernels of block_mass against probabilities written out: ragged blocks, masks, refusals."""

from __future__ import annotations

import os

import pytest
import torch

from tilewright.compiler.block_layout import BlockLayout
from tilewright.kernels.block_mass.family import BLOCK_MASS
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import KernelChoice, host_target, select_for_node
from tilewright.runtime.contracts import KernelKey, Refusal, Target

HOST = host_target()
SM80 = Target("cuda", "sm_80")
on_host = pytest.mark.skipif(HOST.arch == "generic", reason="kernels need AVX2")
in_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
CASES = {
    "ragged, empty and long blocks": (16, [0, 16, 20, 20, 157], [0, 5, 21, 21, 151], torch.float32),
    "whole blocks": (64, [0, 64, 128, 192], [0, 64, 128], torch.float16),
    "one block, a head of 8": (8, [0, 130], [0, 10], torch.float32),
    "a head that is no power of two": (72, [0, 72, 75], [0, 70, 131], torch.float16),
}


def arguments(size, q_ends, k_ends, dtype, masked="", scale=None):
    """Two batch entries of three heads; one query attended nothing."""
    torch.manual_seed(5)
    q, k = (torch.randn(2, 3, ends[-1], size).to(dtype) for ends in (q_ends, k_ends))
    shape = {"": None, "batch": (2, 1, 1, k_ends[-1]), "head": (1, 3, 1, k_ends[-1])}[masked]
    mask = None if shape is None else torch.rand(shape) > 0.3
    scores = q.float() @ k.float().transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    lse[1, 2, 0] = -torch.inf
    borders = [torch.tensor([ends], dtype=torch.int32) for ends in (q_ends, k_ends)]
    return q, k, lse, *borders, mask, scale


def written_out(q, k, lse, q_off, k_off, mask, scale):
    """Every probability in float64, summed block by block."""
    scores = q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    share = torch.exp(scores - lse.double()[..., None])
    share[(lse == -torch.inf)] = 0.0
    if mask is not None:
        share = share * mask
    rows, columns = (
        [range(a, b) for a, b in zip(off[0], off[0][1:], strict=False)] for off in (q_off, k_off)
    )
    return torch.stack(
        [torch.stack([share[:, :, list(r)][..., list(c)].sum((-1, -2)) for c in columns], -1) for r in rows],
        -2,
    )


def check(args, target: Target) -> None:
    moved = [x.to("meta") if isinstance(x, torch.Tensor) and target.kind != "cpu" else x for x in args]
    key = BLOCK_MASS.configure(moved, target)
    assert isinstance(key, KernelKey), str(key)
    got = build_kernel(BLOCK_MASS, key).op(*BLOCK_MASS.rewrite_args(key, args))
    torch.testing.assert_close(got.double(), written_out(*args), rtol=2e-5, atol=2e-5)


@on_host
@pytest.mark.parametrize("masked", ["", "batch", "head"])
@pytest.mark.parametrize("name", CASES)
def test_cpp(name: str, masked: str) -> None:
    check(arguments(*CASES[name], masked=masked), HOST)


@on_host
def test_bfloat16_a_scale_and_rows_far_apart() -> None:
    q, k, *rest = arguments(24, [0, 60, 100], [0, 33, 90], torch.bfloat16, "batch", scale=0.4)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert apart[0].stride() != q.stride()
    check((*apart, *rest), HOST)
    check((q.transpose(2, 3).contiguous().transpose(2, 3), k, *rest), HOST)


@on_host
def test_a_row_of_the_result_sums_to_its_queries() -> None:
    q, k, _, *rest = arguments(64, [0, 64, 130], [0, 64, 130], torch.float32)
    args = (q, k, torch.logsumexp(q @ k.transpose(-1, -2) / 8, -1), *rest)
    choice = select_for_node("block_mass", args, HOST, training=False)
    assert isinstance(choice, KernelChoice)
    sums = choice.op(*choice.rewrite_args(args)[0]).sum(-1)
    torch.testing.assert_close(sums, torch.tensor([64.0, 66.0]).expand(2, 3, 2), rtol=1e-5, atol=1e-4)


@on_host
def test_lse_of_the_attention_kernel() -> None:
    """What a search does: the attention's own lse, in natural logarithms, feeds the sums."""
    q, k, _, q_off, k_off, _, _ = arguments(64, [0, 64, 128], [0, 64, 128], torch.float32)
    layout = BlockLayout.dense(128, 128, 3)
    choice = select_for_node(
        "block_sparse_attention", (q, k, k, *layout.arguments(), None), HOST, training=False
    )
    assert isinstance(choice, KernelChoice)
    lse = choice.op(*choice.rewrite_args((q, k, k, *layout.arguments(), None))[0])[1]
    check((q, k, lse, q_off, k_off, None, None), HOST)


@in_interpreter
@pytest.mark.interpreter
@pytest.mark.parametrize("masked", ["", "head"])
@pytest.mark.parametrize("name", CASES)
def test_triton(name: str, masked: str) -> None:
    check(arguments(*CASES[name], masked=masked), SM80)


@on_host
def test_nothing_to_do_and_wrong_borders() -> None:
    q, k, lse, q_off, k_off, mask, scale = arguments(16, [0, 20], [0, 20], torch.float32)
    choice = select_for_node("block_mass", (q, k, lse, q_off, k_off, mask, scale), HOST, training=False)
    assert isinstance(choice, KernelChoice)
    none = torch.zeros(1, 1, dtype=torch.int32)
    assert choice.op(q, k, lse, none, k_off, 0.25).shape == (2, 3, 0, 1)
    for wrong in ([0, 21], [1, 20], [0, 12, 10]):
        with pytest.raises(RuntimeError, match="k_off must rise from 0"):
            choice.op(q, k, lse, q_off, torch.tensor([wrong], dtype=torch.int32), 0.25)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, torch.empty(2, 3, 20, 16, dtype=torch.float64), "float64"),
        (1, torch.empty(2, 3, 20, 16, dtype=torch.float16), "float16"),
        (1, torch.empty(2, 3, 20, 24), "16 and 24"),
        (1, torch.empty(2, 1, 20, 16), "3 query heads over 1 key heads"),
        (2, torch.empty(2, 3, 20, dtype=torch.float64), "float64"),
        (3, torch.zeros(2, 5, dtype=torch.int32), "one row"),
        (4, torch.zeros(1, 5, dtype=torch.int64), "int64"),
        (5, torch.zeros(2, 3, 20, 20, dtype=torch.bool), "bool [1 or B, 1 or H, 1, T]"),
    ],
)
def test_refusals(place: int, value: torch.Tensor, reason: str) -> None:
    args = list(arguments(16, [0, 20], [0, 20], torch.float32))
    args[place] = value
    found = BLOCK_MASS.configure(args, HOST if HOST.arch != "generic" else Target("cpu", "avx2"))
    assert isinstance(found, Refusal)
    assert reason in found.reason


def test_a_gpu_takes_heads_of_128_and_the_text_holds_no_mask_without_one() -> None:
    wide = [
        x.to("meta") if isinstance(x, torch.Tensor) else x
        for x in arguments(136, [0, 9], [0, 9], torch.float16)
    ]
    refused = BLOCK_MASS.configure(wide, SM80)
    assert isinstance(refused, Refusal)
    assert "8 to 128" in refused.reason
    for target, word in ((SM80, "m_b"), (Target("cpu", "avx512"), "seen")):
        texts = []
        for masked in ("", "batch"):
            args = arguments(16, [0, 20], [0, 20], torch.float32, masked)
            if target.kind != "cpu":
                args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
            key = BLOCK_MASS.configure(args, target)
            assert isinstance(key, KernelKey)
            texts.append(BLOCK_MASS.source(key)[1])
        assert word not in texts[0]
        assert word in texts[1]
