"""Trees of drafted tokens give the target's own tokens, whatever drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.kv_rows import KVRows, RowModel
from tilewright.frontends.speculate import Retrieval, Speculator
from tilewright.kernels.load import built_kernels
from tilewright.runtime.draft_length import DraftLength
from tilewright.runtime.token_tree import TokenTree, accept_tree_sampled, grow, grow_together

PROMPTS = [[5, 9, 3, 5, 9], [7], [11, 30, 11, 30], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


class Always(DraftLength):
    def choose(self, limit: int) -> int:
        return max(n for n in self.lengths if n <= limit)


def _model(seed: int = 0, noise: float = 0.0, layers: int = 2, vocabulary: int = 48) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
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


def _draft(name: str, target: Any) -> Any:
    """A draft by name; two more share the target's cache: the target itself, and a lossy pipeline of it."""
    if name == "shared":
        return target
    if name == "lossy":
        options = {"pipeline": "drop-layers{layers=1,max_share=1}", "lower": "eager", "kernels": False}
        return torch.compile(target, backend="tilewright", options=options, dynamic=False)
    return _drafts()[name]


def _target(name: str) -> Any:
    """Compiled code rounds as float32."""
    return _model().float() if name == "lossy" else _model()


KINDS = ["alike", "itself", "foreign", "retrieval", "shared", "lossy"]


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
    for prompt in PROMPTS[1:3]:
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


@pytest.mark.parametrize("name", KINDS)
def test_a_ragged_batch_is_token_identical_and_its_cache_equals_a_fresh_prefill(name: str) -> None:
    target = _target(name)
    made = _speculator(target, _draft(name, target))
    want = [_plain(target, prompt, 14, ()) for prompt in PROMPTS]
    assert made.generate(PROMPTS, 14, stop_tokens=()) == want
    assert made.statistics.drafted > 0
    if name in ("itself", "shared"):
        assert made.statistics.tokens_per_call > 2.5 * len(PROMPTS)
    kv = made._caches["target"]
    for b, row in enumerate(want):
        fresh = target(torch.tensor([row]), use_cache=True).past_key_values
        places = kv.used[b].nonzero().flatten()
        assert len(places) == kv.held[b] >= len(row) - 1
        for layer, other in zip(kv.cache.layers, fresh.layers, strict=True):
            torch.testing.assert_close(layer.keys[b][:, places], other.keys[0][:, : len(places)])
            torch.testing.assert_close(layer.values[b][:, places], other.values[0][:, : len(places)])


@pytest.mark.parametrize("name", ["itself", *[pytest.param(n, marks=pytest.mark.slow) for n in KINDS]])
def test_a_stop_token_inside_an_accepted_path_ends_its_row_alone(name: str) -> None:
    target = _target(name)
    made = _speculator(target, _draft(name, target), 12)
    rows = [_plain(target, prompt, 12, ()) for prompt in PROMPTS]
    stops = tuple(row[len(prompt) + 3] for row, prompt in zip(rows, PROMPTS, strict=True))
    for stop in (stops[:1], stops[1:2], stops):
        want = [_plain(target, prompt, 12, stop) for prompt in PROMPTS]
        assert made.generate(PROMPTS, 12, stop_tokens=stop) == want
    assert len({len(row) - len(p) for row, p in zip(want, PROMPTS, strict=True)}) > 1
    for count in (1, 2, 3):
        want = [_plain(target, prompt, count, ()) for prompt in PROMPTS]
        assert made.generate(PROMPTS, count, stop_tokens=()) == want


@pytest.mark.parametrize("name", ["foreign", pytest.param("shared", marks=pytest.mark.slow)])
def test_holes_may_be_closed_before_every_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, closed = _model(), []
    monkeypatch.setattr(KVRows, "reserve", lambda kv, _: closed.append(kv.length and kv._close_holes()))
    made = _speculator(target, _draft(name, target), 6)
    assert made.generate(PROMPTS, 12, stop_tokens=()) == [_plain(target, p, 12, ()) for p in PROMPTS]
    assert len(closed) > made.statistics.target_calls


@pytest.mark.slow
def test_a_compiled_target_confirms_the_trees_of_a_ragged_batch() -> None:
    """4 rows of 12 drafts and a token: linear layers of 52 rows, by the kernel for so many."""
    torch._dynamo.reset()
    target = _model().float()
    options = {"pipeline": "exact"}
    compiled = torch.compile(target, backend="tilewright", options=options, dynamic=False)
    made = _speculator(compiled, _model(noise=0.05).float(), 12)
    assert made.generate(PROMPTS, 24, stop_tokens=()) == [_plain(target, p, 24, ()) for p in PROMPTS]
    assert made.statistics.accepted > made.statistics.target_calls
    stop = _plain(target, PROMPTS[2], 24, ())[len(PROMPTS[2]) + 3]
    want = [_plain(target, prompt, 24, (stop,)) for prompt in PROMPTS]
    assert made.generate(PROMPTS, 24, stop_tokens=[stop]) == want
    assert any("panel" in dict(key.config) for key in built_kernels() if key.op.startswith("linear"))
    torch._dynamo.reset()


@pytest.mark.slow
def test_many_numbers_of_rows_all_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Target and draft over 1 to 4 rows have more programs than torch's own limit for a function, past which
    steps would run eagerly."""
    torch._dynamo.reset()
    compiled, quick = torch.compile, {"lower": "eager", "kernels": False}
    monkeypatch.setattr(
        torch, "compile", lambda *given, options, **how: compiled(*given, options={**options, **quick}, **how)
    )
    target = _model().float()
    made = _speculator(target, "drop-layers{layers=1,max_share=1}", 3, pipeline="exact")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows in range(1, 5):
            want = [_plain(target, prompt, 6, ()) for prompt in PROMPTS[:rows]]
            assert made.generate(PROMPTS[:rows], 6, stop_tokens=()) == want
    torch._dynamo.reset()


@pytest.mark.parametrize("place", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_stop_token_inside_an_accepted_path_ends_the_row(place: int) -> None:
    target = _model()
    made = _speculator(target, _model(), 12)
    for prompt in PROMPTS:
        stop = (_plain(target, prompt, 12, ())[len(prompt) + place],)
        assert made.generate([prompt], 12, stop_tokens=stop) == [_plain(target, prompt, 12, stop)]
        for count in (1, 2, 3):
            assert made.generate([prompt], count, stop_tokens=()) == [_plain(target, prompt, count, ())]


def test_without_drafts_a_step_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask of trees, no call of the draft."""
    target, draft = _model(), _model(seed=5, layers=1)
    made = tw.speculate(target, draft, tree=4)
    made.length.observe(0, 1.0, 1.0, 0, 0)
    monkeypatch.setattr(made.length, "choose", lambda limit: 0)
    monkeypatch.setattr(RowModel, "feed_seeing", None)
    monkeypatch.setattr(draft, "forward", lambda *_, **__: 1 / 0)
    assert made.generate(PROMPTS, 12, stop_tokens=()) == [_plain(target, p, 12, ()) for p in PROMPTS]
    assert made.statistics.drafted == 0


def test_the_second_child_is_worth_its_own_share() -> None:
    """Behind the second word of the root a child is as likely as both together say: 0.4 x 0.9."""
    answers = {(): [(1, 0.6), (2, 0.4)], (1,): [(3, 0.5), (4, 0.5)], (2,): [(5, 0.9), (6, 0.1)]}
    growth = grow(6, 2, 2, sample=False)
    tree = grow_together(
        {0: growth}, lambda asked: {b: answers[tuple(t.words(n))] for b, (t, n) in asked.items()}
    )
    assert tree[0].tokens == [1, 3, 2, 5, 4, 6]


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
        growth = grow(5, 2, branches, sample=not certain, generator=generator)
        tree = grow_together({0: growth}, lambda asked: {b: q[row(*a)].clone() for b, a in asked.items()})[0]
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


@pytest.mark.parametrize("name", ["foreign", pytest.param("lossy", marks=pytest.mark.slow)])
def test_sampled_texts_of_a_ragged_batch_have_the_targets_distribution(name: str) -> None:
    """The tokens of a tree's round, through models, caches and masks, against the exact probabilities, on a
    vocabulary of 4."""
    target = _model(vocabulary=4) if name == "foreign" else _model(vocabulary=4).float()
    draft = _model(seed=5, vocabulary=4) if name == "foreign" else _draft(name, target)
    made = _speculator(target, draft, 5, branches=2)
    prompts, copies, calls, temperature = [[3], [1, 0, 2, 2]], 24, 12, 1.5
    counts = torch.zeros(2, 4, 4, dtype=torch.float64)
    tried = kept = 0
    for seed in range(calls):
        texts = made.generate(prompts * copies, 3, temperature=temperature, seed=seed, stop_tokens=())
        tried, kept = tried + made.statistics.drafting_rounds, kept + made.statistics.accepted
        for b, text in enumerate(texts):
            counts[(b % 2, *text[-2:])] += 1
    assert 0.1 < kept / (tried * 2 * copies) < 0.95
    for prompt, found in zip(prompts, counts, strict=True):
        want = _chances(target, prompt, temperature).sum(0) * copies * calls
        assert float(((found - want).square() / want).sum()) < 37.7  # 15 degrees, p = 0.001


@torch.no_grad()
def _chances(model: Any, prompt: list[int], temperature: float) -> torch.Tensor:
    """[4, 4, 4], float64: how likely the next three tokens are."""
    words = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ids = torch.cat((torch.tensor(prompt).expand(64, -1), words), 1)
    shares = (model(ids).logits[:, -4:-1].double() / temperature).softmax(-1)
    return shares.gather(2, words[..., None]).prod(1).view(4, 4, 4)


def test_sampling_through_the_models_keeps_alike_texts() -> None:
    """A draft equal to the target is always accepted at its first child."""
    made = _speculator(_model(), _model(), 4, branches=1)
    made.generate(PROMPTS, 20, temperature=0.9, seed=3, stop_tokens=())
    assert made.statistics.accepted == made.statistics.drafted > 0


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(OptionError, match="tree = 65"):
        tw.speculate(_model(), tree=65)
