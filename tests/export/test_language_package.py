"""`generate()` of transformers over a package: the tokens of the model, request by request; refusals."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

import tilewright as tw
from tilewright.compiler.diagnostics import LoadError, OptionError
from tilewright.frontends.cache_argument import cache_name
from tilewright.frontends.cli import main
from tilewright.frontends.compile import CompileOptions
from tilewright.frontends.example_calls import causal_lm_examples
from tilewright.frontends.export.artifact import MANIFEST, read_manifest, render
from tilewright.frontends.export.captured import capture, describe_model
from tilewright.frontends.export.entries import decoder_entries, entries_of
from tilewright.frontends.export.language_package import PackagedModel
from tilewright.frontends.loaded_model import LoadedModel
from tilewright.frontends.loaders import resolve

CAPACITY, VOCABULARY, STOP = 40, 61, 7
Pair = tuple[PackagedModel, Any]
"""The package, and the model that it was made of."""


def tiny() -> LoadedModel:
    """One layer, grouped heads, weights large enough for every token to depend on those before it."""
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=64,
        initializer_range=0.6, bos_token_id=1, eos_token_id=STOP, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = LlamaForCausalLM(config).eval()
    return LoadedModel("tiny", "causal-lm", module, None, causal_lm_examples(module))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("package") / "out"
    manifest = tw.export(tiny(), pipeline="exact", path=place, format="pt2", capacity=CAPACITY)
    logits = [row["outputs"][0]["shape"] for row in manifest["entries"]]
    assert logits == [[1, 1, VOCABULARY]] * 2, "prefill gives those of the last token"
    assert {"config.json", "generation_config.json"} <= manifest["files"].keys()
    return place


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return tw.load_language_model(folder), tiny().module


def prompt(seed: int, count: int = 9) -> Tensor:
    return torch.randint(8, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def without_stop(**more: Any) -> GenerationConfig:
    """Greedy, 20 tokens, ended by a token that there is not."""
    return GenerationConfig(**{"max_new_tokens": 20, "do_sample": False, "eos_token_id": VOCABULARY, **more})


def same(pair: Pair, tokens: Tensor, **how: Any) -> Tensor:
    """What both generate, which must be the same."""
    got, want = (model.generate(tokens, **how) for model in pair)
    assert got.tolist() == want.tolist()
    return got


def test_requests_in_turn(pair: Pair) -> None:
    """Prompts of several lengths, one token too; a long request leaves nothing for a short one to see."""
    texts = [
        same(pair, prompt(i, n), generation_config=without_stop()) for i, n in enumerate((20, 9, 2, 1, 9))
    ]
    assert [text.shape[1] for text in texts] == [40, 29, 22, 21, 29]
    assert len({tuple(text[0, -20:].tolist()) for text in texts}) == 5, "the prompts matter"
    assert len(set(texts[0][0, -20:].tolist())) > 4, "the tokens are not all one"


def test_requests_that_take_turns(pair: Pair) -> None:
    """Two requests, a step of one after a step of the other."""
    ours, module = pair
    texts = [prompt(5, 8), prompt(6, 11)]
    caches = [None, None]
    for at in range(6):
        for i, text in enumerate(texts):
            new = text if at == 0 else text[:, -1:]
            found = ours(new, cache=caches[i])
            with torch.no_grad():
                want = module(text).logits[:, -1:]
            torch.testing.assert_close(found.logits, want, rtol=1e-4, atol=1e-4)
            caches[i] = found.cache
            texts[i] = torch.cat([text, found.logits[:, -1].argmax(-1, keepdim=True)], 1)


def test_sampling_processors_and_modes_of_a_loop(pair: Pair) -> None:
    ours, module = pair
    for more in ({"repetition_penalty": 1.3}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        same(pair, prompt(1), generation_config=without_stop(**more))
    drawn = []
    for model in (ours, ours, module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            how = without_stop(do_sample=True, top_k=9, temperature=1.5)
            drawn.append(model.generate(prompt(1), generation_config=how).tolist())
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_cache_goes_on(pair: Pair) -> None:
    """What a request returned may be given to the next, with more tokens behind it."""
    ours, module = pair
    how = without_stop(max_new_tokens=5, return_dict_in_generate=True)
    first = ours.generate(prompt(2), generation_config=how)
    assert first.cache.get_seq_length() == 13, "the last token was not written"
    longer = torch.cat([first.sequences, prompt(3, 4)], 1)
    got = ours.generate(longer, generation_config=without_stop(max_new_tokens=8), cache=first.cache)
    want = module.generate(longer, generation_config=without_stop(max_new_tokens=8))
    assert got.tolist() == want.tolist()
    first.cache.reset()
    again = ours.generate(prompt(4), generation_config=without_stop(), cache=first.cache)
    assert again.tolist() == module.generate(prompt(4), generation_config=without_stop()).tolist()


class Streamer:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming_and_stopping(pair: Pair) -> None:
    """The stop token is that of the model's own generation_config.json."""
    ours, _ = pair
    assert ours.generation_config.eos_token_id == STOP
    tokens = next(t for t in map(prompt, range(99)) if STOP in same(pair, t, max_new_tokens=20)[0].tolist())
    streamer = Streamer()
    text = same(pair, tokens, max_new_tokens=20)
    assert text.shape[1] < 29
    assert text[0, -1] == STOP
    ours.generate(tokens, max_new_tokens=20, streamer=streamer)
    assert streamer.seen == text[0].tolist()
    assert streamer.ended
    three = StoppingCriteriaList([lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 12])])
    how = {"generation_config": without_stop(), "stopping_criteria": three}
    assert same(pair, prompt(1), **how).shape[1] == 12


def test_the_capacity(pair: Pair) -> None:
    ours, module = pair
    whole = without_stop(max_new_tokens=CAPACITY + 1 - 9)
    assert same(pair, prompt(1), generation_config=whole).shape[1] == CAPACITY + 1  # the last is not written
    cache = ours.new_cache()
    with pytest.raises(
        OptionError, match=f"hold {CAPACITY + 1} tokens: the package has buffers of {CAPACITY} "
    ):
        ours.generate(prompt(1), max_new_tokens=CAPACITY + 2 - 9, cache=cache)
    with pytest.raises(OptionError, match="hold 41 tokens: the package has buffers of 40 "):
        ours(prompt(1, 41), cache=cache)
    assert cache.get_seq_length() == 0
    assert not any(bool(b.any()) for b in cache.buffers), "nothing was written"
    ours(prompt(1, CAPACITY), cache=cache)
    before = [b.clone() for b in cache.buffers]
    with pytest.raises(OptionError, match="hold 41 tokens"):
        ours(prompt(2, 1), cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.buffers, strict=True))
    assert cache.get_seq_length() == CAPACITY


@pytest.mark.parametrize(
    ("tokens", "how", "match"),
    [
        (torch.ones(2, 5, dtype=torch.int64), {}, r"shape \(2, 5\): the package takes one text"),
        (torch.ones(1, 0, dtype=torch.int64), {}, "shape"),
        (prompt(1), {"num_return_sequences": 2, "do_sample": True}, r"shape \(2, 9\)"),
        (prompt(1), {"num_beams": 2}, "beam_search"),
        (prompt(1), {"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        (prompt(1), {"attention_mask": torch.tensor([[0, 0, *[1] * 7]])}, "hides 2 of 9 tokens"),
        (prompt(1), {"attention_mask": torch.tensor([[1, 1, 0, *[1] * 6]])}, "hides 1 of 9"),
        (prompt(1), {"position_ids": torch.arange(9)[None] + 1}, "position_ids"),
        (prompt(1), {"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        (torch.tensor([[8, 9, VOCABULARY]]), {}, f"the token {VOCABULARY}: expected 0 to {VOCABULARY - 1}"),
        (torch.tensor([[8, 9, -1]]), {}, "the token -1: expected 0"),
        (torch.ones(1, 5), {}, "input_ids is torch.float32: expected int64"),
        (prompt(1), {"inputs_embeds": torch.ones(1, 9, 48)}, "inputs_embeds is given"),
    ],
)  # fmt: skip
def test_what_a_package_cannot_do(pair: Pair, tokens: Tensor, how: dict[str, Any], match: str) -> None:
    with pytest.raises((OptionError, ValueError), match=match):
        pair[0].generate(tokens, max_new_tokens=3, **how)


def test_foreign_caches(pair: Pair) -> None:
    from transformers import DynamicCache

    ours, _ = pair
    with pytest.raises(OptionError, match="DynamicCache: its buffers are not those of this package"):
        ours.generate(prompt(1), max_new_tokens=3, cache=DynamicCache())
    with pytest.raises(OptionError, match="written by its steps alone"):
        ours.new_cache().update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_tampered_configuration(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    for name in ("config.json", "generation_config.json"):
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace(f'"eos_token_id": {STOP}', '"eos_token_id": 8'))
        capsys.readouterr()
        assert main(["verify", str(copy)]) == 1
        assert f"{name}: its content was changed" in capsys.readouterr().out
        with pytest.raises(LoadError, match=f"{name}: its content was changed"):
            tw.load_language_model(copy)
        (copy / name).write_text(text)


def rewrite(folder: Path, name: str, content: str | None) -> None:
    """Change a file, or take it out, and make the manifest say so: what a stranger could do."""
    manifest = read_manifest(folder)
    if content is None:
        (folder / name).unlink()
        del manifest["files"][name]
    else:
        (folder / name).write_text(content)
        digest = hashlib.sha256(content.encode()).hexdigest()
        manifest["files"][name] = {"sha256": digest, "bytes": len(content.encode())}
    (folder / MANIFEST).write_bytes(render(manifest))


def test_missing_and_foreign_configurations(copy: Path) -> None:
    text = (copy / "config.json").read_text()
    rewrite(copy, "config.json", json.dumps({**json.loads(text), "auto_map": {"AutoConfig": "evil.Config"}}))
    assert not hasattr(tw.load_language_model(copy).config, "auto_map")
    rewrite(copy, "config.json", json.dumps({**json.loads(text), "model_type": "evil"}))
    with pytest.raises(LoadError, match="model_type is 'evil', which transformers does not know"):
        tw.load_language_model(copy)
    rewrite(copy, "generation_config.json", None)
    rewrite(copy, "config.json", text)
    assert tw.load_language_model(copy).generation_config.eos_token_id is None
    rewrite(copy, "config.json", None)
    with pytest.raises(LoadError, match=r"has no config\.json"):
        tw.load_language_model(copy)
    rewrite(copy, "config.json", text)
    manifest = read_manifest(copy)
    shape = manifest["entries"][0]["inputs"][0]["shape"]
    assert shape == [1, "sequence"]
    shape[1] = 17
    (copy / MANIFEST).write_bytes(render(manifest))
    with pytest.raises(LoadError, match="its prefill takes 17 tokens and no other number"):
        tw.load_language_model(copy)
    manifest["entries"] = manifest["entries"][:1]
    (copy / MANIFEST).write_bytes(render(manifest))
    with pytest.raises(LoadError, match="prefill and decode steps over buffers"):
        tw.load_language_model(copy)


def test_the_command_line(pair: Pair, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(folder), "--tokens", "6", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    tokens = torch.arange(3, 11)[None]
    want = pair[1].generate(tokens, max_new_tokens=6, do_sample=False)[0].tolist()
    assert said["text"] == str(want)
    assert (said["prompt_tokens"], said["new_tokens"]) == (8, len(want) - 8)
    for words in (["--eager"], ["--pipeline", "cpu-int4"], ["--no-kernels"], ["--fact", "a=1"]):
        assert main(["run", str(folder), *words]) == 2
        assert f"{words[0]}: {folder} was exported" in capsys.readouterr().err
    assert main(["run", str(folder), "--tokens", "50"]) == 2
    assert "hold 57 tokens: the package has buffers of 40" in capsys.readouterr().err
    assert main(["explain", str(folder)]) == 2
    assert "is an export, which was rewritten already" in capsys.readouterr().err


def test_the_fingerprint_is_the_models_whatever_form_it_is_exported_in() -> None:
    loaded = tiny()
    state = loaded.module.state_dict(keep_vars=True) | dict(loaded.module.named_buffers())
    found = set[str]()
    for capacity in (None, CAPACITY):
        held = dict[str, Tensor]()
        for entry in entries_of(loaded, {}, static=False, kind=None, length=None, capacity=capacity):
            held |= capture(entry, CompileOptions.parse({"pipeline": "exact"})).weights()
        assert held.keys() == state.keys()
        found.add(describe_model("tiny", held)["fingerprint"])
    assert len(found) == 1


class AllLogits(LlamaForCausalLM):  # type: ignore[misc]
    """A model that cannot be asked for the logits of its last token alone, with the cache's older name."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        cache = {cache_name(super()): past_key_values}
        return super().forward(input_ids, position_ids=position_ids, use_cache=use_cache, **cache)


def test_a_model_that_gives_all_logits_and_names_its_cache_as_before() -> None:
    module = tiny().module
    other = AllLogits(module.config).eval()
    other.load_state_dict(module.state_dict())
    for model in (module, other):
        prefill, decode = decoder_entries(model, dynamic=True, capacity=CAPACITY, in_place=True, last=True)
        with torch.no_grad():
            (logits, *_), (step,) = (entry.module(*entry.tensors) for entry in (prefill, decode))
            whole = module(prefill.tensors[0]).logits
            torch.testing.assert_close(logits, whole[:, -1:], rtol=1e-5, atol=1e-5)
            before = module(torch.cat([prefill.tensors[0][:, :13], decode.tensors[0]], 1)).logits
            torch.testing.assert_close(step, before[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """The model's own tokens where weights are kept, its answer in 4 and 8 bits; its tokenizer."""
    loaded = resolve("smollm2")
    tokens = loaded.tokenizer("The capital of Italy is", return_tensors="pt")
    how = without_stop(max_new_tokens=24)
    module: Any = loaded.module
    want = module.generate(**tokens, generation_config=how)
    for pipeline in ("exact", "cpu-int4"):
        folder = tmp_path / pipeline
        manifest = tw.export(loaded, pipeline=pipeline, path=folder, format="pt2", capacity=64)
        stored = [manifest["files"][f"{row['name']}.safetensors"]["bytes"] for row in manifest["entries"]]
        assert stored[1] < 0.001 * stored[0], "decode has the weights of prefill"
        if pipeline == "cpu-int4":
            found = manifest["entries"][0]["parity"]["example"]
            assert 0 < found["program"] < 2 * found["rounding"], "steps of int8 explain the distance"
        ours = tw.load_language_model(folder)
        got = ours.generate(**tokens, generation_config=how)
        assert "Rome" in ours.tokenizer.decode(got[0])
        if pipeline == "exact":
            assert got.tolist() == want.tolist()
