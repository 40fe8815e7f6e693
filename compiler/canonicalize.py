"""One normal form of flat pre-dispatch ATen: equal programs of both frontends become equal graphs.

Every rule keeps every bit of every result: it drops what does nothing, spells data movement and arguments in
one way, or replaces an op by another that runs the same arithmetic. What a rule does not understand stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilewright.compiler import canonical_arithmetic, canonical_layout, canonical_noops
from tilewright.compiler.canonical_context import Canonical, Rule
from tilewright.compiler.canonical_regions import inline_regions
from tilewright.compiler.diagnostics import VerifyError
from tilewright.compiler.graph import dead_code, set_positional
from tilewright.compiler.storage_alias import base_name

_ROUNDS = 16
"""More rounds than any graph needs: each rule makes the graph smaller or its spelling final."""


def _table() -> dict[str, tuple[Rule, ...]]:
    table: dict[str, tuple[Rule, ...]] = {}
    for rules in (canonical_noops.RULES, canonical_layout.RULES, canonical_arithmetic.RULES):
        for name, found in rules.items():
            table[name] = table.get(name, ()) + found
    return table


_RULES = _table()


def canonicalize(gm: fx.GraphModule, *, training: bool = False) -> dict[str, int]:
    """Bring a graph into normal form, in place; returns how often each rule applied.

    Run it after `functionalize`. Results are bit-equal, and what remains keeps its strides: the order of
    a reduction follows them. A second run changes nothing.

    training: keep `detach` and regions without gradients, which matter to autograd.

    Raises VerifyError when the rules do not come to rest.
    """
    counts = inline_regions(gm, training=training)
    while True:
        state = Canonical(gm, training)
        _run_to_rest(state)
        counts.update(state.counts)
        if not (state.counts and state.held_back):
            break
    gm.recompile()
    return dict(sorted(counts.items()))


def _run_to_rest(state: Canonical) -> None:
    """Sweep until nothing changes."""
    for _ in range(_ROUNDS):
        before = state.counts.total()
        _sweep(state)
        removed = len(dead_code(state.graph))
        if removed:
            state.counts["dead-code"] += removed
        if state.counts.total() == before:
            return
    raise VerifyError(f"the canonical rules did not come to rest in {_ROUNDS} rounds: {dict(state.counts)}")


def _sweep(state: Canonical) -> None:
    """Apply every rule once to every node in order."""
    for node in list(state.graph.nodes):
        if node.op != "call_function" or _is_erased(node):
            continue
        if node.target in canonical_arithmetic.PYTHON_OPS or node.target in canonical_arithmetic.SIZE_OPS:
            canonical_arithmetic.known_size(state, node)
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if set_positional(node):
            state.counts["arguments"] += 1
        canonical_layout.positive_dims(state, node)
        for rule in _RULES.get(base_name(node.target), ()):
            if rule(state, node):
                break


def _is_erased(node: Any) -> bool:
    return bool(node._erased)
