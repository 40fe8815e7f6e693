"""Identity testing on whole rules: true rules are proved, near misses are not, at every seed.

All sizes of a rule agree on purpose, so that a swapped axis keeps the shapes and only the meaning changes.
"""

from __future__ import annotations

import collections
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tilewright.compiler import ops
from tilewright.compiler.finite_field import Constant, prove_equal
from tilewright.compiler.mutate import KINDS, mutants
from tilewright.compiler.parity import differential_fp64
from tilewright.compiler.respell import respell

ORDER = torch.tensor([2, 0, 3, 1])
UNDO = torch.argsort(ORDER)
GRID = ((4, 4, 4, 4),) * 3


def hadamard(n):
    return (
        torch.ones(1, 1) if n == 1 else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard(n // 2))
    )


H4, H8 = hadamard(4), hadamard(8) / math.sqrt(8)


def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v


def fused(q, k, v):
    return ops.attention(q, k, v, None, 0.5)


def two_parts(q, k, v):
    """Keys in two blocks, each with its own maximum, merged by their log-sum-exp."""
    outs, sizes = [], []
    for part in (slice(0, 1), slice(1, 4)):
        scores = q @ k[..., part, :].transpose(-1, -2) * 0.5
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top)
        outs.append(weights @ v[..., part, :] / weights.sum(-1, keepdim=True))
        sizes.append(top + torch.log(weights.sum(-1, keepdim=True)))
    top = torch.maximum(*sizes)
    left, right = (torch.exp(size - top) for size in sizes)
    return (outs[0] * left + outs[1] * right) / (left + right)


def online(q, k, v, rescale=True):
    scores = q @ k.transpose(-1, -2) * 0.5
    m1, m2 = scores[..., :1], scores[..., 2:3]
    e1, e2 = torch.exp(scores[..., :2] - m1), torch.exp(scores[..., 2:] - m2)
    r = torch.exp(m1 - m2)
    norm = e1.sum(-1, keepdim=True) * r + e2.sum(-1, keepdim=True)
    return (e1 @ v[..., :2, :] * (r if rescale else 1.0) + e2 @ v[..., 2:, :]) / norm


def rms(x, gain, weight):
    return F.linear(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain, weight)


def gated(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def rotary(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def windowed(q, k, v):
    scores = q @ k.transpose(-1, -2) * 0.5
    kept = torch.ones(4, 4, dtype=torch.bool).tril()
    return torch.softmax(torch.where(kept, scores, float("-inf")), -1) @ v


SQUARE, NORM = ((8, 8), (8, 8)), ((4, 8), (8,), (8, 8))
TRUE_RULES = {
    "sdpa fuse": (attend, fused, GRID),
    "softmax shift": (
        lambda s: torch.softmax(s + s.sum(-1, keepdim=True), -1),
        lambda s: s.softmax(-1),
        GRID[:1],
    ),
    "scale into q": (lambda q, k, v: torch.softmax((q * 0.5) @ k.transpose(-1, -2), -1) @ v, fused, GRID),
    "online softmax merge": (online, fused, GRID),
    "merge by log-sum-exp": (two_parts, fused, GRID),
    "keys and values permuted": (lambda q, k, v: attend(q, k[..., ORDER, :], v[..., ORDER, :]), attend, GRID),
    "reorder and reorder back": (
        lambda q, k, v: attend(*(x[..., ORDER, :] for x in (q, k, v)))[..., UNDO, :],
        attend,
        GRID,
    ),
    "Hadamard on q and k": (
        lambda q, k, v: ((q @ H4) / 4) @ (k @ H4).transpose(-1, -2),
        lambda q, k, v: q @ k.transpose(-1, -2),
        GRID,
    ),
    "rotated linear": (lambda x, w: F.linear(x @ H8, w @ H8), F.linear, SQUARE),
    "rms_norm gain fold": (rms, lambda x, g, w: rms(x, torch.ones(8), w * g), NORM),
    "rms_norm commutes with rotation": (
        lambda x, g, w: rms(x @ H8, torch.ones(8), w),
        lambda x, g, w: F.linear(ops.rms_norm(x, None, 1e-6) @ H8, w),
        NORM,
    ),
    "rms_norm raised": (rms, lambda x, g, w: ops.linear(ops.rms_norm(x, g, 1e-6), w), NORM),
    "layer_norm raised": (
        lambda x, g, b: (
            (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5) * g + b
        ),
        lambda x, g, b: ops.layer_norm(x, [8], g, b),
        ((4, 8), (8,), (8,)),
    ),
    "gated_mlp raised": (gated, lambda gate, up: ops.gated_mlp(gate, up, "silu"), ((4, 8), (4, 8))),
    "rope raised": (rotary, lambda x, cos, sin: ops.rope(x, cos, sin), ((4, 8), (4, 8), (4, 8))),
    "causal mask raised": (windowed, lambda q, k, v: ops.attention(q, k, v, None, 0.5, True), GRID),
    "heads split and joined": (
        lambda x, w, v: F.linear(
            attend(*(x.view(4, 4, 4, 2).transpose(1, 2),) * 3).permute(0, 2, 1, 3).flatten(2), w
        ),
        lambda x, w, v: F.linear(
            fused(*(x.reshape(4, 4, 4, 2).transpose(2, 1),) * 3).transpose(1, 2).reshape(4, 4, 8), w
        ),
        ((4, 4, 8), (8, 8), (8,)),
    ),
}
SHOULD = lambda q, k, v: fused(q, k, v)  # noqa: E731  (the right side of most near misses)
WRONG_RULES = {
    "softmax over axis -2": (lambda q, k, v: torch.softmax(q @ k.mT * 0.5, -2) @ v, SHOULD, GRID),
    "softmax over axis 1": (lambda q, k, v: torch.softmax(q @ k.mT * 0.5, 1) @ v, SHOULD, GRID),
    "softmax over axis 0": (lambda q, k, v: torch.softmax(q @ k.mT * 0.5, 0) @ v, SHOULD, GRID),
    "k permuted (0, 2, 3, 1)": (
        lambda q, k, v: torch.softmax(q @ k.permute(0, 2, 3, 1) * 0.5, -1) @ v,
        SHOULD,
        GRID,
    ),
    "k with axes 1 and 3 swapped": (
        lambda q, k, v: torch.softmax(q @ k.transpose(1, 3) * 0.5, -1) @ v,
        SHOULD,
        GRID,
    ),
    "scale dropped": (lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, SHOULD, GRID),
    "online merge without rescale": (lambda q, k, v: online(q, k, v, rescale=False), SHOULD, GRID),
    "only k permuted": (lambda q, k, v: attend(q, k.roll(1, -2), v), SHOULD, GRID),
    "reorder not undone": (lambda q, k, v: attend(q.flip(-2), k, v), SHOULD, GRID),
    "Hadamard not normalised": (
        lambda q, k, v: (q @ H4) @ (k @ H4).transpose(-1, -2),
        lambda q, k, v: q @ k.transpose(-1, -2),
        GRID,
    ),
    "rotation across the gain": (
        lambda x, g, w: F.linear(ops.rms_norm(x @ H8, g, 1e-6), w @ H8),
        lambda x, g, w: F.linear(ops.rms_norm(x, g, 1e-6), w),
        NORM,
    ),
    "gain folded on the wrong axis": (rms, lambda x, g, w: rms(x, torch.ones(8), w * g[:, None]), NORM),
    "causal mask off by one": (
        windowed,
        lambda q, k, v: ops.attention(q, k, v, torch.ones(4, 4, dtype=torch.bool).tril(1), 0.5),
        GRID,
    ),
    "eps 1 % larger": (rms, lambda x, g, w: F.linear(ops.rms_norm(x, g, 1.01e-6), w), NORM),
    "rope interleaved": (rotary, lambda x, cos, sin: ops.rope(x, cos, sin, True), ((4, 8), (4, 8), (4, 8))),
    "gelu for silu": (gated, lambda gate, up: ops.gated_mlp(gate, up, "gelu_tanh"), ((4, 8), (4, 8))),
}


def inputs_of(shapes):
    return lambda draw: [torch.empty(shape) for shape in shapes]


@pytest.mark.parametrize("name", TRUE_RULES)
def test_true_rule_is_proved_at_20_seeds(name):
    left, right, shapes = TRUE_RULES[name]
    for seed in range(20):
        proof = prove_equal(left, right, inputs_of(shapes), draws=1, seed=seed)
        assert proof.verdict == "equal", (seed, proof)


@pytest.mark.parametrize("name", WRONG_RULES)
def test_near_miss_is_different_at_20_seeds(name):
    left, right, shapes = WRONG_RULES[name]
    for seed in range(20):
        proof = prove_equal(left, right, inputs_of(shapes), draws=1, seed=seed)
        assert proof.verdict == "different", (seed, proof)


def traced(name):
    """The left side of a true rule as a flat graph, with inputs that keep softmax away from flat."""
    left, _, shapes = TRUE_RULES[name]
    generator = torch.Generator().manual_seed(7)
    inputs = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    arity = len(shapes)
    wrapped = {1: lambda a: left(a), 2: lambda a, b: left(a, b), 3: lambda a, b, c: left(a, b, c)}[arity]
    return make_fx(wrapped, pre_dispatch=True)(*inputs), inputs


def score(names, per_rule):
    """Mutants of left sides against right sides: wrong, rejected, right, proved, missed, wrong by kind."""
    kinds = [kind for kind in KINDS if kind != "cast"]  # in the reals a cast is the identity
    wrong = rejected = right = proved = 0
    missed, seen = [], collections.Counter()
    for name in names:
        graph, inputs = traced(name)
        _, replacement, shapes = TRUE_RULES[name]
        for mutant in itertools.islice(mutants(graph, inputs, kinds), per_rule):
            truly_wrong = not differential_fp64(graph, mutant.module, inputs) < 1e-9
            proof = prove_equal(mutant.module, replacement, inputs_of(shapes), draws=2)
            if truly_wrong:
                wrong += 1
                rejected += proof.verdict != "equal"
                seen[mutant.kind] += 1
                if proof.verdict == "equal":
                    missed.append(f"{name}: {mutant.description}")
            else:
                right += 1
                proved += proof.verdict == "equal"
    return wrong, rejected, right, proved, missed, seen


def test_wrong_rules_made_by_mutation_are_rejected():
    wrong, rejected, _, _, missed, _ = score(
        ["sdpa fuse", "rms_norm raised", "rope raised", "causal mask raised"], 40
    )
    assert wrong >= 100
    assert rejected >= 0.99 * wrong, missed


@pytest.mark.slow
def test_mutation_score_over_500_wrong_rules():
    wrong, rejected, right, proved, missed, seen = score(TRUE_RULES, 10_000)
    print(
        f"wrong {wrong}, rejected {rejected}; right {right}, proved {proved}; {dict(seen)}; missed {missed}"
    )
    assert wrong >= 500
    assert rejected >= 0.99 * wrong, missed


def check_respellings(name, step):
    graph, inputs = traced(name)
    _, replacement, shapes = TRUE_RULES[name]
    count = 0
    for spelling in itertools.islice(respell(graph, inputs), 0, None, step):
        proof = prove_equal(spelling.module, replacement, inputs_of(shapes), draws=1)
        assert proof.verdict == "equal", (spelling.description, proof)
        count += 1
    return count


def test_respelled_true_rules_are_not_rejected():
    assert check_respellings("heads split and joined", 8) >= 20
    assert check_respellings("rms_norm raised", 9) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUE_RULES)
def test_no_respelling_of_a_true_rule_is_rejected(name):
    assert check_respellings(name, 1) > 10


def test_a_graph_and_a_function_may_be_compared_and_sizes_may_vary():
    graph, _ = traced("sdpa fuse")
    assert prove_equal(graph, fused, inputs_of(GRID))
    assert prove_equal(attend, fused, lambda draw: [torch.empty(1, draw + 1, 3, 4) for _ in range(3)])


def test_a_constant_input_is_not_a_variable():
    def rotate(x, h):
        return x @ h @ h.T

    def identity(x, h):
        return x

    assert prove_equal(rotate, identity, lambda draw: [torch.empty(3, 8), Constant(H8)])
    assert prove_equal(rotate, identity, lambda draw: [torch.empty(3, 8), H8]).verdict == "different"
