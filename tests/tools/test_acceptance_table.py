"""The acceptance table's arithmetic, and that its starts are what a generation drafts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewright.frontends.kv_rows import KVRows
from tilewright.frontends.loaders import resolve
from tilewright.tools import acceptance_table
from tilewright.tools.acceptance_table import Row, Table, right_tokens, spread, walk


def _llama() -> Any:
    return resolve("tiny-llama").module


def test_tokens_that_agree_with_the_text() -> None:
    text = [5, 6, 7, 8, 9]
    assert right_tokens([[5, 6, 0], [6, 7, 8], [0, 8, 9]], text) == [2, 3, 0]


def test_a_walk_keeps_at_most_its_length_and_one_token_of_the_target() -> None:
    assert walk([2, 0, 0, 6, 0, 0, 0, 5, 4], 3) == (7, 8, 3)  # starts 0, 3 and 7: 2, 3 and 2 kept
    assert walk([0] * 4, 2) == (0, 7, 4)


def test_a_row_of_the_spread_cache_answers_as_that_prefix_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(acceptance_table, "STARTS", 5)
    model, prompt = _llama(), [3, 1, 4, 1, 5]
    table = Table(model, [prompt])
    text = table.texts[0]
    draft = acceptance_table.LanguageModel.of(model, None)
    ends = [6, 7, 8, 9, 10]
    # the model itself as its draft: all six tokens of every start are the text
    drafts = table._drafts(draft, True, text, ends)
    assert [d == text[e : e + 6] for d, e in zip(drafts, ends, strict=True)] == [True] * 5
    assert right_tokens(drafts, text[6:]) == [6] * 5


def test_spread_leaves_out_what_lies_behind_a_row() -> None:
    model = _llama()
    one, many = KVRows(model.config, 1, 20), KVRows(model.config, 2, 20)
    rows = acceptance_table.LanguageModel.of(model, None).rows
    text = [7, 2, 9, 4, 8, 1]
    rows(one).feed([text])
    spread(one, many, [3, 5])
    got = rows(many).feed([[4], [1]])[:, 0]
    for row, prefix in enumerate(([7, 2, 9, 4], [7, 2, 9, 4, 8, 1])):
        torch.testing.assert_close(
            got[row], model(torch.tensor([prefix])).logits[0, -1], rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_separate_drafts_read_their_own_history(monkeypatch: Any) -> None:
    monkeypatch.setattr(acceptance_table, "STARTS", 3)
    table = Table(_llama(), [[3, 1, 4]])
    shares = [
        table.measure(Row("", "drop-layers{layers=1,max_share=0.5}", shared, ()))[1]
        for shared in (True, False)
    ]
    assert all(len(s) == len(acceptance_table.LENGTHS) for s in shares)
    assert shares[0][0][2] >= 1
