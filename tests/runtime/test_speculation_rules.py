"""Acceptance rules, the choice of draft length, and retrieval, without any model."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tilewright.runtime.acceptance import SpeculationError, accept_greedy, accept_sampled
from tilewright.runtime.draft_length import LOAN, DraftLength, expected_tokens
from tilewright.runtime.retrieval import NgramStore

V = 5
P_VALUE_001 = {1: 10.83, 4: 18.47, 24: 51.18}
"""Chi-square at p = 0.001 by degrees of freedom."""


def test_greedy_keeps_the_agreeing_prefix_and_one_token_more() -> None:
    assert accept_greedy([], [7]) == [7]
    assert accept_greedy([3, 4], [3, 4, 5]) == [3, 4, 5]
    assert accept_greedy([3, 4, 9], [3, 6, 9, 1]) == [3, 6]
    with pytest.raises(SpeculationError, match="expected one more"):
        accept_greedy([1], [1])


def _chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    want = p * counts.sum()
    return float(((counts - want).square() / want).sum())


def _pairs(draft: torch.Tensor | None, target: torch.Tensor, rounds: int, seed: int) -> torch.Tensor:
    """Counts [V, V] of the first two tokens of a Markov target, drafted two tokens at a time.

    draft, target: [V + 1, V]; row t follows token t, the last row starts.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(V, V, dtype=torch.float64)
    for _ in range(rounds):
        tokens: list[int] = []
        while len(tokens) < 2:
            drafted: list[int] = []
            q = []
            for _ in range(2):
                before = (tokens + drafted)[-1] if tokens + drafted else V
                if draft is None:
                    drafted.append((before * 3 + 1) % V)
                else:
                    q.append(draft[before])
                    drafted.append(int(torch.multinomial(draft[before], 1, generator=generator)))
            path = [tokens[-1] if tokens else V, *drafted]
            p = torch.stack([target[t] for t in path])
            tokens += accept_sampled(drafted, torch.stack(q) if q else None, p, generator)
        counts[tokens[0], tokens[1]] += 1
    return counts


@pytest.mark.parametrize("kind", ["model", "retrieval"])
def test_sampled_pairs_have_the_target_distribution(kind: str) -> None:
    generator = torch.Generator().manual_seed(11)
    target = torch.rand(V + 1, V, generator=generator, dtype=torch.float64).softmax(-1)
    draft = (3 * torch.randn(V + 1, V, generator=generator, dtype=torch.float64)).softmax(-1)
    want = target[V][:, None] * target[:V]
    counts = sum(_pairs(draft if kind == "model" else None, target, 900, seed) for seed in range(4))
    assert _chi_square(counts.flatten(), want.flatten()) < P_VALUE_001[V * V - 1]  # type: ignore[union-attr]
    wrong = draft[V][:, None] * draft[:V]
    assert _chi_square(counts.flatten(), wrong.flatten()) > 10 * P_VALUE_001[V * V - 1]  # type: ignore[union-attr]


def test_without_the_residual_the_distribution_would_be_wrong() -> None:
    """The mutant: drawing the replacement from p itself fails the same test."""
    p, q = torch.tensor([0.7, 0.1, 0.1, 0.05, 0.05]).double(), torch.full((V,), 0.2).double()
    generator = torch.Generator().manual_seed(0)
    right, mutant = torch.zeros(V).double(), torch.zeros(V).double()
    for _ in range(4000):
        token = int(torch.multinomial(q, 1, generator=generator))
        right[accept_sampled([token], q[None], p[None].repeat(2, 1), generator)[0]] += 1
        keep = float(torch.rand((), generator=generator)) * float(q[token]) < float(p[token])
        mutant[token if keep else int(torch.multinomial(p, 1, generator=generator))] += 1
    assert _chi_square(right, p) < P_VALUE_001[4] < _chi_square(mutant, p)


def test_a_draft_with_the_same_distribution_is_always_kept() -> None:
    p = torch.rand(3, V, dtype=torch.float64).softmax(-1)
    for seed in range(200):
        got = accept_sampled([1, 2], p[:2], p, torch.Generator().manual_seed(seed))
        assert got[:2] == [1, 2]
        assert len(got) == 3
    with pytest.raises(SpeculationError, match="NaN"):
        accept_sampled([], None, torch.full((1, V), math.nan))


def _rounds(chooser: DraftLength, count: int, alpha: float, cost: dict[int, float]) -> float:
    """Run `count` tokens with fixed costs and deterministic acceptance; time over that of plain decoding."""
    tokens, seconds, credit = 0.0, 0.0, 0.0
    while tokens < count:
        n = chooser.choose(64)
        credit += expected_tokens(alpha, n) - 1.0 if n else 0.0
        kept = min(n, int(credit))
        credit -= kept
        chooser.observe(n, cost[n], kept + 1, kept, min(n, kept + 1))
        tokens, seconds = tokens + kept + 1, seconds + cost[n]
    return seconds / (tokens * cost[0])


def test_useless_drafts_cost_three_percent_at_most() -> None:
    for cost in ({0: 1.0, 2: 2.5, 4: 4.0}, {0: 1.0, 2: 1.2, 4: 1.4}):
        chooser = DraftLength([0, 2, 4])
        assert _rounds(chooser, 600, 0.0, cost) < 1.03
        assert _rounds(chooser, 600, 0.0, cost) < 1.03


def test_good_drafts_are_used_and_the_best_length_is_found() -> None:
    chooser = DraftLength([0, 2, 4, 8])
    ratio = _rounds(chooser, 200, 0.9, {0: 1.0, 2: 1.3, 4: 1.6, 8: 4.5})
    assert ratio < 0.5
    assert chooser.choose(64) == 4
    assert chooser.choose(3) == 2
    assert chooser.choose(0) == 0


def test_a_drafter_that_turns_bad_is_left_and_tried_again_later() -> None:
    chooser, cost = DraftLength([0, 3]), {0: 1.0, 3: 1.5}
    _rounds(chooser, 100, 0.9, cost)
    assert chooser.choose(64) == 3
    assert _rounds(chooser, 400, 0.0, cost) < 1.03
    assert chooser.debt <= LOAN * cost[0] + cost[3]
    assert _rounds(chooser, 2000, 0.9, cost) < 0.8


def _drawn_rounds(chooser: DraftLength, texts: int, alpha: float, cost: dict[int, float], seed: int) -> float:
    """Texts of 48 tokens with drawn acceptance, on a machine that takes up to a third longer now and then;
    time of plain decoding over what they took."""
    chance, seconds, plain = random.Random(seed), 0.0, 0.0
    for _ in range(texts):
        chooser.begin(1)
        tokens = 0
        while tokens < 48:
            n, kept = chooser.choose(47 - tokens), 0
            while kept < n and chance.random() < alpha:
                kept += 1
            took = cost[n] * (1.0 + min(chance.expovariate(10.0), 0.33))
            chooser.observe(n, took, kept + 1, kept, min(n, kept + 1))
            tokens, seconds = tokens + kept + 1, seconds + took
        plain += tokens * cost[0] * 1.1
    return plain / seconds


@pytest.mark.parametrize("seed", range(3))
def test_noise_neither_stops_a_good_drafter_nor_lets_a_bad_one_cost_more(seed: int) -> None:
    line, tree = {0: 15.0, 3: 33.0}, {0: 19.5, 6: 97.6}
    assert _drawn_rounds(DraftLength([3]), 80, 0.8, line, seed) > 1.2  # always drafting: 1.34
    for cost, alpha in ((line, 0.0), (line, 0.5), (tree, 0.0), (tree, 0.8)):
        assert _drawn_rounds(DraftLength(list(cost)), 80, alpha, cost, seed) > 0.97


def test_slow_first_steps_are_no_reason_to_draft_for_good() -> None:
    """Drafts that look like a gain beside plain steps held up by something else are none once these are timed
    again, and one such step is not believed at all."""
    chooser, cost = DraftLength([2]), {0: 1.0, 2: 2.5}
    chooser.observe(0, 2.8, 1.0, 0, 0)
    assert chooser.choose(64) == 0
    assert _rounds(chooser, 600, 0.7, cost) < 1.03
    chooser = DraftLength([2])
    for _ in range(3):
        chooser.observe(0, 1.9, 1.0, 0, 0)
    assert chooser.choose(64) == 2
    assert _rounds(chooser, 1000, 0.7, cost) < 1.05
    assert chooser.cost(0) == 1.0


def test_a_held_up_round_is_forgiven() -> None:
    chooser, cost = DraftLength([3]), {0: 1.0, 3: 1.5}
    _rounds(chooser, 60, 0.9, cost)
    chooser.observe(3, 200.0, 4.0, 3, 3)
    assert chooser.choose(64) == 3
    assert chooser.debt == 0.0


def test_each_number_of_rows_has_costs_of_its_own() -> None:
    chooser = DraftLength([3])
    _rounds(chooser, 60, 0.9, {0: 1.0, 3: 1.5})
    chooser.begin(4)
    assert chooser.cost(0) is None
    assert chooser.choose(64) == 0
    _rounds(chooser, 60, 0.9, {0: 2.0, 3: 9.0})
    assert (chooser.cost(0), chooser.cost(3)) == (2.0, 9.0)
    chooser.begin(1)
    assert (chooser.cost(0), chooser.cost(3)) == (1.0, 1.5)


def test_lengths_are_checked() -> None:
    for lengths in ([], [-1], [2, 2]):
        with pytest.raises(SpeculationError, match="different numbers"):
            DraftLength(lengths)
    with pytest.raises(SpeculationError, match="prior = 1"):
        DraftLength([2], prior=1.0)


def test_retrieval_prefers_the_longest_agreement_then_the_most_frequent() -> None:
    store = NgramStore([[1, 2, 3, 4, 9], [7, 2, 3, 5, 5], [8, 2, 3, 5, 6]], shortest=2, longest=8)
    assert store.propose([0, 1, 2, 3], 2) == (3, [4, 9])
    assert store.propose([0, 2, 3], 2)[1][0] == 5
    assert store.propose([3, 2], 4) == (0, [])
    assert store.propose([3], 4) == (0, [])
    with pytest.raises(SpeculationError, match="shortest"):
        NgramStore(shortest=3, longest=2)


def test_a_growing_text_never_proposes_its_own_end() -> None:
    store = NgramStore([()], shortest=2)
    text: list[int] = []
    for token in (1, 2, 3, 1, 2):
        store.extend(0, [token])
        text.append(token)
    assert store.propose(text, 8) == (2, [3, 1, 2])
    store.extend(0, [4])
    assert store.propose([*text, 4], 8) == (0, [])
