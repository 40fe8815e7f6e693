"""Bisection: one planted fault is found, by pass, application and node, in few runs."""

from __future__ import annotations

import inspect
import math
import random

import pytest
import torch
import torch.nn.functional as F

from tilewright.compiler import Example, Tensor, registry
from tilewright.compiler.bisect import bisect
from tilewright.compiler.diagnostics import ParityError
from tilewright.compiler.float64 import Float64
from tilewright.compiler.log import Fuel
from tilewright.compiler.pipeline import Pipeline, RunOptions, run_pass
from tilewright.compiler.replay import relative_rms, tensors_in
from tilewright.compiler.rewrite import Rewrite
from tilewright.compiler.selftest import capture_example, run

BLOCKS, ROWS, WIDTH, HEADS, HIDDEN = 3, 4, 8, 2, 12
NAMES = (
    "match-linear", "match-rms-norm", "match-attention", "match-gated-mlp", "common-subexpression",
    "fold-norm-scale", "fuse-add-rmsnorm", "fuse-projections",
)  # fmt: skip
FAULTY = [n for n in NAMES if n != "common-subexpression"]
"""Passes that apply in the model below."""

FAULTS = {
    "sign": lambda t: -t,
    "scale": lambda t: t * 1.001,
    "axis": lambda t: t.transpose(-1, -2).reshape(t.shape),
    "stale permutation": lambda t: t.roll(1, -1),
    "off-by-one slice": lambda t: F.pad(t[..., 1:], (0, 1)),
    "dropped cast": lambda t: t.to(torch.float16).to(t.dtype),
    "wrong shape": lambda t: t[..., 1:],
}
SWAPPED = "swapped results"
"""The fault of `fuse-projections`, which computes nothing itself: two of its results change places."""


def norm(x, gain):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain


def blocks(x, *weights):
    for i in range(BLOCKS):
        g1, wq, wk, wv, wo, g2, wg, wu, wd = weights[9 * i : 9 * i + 9]
        h = norm(x, g1)
        q, k, v = (F.linear(h, w).view(1, ROWS, HEADS, -1).transpose(1, 2) for w in (wq, wk, wv))
        scores = torch.matmul(q, k.transpose(-1, -2)) * (WIDTH // HEADS) ** -0.5
        x = x + F.linear(torch.matmul(scores.softmax(-1), v).transpose(1, 2).reshape(1, ROWS, WIDTH), wo)
        h = norm(x, g2)
        x = x + F.linear(F.silu(F.linear(h, wg)) * F.linear(h, wu), wd)
    return x


@pytest.fixture(scope="module")
def model():
    """The program of three blocks; tests run clones of it."""
    square, gain = (WIDTH, WIDTH), (WIDTH,)
    shapes = [gain, *[square] * 4, gain, (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)]
    weights = [Tensor(*s, gain=0.5, weight=True) for s in shapes * BLOCKS]
    return capture_example(Example(blocks, (Tensor(1, ROWS, WIDTH), *weights)))


@pytest.fixture(scope="module")
def accept(model):
    """Agreement in float64, and in the program's own dtypes up to rounding (a cast shows only there)."""
    wide = tensors_in(Float64(model).run_on(model.example_inputs))
    own = run(model)

    def agrees(other):
        got = tensors_in(Float64(other).run_on(other.example_inputs))
        if any(relative_rms(g, w) > 1e-9 for g, w in zip(got, wide, strict=True)):
            return False
        return all(relative_rms(g, w) <= 2e-6 for g, w in zip(run(other), own, strict=True))

    return agrees


@pytest.fixture(scope="module")
def applications(model):
    """Nodes where each pass applies, without a fault: name -> [(number over the pipeline, node)]."""
    program, fuel, found = model.clone(), Fuel(), {}
    for p in Pipeline.parse(",".join(NAMES)).passes:
        start = fuel.spent
        report = run_pass(p, program, RunOptions(), fuel)
        found[p.name] = [(start + i + 1, a.node) for i, a in enumerate(report.applied)]
    assert fuel.spent >= 30
    assert all(found[name] for name in FAULTY)
    return found


def faulty(name, index, fault):
    """The pass `name` with a fault in its application `index`, counted from 0."""
    cls = registry.find(name)
    seen = {"applications": -1}

    def apply(self, program, log):
        seen["applications"] = -1
        cls.apply(self, program, log)

    if issubclass(cls, Rewrite):

        def replacement(self, *args, **kwargs):
            out = cls.replacement(self, *args, **kwargs)
            return (fault(out[0]), *out[1:]) if isinstance(out, (tuple, list)) else fault(out)

        replacement.__signature__ = inspect.signature(cls.replacement)
        bad = type(cls.__name__, (cls,), {"replacement": replacement})()

        def one(self, program, m, traces, log, erased):
            seen["applications"] += 1
            if seen["applications"] == index:
                return cls._replace(bad, program, m, {}, log, erased)
            return cls._replace(self, program, m, traces, log, erased)

        return type(cls.__name__, (cls,), {"_replace": one, "apply": apply})()
    if name == "fold-norm-scale":

        def fold(self, program, norm, log):
            seen["applications"] += 1
            if seen["applications"] != index:
                return cls._fold(self, program, norm, log)
            derive = program.derive
            program.derive = lambda n, s, compute: derive(n, s, lambda *t: fault(compute(*t)))
            cls._fold(self, program, norm, log)
            del program.derive
            return None

        return type(cls.__name__, (cls,), {"_fold": fold, "apply": apply})()

    def fuse(program, members, log):
        seen["applications"] += 1
        cls._fuse(program, members, log)
        if seen["applications"] == index:
            done = log._report.applied[-1]
            items = [n for n in program.graph.nodes if n.name in done.inserted[1:]]
            items[0].args, items[1].args = items[1].args, items[0].args

    return type(cls.__name__, (cls,), {"_fuse": staticmethod(fuse), "apply": apply})()


def find(model, accept, applications, name, index, kind):
    passes = [faulty(name, index, FAULTS.get(kind)) if n == name else registry.find(n)() for n in NAMES]
    culprit = bisect(model.clone, Pipeline(passes), accept)
    total = sum(len(v) for v in applications.values())
    number, node = applications[name][index]
    assert culprit is not None, "the fault makes no difference"
    assert (culprit.pass_name, culprit.application, culprit.node) == (name, number, node)
    assert culprit.runs <= math.ceil(math.log2(total)) + 3
    assert 0 < culprit.nodes <= 10
    assert culprit.before.startswith("def region(")
    assert culprit.failure
    return culprit


def cases(count):
    """Seeded (pass, share of its applications, fault), every pass and every fault among the first ones."""
    rng, kinds, made = random.Random(7), list(FAULTS), []
    for i in range(count):
        name = FAULTY[i % len(FAULTY)]
        kind = SWAPPED if name == "fuse-projections" else kinds[(i + i // len(kinds)) % len(kinds)]
        made.append((name, rng.random(), kind))
    return made


def check(model, accept, applications, case):
    name, share, kind = case
    find(model, accept, applications, name, int(share * len(applications[name])), kind)


@pytest.mark.parametrize("case", cases(20), ids=lambda c: f"{c[0]}-{c[2]}".replace(" ", "-"))
def test_a_planted_fault_is_found(model, accept, applications, case):
    check(model, accept, applications, case)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_more_planted_faults_are_found(model, accept, applications, block):
    for case in cases(220)[20 + 20 * block : 40 + 20 * block]:
        check(model, accept, applications, case)


def test_nothing_to_find(model, accept):
    assert bisect(model.clone, Pipeline.parse(",".join(NAMES)), accept) is None


def test_a_fault_outside_the_pipeline(model):
    with pytest.raises(ParityError, match="before any rewrite: wrong result"):
        bisect(model.clone, Pipeline.parse("dead-code"), lambda program: False)


def test_a_rewrite_that_raises_is_named(model, accept, applications):
    def planted(t):
        raise ValueError("planted")

    passes = [faulty(n, 2, planted) if n == "match-linear" else registry.find(n)() for n in NAMES]
    culprit = bisect(model.clone, Pipeline(passes), accept)
    number, node = applications["match-linear"][2]
    assert (culprit.pass_name, culprit.application, culprit.node) == ("match-linear", number, node)
    assert culprit.failure == "ValueError: planted"
    assert culprit.rule == "linear"
    assert culprit.nodes == 1
