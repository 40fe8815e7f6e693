"""Trees of drafted tokens give the target's own tokens, whatever drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.speculate import Retrieval, Speculator
from tilewright.runtime.draft_length import DraftLength
from tilewright.runtime.token_tree import TokenTree, accept_tree_sampled, grow

PROMPTS = [[5, 9, 3, 5, 9], [7], [11, 30, 11, 30]]


class Always(DraftLength):
    def choose(self, limit: int) -> int:
        return max(n for n in self.lengths if n <= limit)


def _model(seed: int = 0, noise: float = 0.0, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=400,
        bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    torch.manual_seed(99)
    for weight in model.parameters():
        weight.data += noise * torch.randn_like(weight)
    return model


def _drafts() -> dict[str, Any]:
    return {
        "alike": _model(noise=0.05),
        "itself": _model(),
        "foreign": _model(seed=5, layers=1),
        "retrieval": Retrieval([[5, 9, 3, 5, 9, 7, 1], [9, 3, 5, 9, 8]], shortest=1),
    }


def _speculator(target: Any, draft: Any, tree: int = 9, **given: Any) -> Speculator:
    made = tw.speculate(target, draft, tree=tree, **given)
    made.length = Always(made.length.lengths)
    return made


@torch.no_grad()
def _plain(model: Any, prompt: list[int], count: int, stop: tuple[int, ...] = (2,)) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in stop:
            break
    return tokens


@pytest.mark.parametrize("name", _drafts())
def test_greedy_is_token_identical_and_the_cache_equals_a_fresh_prefill(name: str) -> None:
    target = _model()
    made = _speculator(target, _drafts()[name])
    for prompt in PROMPTS[1:]:
        want = _plain(target, prompt, 14, ())
        assert made.generate([prompt], 14, stop_tokens=()) == [want]
        kv = made._caches["target"]
        fresh = target(torch.tensor([want]), use_cache=True).past_key_values
        for layer, other in zip(kv.cache.layers, fresh.layers, strict=True):
            held = kv.held[0]
            assert held >= len(want) - 1
            assert kv.length == held
            torch.testing.assert_close(layer.keys[:, :, :held], other.keys[:, :, :held])
            torch.testing.assert_close(layer.values[:, :, :held], other.values[:, :, :held])
        assert made.statistics.drafted > 0
        if name == "itself":
            assert made.statistics.tokens_per_call > 2.5


@pytest.mark.parametrize("place", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_stop_token_inside_an_accepted_path_ends_the_row(place: int) -> None:
    target = _model()
    made = _speculator(target, _model(), 12)
    for prompt in PROMPTS:
        stop = (_plain(target, prompt, 12, ())[len(prompt) + place],)
        assert made.generate([prompt], 12, stop_tokens=stop) == [_plain(target, prompt, 12, stop)]
        for count in (1, 2, 3):
            assert made.generate([prompt], count, stop_tokens=()) == [_plain(target, prompt, count, ())]


def test_one_branch_is_the_linear_draft() -> None:
    target, draft = _model(), _model(noise=0.05)
    tree, line = _speculator(target, draft, 4, branches=1), tw.speculate(target, draft, lengths=(1, 2, 3, 4))
    line.length = Always(line.length.lengths)
    for prompt in PROMPTS:
        assert tree.generate([prompt], 24, stop_tokens=()) == line.generate([prompt], 24, stop_tokens=())
        a, b = tree.statistics, line.statistics
        assert (a.target_calls, a.accepted, a.drafted) == (b.target_calls, b.accepted, b.drafted)


@pytest.mark.parametrize(
    ("branches", "certain"),
    [
        (3, False),
        *[pytest.param(*given, marks=pytest.mark.slow) for given in ((1, False), (1, True), (3, True))],
    ],
)
def test_sampled_paths_have_the_targets_distribution(branches: int, certain: bool) -> None:
    """Pairs of tokens against the exact probabilities, on a vocabulary of 4."""
    generator = torch.Generator().manual_seed(7)
    p = torch.rand(5, 4, generator=generator, dtype=torch.float64).softmax(-1)
    q = (2.5 * torch.rand(5, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    p = p * torch.tensor([1.0, 3.0, 0.5, 2.0])
    p /= p.sum(-1, True)

    def row(tree: TokenTree, node: int) -> int:
        """Row 0 for the first token, row 1 + t behind token t."""
        return 0 if node < 0 else 1 + tree.tokens[node]

    counts, rounds, kept = torch.zeros(4, 4, dtype=torch.float64), 2000, 0
    for _ in range(rounds):
        tree = grow(
            lambda t, n: q[row(t, n)].clone(), 5, 2, branches, sample=not certain, generator=generator
        )
        targets = torch.stack([p[row(tree, n)] for n in range(-1, len(tree.tokens))])
        path, last = accept_tree_sampled(tree, targets, generator)
        words = [*[tree.tokens[n] for n in path], last][:2]
        kept += len(path)
        if len(words) == 1:
            words.append(int(torch.multinomial(p[1 + words[0]], 1, generator=generator)))
        counts[words[0], words[1]] += 1
    want = p[0][:, None] * p[1:] * rounds
    assert 0.1 * rounds < kept < 1.9 * rounds
    assert float(((counts - want).square() / want).sum()) < 37.7  # 15 degrees, p = 0.001


def test_sampling_through_the_models_keeps_alike_texts() -> None:
    """A draft equal to the target is always accepted at its first child."""
    made = _speculator(_model(), _model(), 4, branches=1)
    made.generate([PROMPTS[0]], 20, temperature=0.9, seed=3, stop_tokens=())
    assert made.statistics.accepted == made.statistics.drafted > 0


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(OptionError, match="tree = 65"):
        tw.speculate(_model(), tree=65)
    with pytest.raises(OptionError, match="one row at a time"):
        tw.speculate(_model(), tree=4).generate([[1], [2]], 4)
