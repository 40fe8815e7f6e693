"""Near misses by hand: the reason that is reported names the attribute that is off."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tilewright.compiler import registry

X, W = torch.randn(2, 5, 12), torch.randn(12)
Q, K, V = torch.randn(2, 6, 5, 8), torch.randn(2, 6, 5, 8), torch.randn(2, 6, 5, 8)
TABLE = torch.randn(5, 8)
INNER = math.sqrt(2 / math.pi)


def rms(x, dim=-1, power=2):
    return x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + 1e-6)


def layer(x, dim=-1, correction=0):
    var = x.var(dim, keepdim=True, correction=correction)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(var + 1e-5)


def attention(q, k, v, dim=-1, cap=None, outer=5.0):
    s = q @ k.transpose(-1, -2) * 0.3
    s = s if cap is None else torch.tanh(s / cap) * outer
    return torch.softmax(s, dim) @ v


def half(x, cos, sin, at=4):
    return x * cos + torch.cat((x[..., at:].neg(), x[..., :at]), -1) * sin


def gelu(x, u, half=0.5, cubic=0.044715, inner=INNER, power=3.0, one=1.0):
    return half * x * (one + torch.tanh(inner * (x + cubic * torch.pow(x, power)))) * u


GOLDEN = [
    (
        "match-attention",
        lambda q, k, v: attention(q, k, v, dim=-2),
        (Q, K, V),
        "softmax dim is 2, expected 3",
    ),
    ("match-attention", lambda q, k, v: attention(q, k, v, dim=1), (Q, K, V), "softmax dim is 1, expected 3"),
    ("match-attention", lambda q, k, v: attention(q, k, v, dim=0), (Q, K, V), "softmax dim is 0, expected 3"),
    ("match-attention", lambda q, k, v: attention(q, k, v, cap=4.0), (Q, K, V), "softcap binds both"),
    (
        "match-attention",
        lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.2) @ v,
        (Q, K, V),
        "dropout is 0.2",
    ),
    ("match-attention", lambda q, k, v: torch.softmax(q @ k.mT + 1.0, -1) @ v, (Q, K, V), "mask is 1.0"),
    (
        "match-attention",
        lambda q, k, v: torch.softmax((q @ k.mT).half(), -1).float() @ v,
        (Q, K, V),
        "narrowed to torch.float16",
    ),
    (
        "match-attention",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3),
        (Q, K, V),
        "dropout is 0.3",
    ),
    ("match-rms-norm", lambda x, w: rms(x, dim=1) * w, (X, W), "mean dim is 1, expected 2"),
    ("match-rms-norm", lambda x, w: rms(x, dim=0) * w, (X, W), "mean dim is 0, expected 2"),
    ("match-rms-norm", lambda x, w: rms(x, power=4) * w, (X, W), "pow exponent is 4, expected 2"),
    ("match-rms-norm", lambda x, w: F.rms_norm(x, (5, 12)), (X, W), "2 axes, expected the last one"),
    (
        "match-rms-norm",
        lambda x, w: x * (x.pow(2).mean(-1, True) + 1e-6).pow(-0.25) * w,
        (X, W),
        "pow exponent is -0.25",
    ),
    ("match-layer-norm", lambda x: layer(x, correction=1), (X,), "var correction is 1, expected 0"),
    ("match-layer-norm", lambda x: layer(x, dim=1), (X,), "var dim is 1, expected 2"),
    ("match-rope", lambda x, c, s: half(x, c, s, at=3), (Q, TABLE, TABLE), "cut at 3 and 3, its half is 4"),
    ("match-rope", lambda x, c: half(x, c, 2.0), (Q, TABLE), "sin is 2.0, expected a tensor"),
    ("match-gated-mlp", lambda x, u: gelu(x, u, half=0.6), (X, X * 2), "half is 0.6, gelu has 0.5"),
    (
        "match-gated-mlp",
        lambda x, u: gelu(x, u, cubic=0.0447),
        (X, X * 2),
        "cubic is 0.0447, gelu has 0.044715",
    ),
    ("match-gated-mlp", lambda x, u: gelu(x, u, inner=0.8), (X, X * 2), "inner is 0.8, gelu has 0.7978846"),
    ("match-gated-mlp", lambda x, u: gelu(x, u, power=2.0), (X, X * 2), "pow exponent is 2, expected 3"),
    ("match-gated-mlp", lambda x, u: gelu(x, u, one=2.0), (X, X * 2), "add other is 2.0, expected 1.0"),
    ("match-gated-mlp", lambda x, u: x * torch.sigmoid(1.702 * x), (X, X), "this is an activation"),
    (
        "match-embedding",
        lambda w: F.embedding(torch.tensor([1, 3]), w, sparse=True),
        (TABLE,),
        "sparse is True",
    ),
    ("match-linear", lambda x, w: x @ (w + 1.0), (X, torch.randn(12, 3)), "is not a weight of the module"),
    (
        "match-kv-update",
        lambda c, n: torch.slice_scatter(c * 2.0, n, 2, 1, 3),
        (Q, Q[:, :, :2]),
        "is computed",
    ),
]


@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_reason_names_what_is_off(judge, case):
    name, model, inputs, reason = GOLDEN[case]
    outcome = judge(registry.find(name)(), model, inputs)
    assert outcome.applied == 0, outcome
    assert any(reason in said for said in outcome.reasons), outcome.reasons


def test_there_are_enough():
    assert len(GOLDEN) >= 20
