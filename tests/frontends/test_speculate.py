"""Speculation gives the target's own tokens, whatever drafts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import tilewright as tw
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.sampling import Sampling
from tilewright.frontends.speculate import Retrieval, Speculator
from tilewright.runtime.draft_length import DraftLength

V = 48
PROMPTS = [[5, 9, 3, 5, 9], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 30, 11, 30]]


class Always(DraftLength):
    """Drafts the greatest allowed length."""

    def choose(self, limit: int) -> int:
        return max(n for n in self.lengths if n <= limit)


def _model(seed: int = 0, layers: int = 2, vocabulary: int = V, noise: float = 0.0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=400,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).double().eval()
    if noise:
        torch.manual_seed(99)
        for weight in model.parameters():
            weight.data += noise * torch.randn_like(weight)
    return model


def _drafts() -> dict[str, Any]:
    return {
        "alike": _model(noise=0.03),
        "itself": _model(),
        "foreign": _model(seed=5, layers=1),
        "retrieval": Retrieval(shortest=1),
        "datastore": Retrieval([[5, 9, 3, 5, 9, 7, 1], [7, 20, 21, 22, 23, 24]], shortest=1),
        "none": None,
    }


def _speculator(target: nn.Module, draft: Any, length: int = 4, **given: Any) -> Speculator:
    made = tw.speculate(target, draft, lengths=(1, length), **given)
    made.length = Always(made.length.lengths)
    return made


def _eager(model: nn.Module, pipeline: str) -> Any:
    """Compiled without Inductor, for speed of the test."""
    options = {"pipeline": pipeline, "lower": "eager", "kernels": False}
    return torch.compile(model, backend="tilewright", options=options, dynamic=False)


@torch.no_grad()
def _plain(model: Any, prompt: list[int], count: int, stop: tuple[int, ...] = (2,)) -> list[int]:
    """Greedy decoding without any cache: the definition."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in stop:
            break
    return tokens


@pytest.mark.parametrize("name", _drafts())
def test_token_identical_alone_and_in_a_ragged_batch(name: str) -> None:
    target = _model()
    made = _speculator(target, _drafts()[name])
    want = [_plain(target, p, 40) for p in PROMPTS]
    for prompt, expected in zip(PROMPTS, want, strict=True):
        assert made.generate([prompt], 40) == [expected]
    counts = made.statistics
    assert counts.target_calls == len(want[-1]) - len(PROMPTS[-1]) - 1 if name == "none" else counts.drafted
    if name == "itself":
        assert counts.accepted == counts.drafted > 0
    assert made.generate(PROMPTS, 40) == want
    assert made.generate(PROMPTS[::-1], 40) == want[::-1]


@pytest.mark.parametrize("draft", ["alike", "retrieval"])
def test_every_number_of_tokens(draft: str) -> None:
    target = _model()
    made = _speculator(target, _drafts()[draft])
    whole = [_plain(target, p, 9) for p in PROMPTS]
    for count in range(1, 10):
        want = [row[: len(p) + count] for row, p in zip(whole, PROMPTS, strict=True)]
        assert made.generate(PROMPTS, count) == want


def test_a_stop_token_inside_an_accepted_prefix_ends_the_row() -> None:
    target = _model()
    made = _speculator(target, _model(), 8)
    rows = [_plain(target, p, 20) for p in PROMPTS]
    inside = [row[len(p) + 3] for row, p in zip(rows, PROMPTS, strict=True)]
    want = [_plain(target, p, 20, tuple(inside)) for p in PROMPTS]
    got = made.generate(PROMPTS, 20, stop_tokens=inside)
    assert got == want
    assert min(len(row) - len(p) for row, p in zip(got, PROMPTS, strict=True)) < 8
    assert [made.generate([p], 20, stop_tokens=inside)[0] for p in PROMPTS] == want


@pytest.mark.slow
def test_holes_are_closed_when_a_batch_runs_out_of_slots() -> None:
    target = _model()
    made = _speculator(target, _drafts()["foreign"], 6)
    prompts = [[3, 4], [5], [6, 7, 8]]
    got = made.generate(prompts, 130, stop_tokens=())
    assert got == [_plain(target, p, 130, ()) for p in prompts]
    kv = made._caches["target"]
    assert made.statistics.target_calls * 2 > kv.capacity - 40, "the holes never had to be closed"


def test_the_cache_equals_a_fresh_prefill_after_any_pattern() -> None:
    target = _model()
    for draft in ("alike", "foreign", "retrieval"):
        made = _speculator(target, _drafts()[draft])
        got = made.generate(PROMPTS, 25, stop_tokens=())
        kv = made._caches["target"]
        for b, row in enumerate(got):
            fresh = target(torch.tensor([row]), use_cache=True).past_key_values
            held = kv.held[b]
            for layer, other in zip(kv.cache.layers, fresh.layers, strict=True):
                torch.testing.assert_close(layer.keys[b][:, kv.used[b]], other.keys[0][:, :held])
                torch.testing.assert_close(layer.values[b][:, kv.used[b]], other.values[0][:, :held])


def _pair_distribution(target: Any, prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """[5, 5]: the exact distribution of the second and third new token."""

    @torch.no_grad()
    def after(*tokens: int) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *tokens]])
        found = sampling.propose([*prompt, *tokens], target(ids).logits[0, -1])[1]
        assert found is not None
        return found

    first = after()
    rows = [first[a] * after(a)[b] * after(a, b) for a in range(5) for b in range(5)]
    return torch.stack(rows).view(5, 5, 5).sum(0)


@pytest.mark.parametrize("draft", [pytest.param("model", marks=pytest.mark.slow), "retrieval"])
def test_sampled_text_has_the_targets_distribution(draft: str) -> None:
    target, prompt = _model(vocabulary=5), [4, 3, 2, 1, 0, 4]
    drafts = {"model": _model(vocabulary=5, noise=0.3), "retrieval": Retrieval(shortest=1)}
    made = _speculator(target, drafts[draft], 2)
    hot: dict[str, Any] = {"temperature": 1.3, "top_k": 4, "top_p": 0.97}
    want = _pair_distribution(target, prompt, Sampling.of(**hot, seed=0)).flatten()
    counts, drafted, accepted = torch.zeros(25, dtype=torch.float64), 0, 0
    for seed in range(20):
        for row in made.generate([prompt] * 32, 4, seed=seed, stop_tokens=(), **hot):
            counts[row[7] * 5 + row[8]] += 1
        drafted, accepted = drafted + made.statistics.drafted, accepted + made.statistics.accepted
    assert 0.05 < accepted / drafted < 0.95
    possible = want > 0
    assert float(counts[~possible].sum()) == 0.0
    want = want[possible] * counts.sum()
    assert float(want.max() / counts.sum()) < 0.5, "the distribution is too sharp to test anything"
    assert float(((counts[possible] - want).square() / want).sum()) < 51.18  # 24 degrees, p = 0.001


def test_generate_of_transformers_with_processors_callback_and_padding() -> None:
    target = _model()
    made = _speculator(target, _model(noise=0.03))
    how: dict[str, Any] = dict(max_new_tokens=17, do_sample=False, pad_token_id=0)
    one = torch.tensor([PROMPTS[0]])
    extras: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}]
    for extra in extras:
        seen: list[int] = []
        want = target.generate(one, **how, **extra)
        extra["on_tokens"] = lambda row, new, seen=seen: seen.extend(new)
        got = target.generate(one, custom_generate=made, **how, **extra)
        assert torch.equal(got, want)
        assert seen == want[0, one.shape[1] :].tolist()
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    want = target.generate(ids, attention_mask=mask, **how)
    assert torch.equal(target.generate(ids, attention_mask=mask, custom_generate=made, **how), want)
    with pytest.raises(OptionError, match="another model"):
        _model(seed=3).generate(one, custom_generate=made, **how)


def test_streaming() -> None:
    target = _model()
    made = _speculator(target, "retrieval")
    want = _plain(target, PROMPTS[0], 12)[len(PROMPTS[0]) :]
    assert list(made.stream(PROMPTS[0], 12)) == want
    calls: list[tuple[int, list[int]]] = []
    made.generate([PROMPTS[0]], 12, on_tokens=lambda row, new: calls.append((row, list(new))))
    assert [t for _, new in calls for t in new] == want
    stream = made.stream(PROMPTS[0], 12)
    next(stream)
    with pytest.raises(OptionError, match="generating already"):
        made.generate([[1]], 2)
    stream.close()
    assert made.generate([PROMPTS[0]], 12) == [PROMPTS[0] + want]


def test_a_draft_that_fails_leaves_the_speculator_usable() -> None:
    target, draft = _model(), _model(noise=0.03)
    made = _speculator(target, draft)
    want = made.generate(PROMPTS, 12)
    forward = draft.model.layers[1].forward
    draft.model.layers[1].forward = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        made.generate(PROMPTS, 12)
    draft.model.layers[1].forward = forward
    assert made.generate(PROMPTS, 12) == want


def test_a_pipeline_of_the_target_drafts_from_its_cache() -> None:
    torch._dynamo.reset()
    target = _model(layers=4).float()
    target.generation_config.eos_token_id = None
    made = _speculator(target, _eager(target, "drop-layers{layers=2}"), 3)
    prompt = PROMPTS[0]
    got = made.generate([prompt], 24)
    assert got == [_plain(target, prompt, 24, ())]
    assert list(made._caches) == ["target"]
    assert made.statistics.drafted > 0
    torch._dynamo.reset()


def test_a_round_that_compiles_is_not_timed() -> None:
    torch._dynamo.reset()
    target = _model().float()
    made = tw.speculate(_eager(target, "exact"), _model().float(), lengths=(3,))
    timed: list[tuple[int, float]] = []
    made.length.observe = lambda *given: timed.append(given[:2])  # type: ignore[method-assign]
    made.length.choose = lambda limit: min(limit, 3)  # type: ignore[method-assign]
    made.generate([PROMPTS[3]], 24, stop_tokens=())
    lengths = {n for n, _ in timed}
    assert len(timed) == made.statistics.target_calls - len(lengths) > 4
    assert 3 in lengths
    torch._dynamo.reset()


@pytest.mark.parametrize("tree", [0, 4])
def test_a_batch_is_as_far_as_its_last_row(tree: int) -> None:
    """What rounds are worth adds up to the plain steps of the batch, though rows get on at their own pace."""
    made = tw.speculate(_model(), _drafts()["datastore"], lengths=(3,), tree=tree)
    worth: list[float] = []
    made.length.observe = lambda *given: worth.append(given[2])  # type: ignore[method-assign]
    made.length.choose = lambda limit: min(limit, made.length.lengths[-1])  # type: ignore[method-assign]
    made.generate(PROMPTS, 24, stop_tokens=())
    assert sum(worth) == 23
    assert made.statistics.accepted > 0
    assert made.statistics.target_calls == len(worth) > made.statistics.tokens / len(PROMPTS) / 2
    worth.clear()
    made.generate(PROMPTS, 24)
    assert sum(worth) <= 23
    assert len(worth) == made.statistics.target_calls


@pytest.mark.slow
def test_a_compiled_target() -> None:
    torch._dynamo.reset()
    target = _model().float()
    made = _speculator(_eager(target, "exact"), _model().float(), 2)
    got = made.generate([[5, 9, 3, 5, 9]], 20, stop_tokens=())
    assert got == [_plain(target, [5, 9, 3, 5, 9], 20, ())]
    assert made.statistics.accepted == made.statistics.drafted > 0
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: tw.speculate(m, _model(vocabulary=40)), "vocabulary of 40 tokens, the target of 48"),
        (lambda m: tw.speculate(m, 3), "draft = 3: expected a pipeline's text"),
        (lambda m: tw.speculate(m, nn.Linear(2, 2)), "Linear is no Hugging Face causal language model"),
        (lambda m: tw.speculate(nn.Linear(2, 2)), "Linear is no Hugging Face"),
        (lambda m: tw.speculate(m, lengths=(2, 2)), "different numbers, 0 to 64"),
        (lambda m: tw.speculate(m, prior=0.0), "prior = 0"),
        (lambda m: tw.speculate(m).generate([[]]), "expected at least one token each"),
        (lambda m: tw.speculate(m).generate([[1]], 500), "the model has 400 positions"),
        (lambda m: tw.speculate(m).generate([[1]], temperature=-1.0), "temperature = -1"),
        (lambda m: tw.speculate(m, "no-such-pass"), "no-such-pass"),
    ],
)
def test_bad_input_is_one_clear_error(call: Any, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        call(_model())
    assert isinstance(caught.value, OptionError) or "no-such-pass" in message


def test_processors_see_the_prefix_of_each_position() -> None:
    target = _model()
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    how: dict[str, Any] = dict(max_new_tokens=15, do_sample=False, logits_processor=processors)
    ids = torch.tensor([PROMPTS[2]])
    made = _speculator(target, _model())
    assert torch.equal(target.generate(ids, custom_generate=made, **how), target.generate(ids, **how))


SUBJECTS = ("rivers", "bread", "the moon", "chess", "trains", "bees", "glass", "salt", "maps", "rain")
TASKS = (
    "Write one sentence about {}.",
    "List three facts about {}.",
    "Why do people like {}?",
    "Explain {} to a child.",
    "Write a short poem about {}.",
    "Write a Python function about {}.",
    "Ask me a question about {}.",
    "What is the history of {}?",
    "Name two books about {}.",
    "Repeat three times: I like {}.",
)


@pytest.mark.slow
@torch.no_grad()
def test_a_hundred_prompts_of_smollm2_alone_and_in_ragged_batches() -> None:
    """Token-identical, but for positions where the target's own two best logits are a rounding apart."""
    from tilewright.frontends.bundled_models import BUNDLED

    model = BUNDLED["smollm2"]()
    tokenizer: Any = model.tokenizer
    prompts = [
        tokenizer(task.format(subject), return_tensors="pt")["input_ids"][0].tolist()
        for task in TASKS
        for subject in SUBJECTS
    ]
    judge = _Judge(model.module, 16)
    dropping = _eager(model.module, "drop-layers{layers=14}")
    for draft in (Retrieval(shortest=1), dropping):
        made = _speculator(model.module, draft, 4)
        for i in range(0, len(prompts), 4):
            some = prompts[i : i + 4]
            for prompt, text in zip(some, [made.generate([p], 16)[0] for p in some], strict=True):
                judge(prompt, text)
            for prompt, text in zip(some, made.generate(some, 16), strict=True):
                judge(prompt, text)
    torch._dynamo.reset()


class _Judge:
    """Asserts that a text is what greedy decoding by the model writes: each new token is the best one behind
    those before it, or a rounding apart from it, and the text ends where it should. One call of the model
    gives all of them, as the prompt and the text are known."""

    def __init__(self, model: Any, count: int) -> None:
        self._model, self._count = model, count
        self._right = set[tuple[int, ...]]()

    def __call__(self, prompt: list[int], text: list[int]) -> None:
        if tuple(text) in self._right:
            return
        assert text[: len(prompt)] == prompt
        new, end = text[len(prompt) :], self._model.generation_config.eos_token_id
        assert len(new) == self._count or new[-1] == end
        assert end not in new[:-1]
        logits = self._model(torch.tensor([text[:-1]])).logits[0, len(prompt) - 1 :]
        bound = 8 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
        short = logits.amax(1) - logits[torch.arange(len(new)), new]
        worst = int((short - bound).argmax())
        assert bool((short <= bound).all()), f"new token {worst} is {float(short[worst]):g} below the best"
        self._right.add(tuple(text))
