"""Attention of few queries under a mask: the kernel against the definition, and what it leaves unread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tilewright.compiler.ops import all_ops
from tilewright.kernels.attention.family import ATTENTION, MOST_QUERIES
from tilewright.kernels.common.cpp import LANES
from tilewright.kernels.load import build_kernel
from tilewright.kernels.table import host_target
from tilewright.runtime.contracts import Refusal

WIDTH = LANES.get(host_target().arch, 8)
"""Head sizes are multiples of it."""
SHAPES = (
    (3, 9, 3, 1, 200, 64, 64),
    (2, 4, 2, 5, 77, 32, 5 * WIDTH),
    (1, 8, 8, 3, 513, 128, 128),
    (2, 6, 1, 32, 300, 16, WIDTH),
    (2, 6, 2, 65, 90, 32, 3 * WIDTH),
)
"""B, H, Hkv, S, T, D, E."""


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, train: bool = False) -> Tensor:
    args = (q, k, v, mask, None, False, 0.0, None)
    key = ATTENTION.configure(args, host_target())
    assert not isinstance(key, Refusal), key
    built = build_kernel(ATTENTION, key)
    return (built.train_op if train else built.op)(*ATTENTION.rewrite_args(key, args))


def _seen(batch: int, queries: int, keys: int) -> Tensor:
    """bool [B, 1, S, T]: ragged lengths, left padding, holes, and one row that sees nothing."""
    held = torch.randint(1, keys, (batch,))
    left = torch.minimum(torch.randint(0, 20, (batch,)), held - 1)
    at = torch.arange(keys)
    seen = ((at >= left[:, None]) & (at < held[:, None]))[:, None, None].expand(batch, 1, queries, keys)
    seen = seen & (torch.rand(batch, 1, queries, keys) < 0.9)
    seen[:, :, 0].scatter_(-1, left[:, None, None], torch.ones(batch, 1, 1, dtype=torch.bool))
    seen[0, 0, queries - 1] = False
    return seen


def _masks(seen: Tensor, dtype: torch.dtype, heads: int) -> dict[str, Tensor]:
    batch, _, queries, keys = seen.shape
    lowest = torch.finfo(dtype).min
    return {
        "bool": seen,
        "lowest": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, lowest),
        "infinite": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
        "bias": torch.randn(batch, heads, queries, keys).to(dtype).masked_fill(~seen, lowest),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    definition = all_ops()["attention"].definition
    bound = 2e-5 if dtype == torch.float32 else 1e-2
    for b, h, groups, s, t, d, e in SHAPES:
        q, k, v = (torch.randn(x).to(dtype) for x in ((b, h, s, d), (b, groups, t, d), (b, groups, t, e)))
        for name, mask in _masks(_seen(b, s, t), dtype, h).items():
            want = definition(
                q.float(), k.float(), v.float(), mask.float() if mask.is_floating_point() else mask
            )
            got = _call(q, k, v, mask).float()
            if name != "infinite":
                assert not torch.isnan(got).any()
            error = (got - want.nan_to_num(0.0)).abs().max()
            assert error <= bound * (1 + float(v.abs().max())), name


def test_a_row_hidden_throughout_by_a_number_rounds_as_softmax_does() -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 9, 1, 64), torch.randn(1, 1, 200, 64), torch.randn(1, 1, 200, 64)
    mask = torch.full((1, 1, 1, 200), -65504.0)  # made in float16, cast since
    want = all_ops()["attention"].definition(q, k, v, mask)
    torch.testing.assert_close(_call(q, k, v, mask), want, rtol=1e-4, atol=1e-4)


def test_keys_that_no_query_sees_are_not_read() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 6, 2, 16), torch.randn(2, 3, 300, 16), torch.randn(2, 3, 300, 16)
    seen = torch.zeros(2, 1, 2, 300, dtype=torch.bool)
    seen[0, :, :, 5:40], seen[1, :, 0, 100:101], seen[1, :, 1, 90:130] = True, True, True
    want = _call(q, k, v, seen)
    for low, high, row in ((5, 40, 0), (90, 130, 1)):
        k[row, :, :low], k[row, :, high:], v[row, :, :low], v[row, :, high:] = [torch.nan] * 4
    assert torch.equal(_call(q, k, v, seen), want)


def test_gradients_are_those_of_the_definition_that_of_a_bias_too() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, h, n, WIDTH) for h, n in ((4, 3), (2, 20), (2, 20)))
    for mask in (torch.randn(4, 3, 20), torch.rand(3, 20) < 0.7):
        results = []
        for run in (lambda *x: _call(*x, train=True), all_ops()["attention"].definition):
            given = [x.clone().requires_grad_(x.is_floating_point()) for x in (q, k, v, mask)]
            run(*given).square().sum().backward()
            results.append([x.grad for x in given if x.requires_grad])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"s": MOST_QUERIES + 1}, "513 queries under a mask"),
        ({"mask": torch.float64}, "the mask is torch.float64"),
        ({"columns": 1}, "a column for each of 40 keys is needed"),
        ({"causal": True}, "causal and a mask"),
    ],
)
def test_refusals(change: dict[str, Any], reason: str) -> None:
    q, k = torch.randn(1, 2, change.get("s", 1), 8), torch.randn(1, 2, 40, 8)
    mask = torch.zeros(1, 1, 1, change.get("columns", 40), dtype=change.get("mask", torch.float32))
    found = ATTENTION.configure((q, k, k, mask, None, change.get("causal", False), 0.0, None), host_target())
    assert isinstance(found, Refusal)
    assert reason in found.reason


@pytest.mark.slow
def test_a_left_padded_batch_over_a_static_cache_generates_the_same_tokens() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5], [0, 0, 2, 7, 1], [0, 9, 8, 2, 6]])
    how = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": "static",
    }
    want = model.generate(ids, **how, disable_compile=True)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="tilewright", options={"pipeline": "exact"})
    assert torch.equal(model.generate(ids, **how, disable_compile=True), want)
