"""Every rule under one-step mutants of its own examples (refused or right) and under respellings (matched)."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import fx

from tilewright.compiler import registry
from tilewright.compiler.mutate import mutants
from tilewright.compiler.passes_base import Tensor
from tilewright.compiler.respell import respell
from tilewright.compiler.selftest import capture_example

RULES = sorted(name for name in registry.names() if name.startswith("match-"))
NEEDED_MUTANTS, NEEDED_SPELLINGS = 40, 20
QUICK = 48
"""Mutants, and respellings, of each rule that the quick test looks at; the slow one looks at all."""


def programs(cls):
    """(pass value, real inputs, places of weights, captured module) of the accepting examples."""
    for options, example in cls.examples():
        if example.refusal is None and example.count == 1 and not example.training:
            generator = torch.Generator().manual_seed(0)
            values = [v.make(generator) if isinstance(v, Tensor) else v for v in example.inputs]
            weights = [i for i, v in enumerate(example.inputs) if isinstance(v, Tensor) and v.weight]
            module = capture_example(example).module
            if not any(n.target is torch.ops.aten.copy_.default for n in module.graph.nodes):
                yield cls(**options), values, weights, fx.GraphModule(module, module.graph)


def varied(cls, make, limit):
    """Round-robin over the examples: (value, inputs, weights, mutant), at most `limit`."""
    streams = [((v, i, w, m) for m in make(module, i)) for v, i, w, module in programs(cls)]
    mixed = (item for row in itertools.zip_longest(*streams) for item in row if item is not None)
    return itertools.islice(mixed, limit)


def check_mutants(cls, judge, limit):
    seen, applied = Counter(), 0
    for value, inputs, weights, mutant in varied(cls, mutants, limit):
        outcome = judge(value, mutant.module, inputs, weights)
        assert outcome.is_right, (mutant.description, outcome)
        seen[mutant.kind] += 1
        applied += bool(outcome.applied)
    assert seen.total() >= NEEDED_MUTANTS, seen
    return seen, applied


def check_spellings(cls, judge, limit):
    matched, missed = 0, []
    for value, inputs, weights, spelling in varied(cls, respell, limit):
        outcome = judge(value, spelling.module, inputs, weights)
        assert outcome.is_right, (spelling.description, outcome)
        matched += outcome.applied == 1
        if outcome.applied != 1:
            missed.append((spelling.description, outcome.applied, outcome.reasons))
    assert matched >= NEEDED_SPELLINGS, (matched, missed)
    return matched, missed


@pytest.mark.parametrize("name", RULES)
def test_mutants_are_refused_or_right(judge, name):
    check_mutants(registry.find(name), judge, QUICK)


@pytest.mark.parametrize("name", RULES)
def test_equivalent_spellings_match(judge, name):
    matched, missed = check_spellings(registry.find(name), judge, QUICK)
    assert not missed, missed


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_all_mutants_and_spellings(judge, name):
    check_mutants(registry.find(name), judge, None)
    check_spellings(registry.find(name), judge, None)
