"""Every rule under one-step mutants of its own examples (refused or right) and under respellings
(matched)."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from tilewright.compiler import registry
from tilewright.compiler.mutate import mutants
from tilewright.compiler.passes_base import Example, Tensor
from tilewright.compiler.respell import respell
from tilewright.compiler.selftest import capture_example

RULES = sorted(name for name in registry.names() if name.startswith("match-"))
NEEDED_MUTANTS, NEEDED_SPELLINGS = 40, 20
QUICK = 48
"""Mutants, and respellings, of each rule that the quick test looks at; the slow one looks at all."""

KNOWN_MISSES = (
    "zero added",
    "unsqueezed and squeezed",
    "split and joined",
    "product of transposes",
    "softmax spelled out",
    "mean as sum over count",
    "multiplication in two steps",
    "multiplication as division",
    "subtraction as reverse subtraction",
    *(
        f"{what} at {where}"
        for what in ("clone added", "contiguous added", "multiplied by one")
        for where in ("slice", "expand", "stack")
    ),
)
"""Respellings inside a pattern that may be left alone: no model writes them, and the canonical form keeps
them (x + 0.0 changes -0.0; a copy of a slice or an expanded tensor changes strides). All others have to
match."""


def two_tables(words, places, ids):
    found = F.embedding(ids.clamp(0, 3).permute(1, 0), words) * 2.0
    return (found + F.embedding(ids.permute(1, 0) % 3, places)).sum(0) / 1.5


def two_caches(keys, values, k, v, at):
    k = torch.cat((-k[..., 2:], k[..., :2]), -1).permute(0, 2, 1, 3) * 0.5
    keys = torch.index_copy(keys, 2, at + 1, k)
    return keys * 2.0 + torch.index_copy(values, 2, at, v.permute(0, 2, 1, 3) - 1.0)


def two_layers(x, up, down):
    return torch.tanh(F.linear(F.linear(x, up) * 0.5, down).permute(0, 2, 1)).sum(1) / 2.0


TABLE, CACHE = Tensor(4, 6, weight=True), Tensor(2, 3, 9, 4)
LARGER = {
    "match-embedding": (two_tables, (TABLE, Tensor(4, 6, weight=True), Tensor(2, 5, dtype=torch.int64))),
    "match-kv-update": (
        two_caches,
        (CACHE, CACHE, Tensor(2, 2, 3, 4), Tensor(2, 2, 3, 4), torch.tensor([5, 2])),
    ),
    "match-linear": (two_layers, (Tensor(2, 5, 12), Tensor(7, 12, weight=True), Tensor(12, 7, weight=True))),
}
"""Rules of one op have few attributes to mutate; here they stand among ops that feed and use them."""


def programs(cls):
    """(pass value, real inputs, places of weights, captured module) of accepting examples and larger
    programs."""
    if cls.name in LARGER:
        model, inputs = LARGER[cls.name]
        yield program(cls(), Example(model, inputs))
    for options, example in cls.examples():
        if example.refusal is None and example.count == 1 and not example.training:
            yield program(cls(**options), example)


def program(value, example):
    generator = torch.Generator().manual_seed(0)
    values = [v.make(generator) if isinstance(v, Tensor) else v for v in example.inputs]
    weights = [i for i, v in enumerate(example.inputs) if isinstance(v, Tensor) and v.weight]
    module = capture_example(example).module
    return value, values, weights, fx.GraphModule(module, module.graph)


def writes(module):
    return any(n.target is torch.ops.aten.copy_.default for n in module.graph.nodes)


def varied(cls, make, limit):
    """Round-robin over the examples: (value, inputs, weights, mutant), at most `limit`."""

    def stream(value, inputs, weights, module):
        return ((value, inputs, weights, changed) for changed in make(module, inputs))

    streams = [stream(*p) for p in programs(cls) if not writes(p[3])]
    mixed = (item for row in itertools.zip_longest(*streams) for item in row if item is not None)
    return itertools.islice(mixed, limit)


def check_mutants(cls, judge, limit):
    seen = Counter()
    for value, inputs, weights, mutant in varied(cls, mutants, limit):
        outcome = judge(value, mutant.module, inputs, weights)
        assert outcome.is_right, (mutant.description, outcome)
        seen[mutant.kind] += 1
    assert seen.total() >= NEEDED_MUTANTS, seen


def check_spellings(cls, judge, limit):
    matched, missed = 0, []
    for value, inputs, weights, spelling in varied(cls, respell, limit):
        outcome = judge(value, spelling.module, inputs, weights)
        assert outcome.is_right, (spelling.description, outcome)
        matched += outcome.applied >= 1
        if not outcome.applied and not spelling.description.startswith(KNOWN_MISSES):
            missed.append((spelling.description, outcome.reasons))
    assert matched >= NEEDED_SPELLINGS, (matched, missed)
    assert not missed, missed


@pytest.mark.parametrize("name", RULES)
def test_mutants_are_refused_or_right(judge, name):
    check_mutants(registry.find(name), judge, QUICK)


@pytest.mark.parametrize("name", RULES)
def test_equivalent_spellings_match(judge, name):
    check_spellings(registry.find(name), judge, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_all_mutants_and_spellings(judge, name):
    check_mutants(registry.find(name), judge, None)
    check_spellings(registry.find(name), judge, None)
