"""A decode step on fewer channels equals the model with its weights cut by hand, over the whole cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from tilewright.compiler.calibration import Statistics
from tilewright.compiler.diagnostics import OptionError
from tilewright.frontends.calibration import calibrate
from tilewright.frontends.speculate import speculate
from tilewright.passes.skip.prune_width_for_decode import PruneWidthForDecode

WIDTH, INNER, LAYERS = 32, 48, 2
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


SLOW = partial(pytest.param, marks=pytest.mark.slow)


def _llama(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER} | changes
    config = LlamaConfig(
        vocab_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **sizes,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.rand_like(weight) + 0.5)
    return model


def _samples() -> list[Any]:
    ids = torch.randint(40, (3, 1, 11), generator=torch.Generator().manual_seed(1))
    return [((), {"input_ids": row, "use_cache": False}) for row in ids]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "llama.safetensors"
    calibrate(_llama(), _samples(), means=True).save(path)
    return path


def _compiled(model: Any, **options: Any) -> Any:
    text = ",".join(f"{k}={v}" for k, v in options.items())
    torch._dynamo.reset()
    how = {"pipeline": f"prune-width-for-decode{{{text}}}", "lower": "eager", "kernels": False}
    return torch.compile(model, backend="tilewright", options=how, dynamic=False)


@torch.no_grad()
def _steps(whole: Any, step: Any, config: Any) -> list[torch.Tensor]:
    """Logits of the prompt by `whole` and of three tokens by `step`, over one cache, which comes last."""
    cache = StaticCache(config=config, max_cache_len=16)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    found = [whole(input_ids=PROMPT, past_key_values=cache, use_cache=True).logits]
    for token in (7, 8, 9):
        given = {"input_ids": torch.tensor([[token]]), "past_key_values": cache, "use_cache": True}
        found.append(step(**given).logits)
    return [*found, *(layer.keys.clone() for layer in cache.layers)]


@torch.no_grad()
def _importances(model: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(of the stream's channels, of each layer's inner ones, energy of each norm's input) by hooks."""
    norms = [
        n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    seen: dict[Any, list[torch.Tensor]] = {}
    hooks = [
        n.register_forward_hook(lambda m, i, o: seen.setdefault((m, "out"), []).append(o[0])) for n in norms
    ]
    everyone = [*norms, model.model.norm]
    hooks += [
        n.register_forward_hook(lambda m, i, o: seen.setdefault((m, "in"), []).append(i[0][0]))
        for n in everyone
    ]
    downs = [layer.mlp.down_proj for layer in model.model.layers]
    hooks += [
        d.register_forward_hook(lambda m, i, o: seen.setdefault((m, "in"), []).append(i[0][0])) for d in downs
    ]
    for args, kwargs in _samples():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    per_sample = [sum(seen[n, "out"][s].mean(0).abs() for n in norms) for s in range(len(_samples()))]
    stream = torch.stack(per_sample).norm(dim=0)
    inner = [torch.stack([x.mean(0) for x in seen[d, "in"]]).norm(dim=0) for d in downs]
    rows = [torch.cat(seen[n, "in"]) for n in everyone]
    return stream, inner, [(r.square() / r.square().mean(-1, keepdim=True)).mean(0) for r in rows]


@torch.no_grad()
def _cut(model: Any, stay: int, inside: int) -> Any:
    """The model with its weights cut by hand."""
    stream, inner, energies = _importances(model)
    kept = stream.topk(stay).indices.sort().values
    small = _llama(hidden_size=stay, intermediate_size=inside)
    small.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, kept])
    pairs = list(zip(model.model.layers, small.model.layers, strict=True))
    for i, (old, new) in enumerate(pairs):
        mid = inner[i].topk(inside).indices.sort().values
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(new.self_attn, name).weight.copy_(getattr(old.self_attn, name).weight[:, kept])
        new.self_attn.o_proj.weight.copy_(old.self_attn.o_proj.weight[kept])
        for name in ("gate_proj", "up_proj"):
            getattr(new.mlp, name).weight.copy_(getattr(old.mlp, name).weight[mid][:, kept])
        new.mlp.down_proj.weight.copy_(old.mlp.down_proj.weight[kept][:, mid])
    whole = [n for o, _ in pairs for n in (o.input_layernorm, o.post_attention_layernorm)] + [
        model.model.norm
    ]
    cut = [n for _, c in pairs for n in (c.input_layernorm, c.post_attention_layernorm)] + [small.model.norm]
    for old, new, energy in zip(whole, cut, energies, strict=True):
        new.weight.copy_(old.weight[kept] * (energy[kept].mean() / energy.mean()).sqrt())
    return small


@pytest.mark.parametrize(("hidden", "mlp"), [(0.25, 0.5), SLOW(0.25, 0.0), SLOW(0.0, 0.25)])
def test_a_step_equals_the_model_cut_by_hand_over_the_whole_models_cache(
    file: Path, hidden: float, mlp: float
) -> None:
    model = _llama()
    small = _cut(model, round(WIDTH * (1 - hidden)), round(INNER * (1 - mlp)))
    compiled = _compiled(model, hidden_ratio=hidden, mlp_ratio=mlp, multiple=4, calibration=file)
    want = _steps(model, small, model.config)
    got = _steps(compiled, compiled, model.config)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    whole = _steps(model, model, model.config)
    assert torch.equal(got[0], _steps(_compiled(model, mlp_ratio=0.0), model, model.config)[0])
    assert (got[1] - whole[1]).abs().max() > 1e-3


def test_ratio_0_is_the_model_bit_for_bit(file: Path) -> None:
    model = _llama()
    off = _compiled(model, mlp_ratio=0.0, calibration=file)
    got = _steps(off, off, model.config)
    torch._dynamo.reset()
    none = torch.compile(
        model, backend="tilewright", options={"pipeline": "", "lower": "eager", "kernels": False}
    )
    want = _steps(none, none, model.config)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_as_a_draft_the_text_is_the_targets(file: Path) -> None:
    model = _llama()
    options = {"hidden_ratio": 0.25, "mlp_ratio": 0.25, "multiple": 4, "max_tokens": 2, "calibration": file}
    fast = speculate(model, _compiled(model, **options), lengths=(3,))
    plain = speculate(model, None, lengths=())
    assert fast.generate(PROMPT, 12, stop_tokens=()) == plain.generate(PROMPT, 12, stop_tokens=())
    assert fast.statistics.drafted > 0


def test_options_out_of_range() -> None:
    for name, value in (
        ("hidden_ratio", 1.0),
        ("mlp_ratio", -0.1),
        ("multiple", 0),
        ("max_tokens", 0),
        ("calibration", ""),
    ):
        with pytest.raises(OptionError, match=name):
            PruneWidthForDecode(**{name: value})


@pytest.mark.slow
def test_calibration_that_does_not_fit(file: Path) -> None:
    other, without = file.with_name("other.safetensors"), file.with_name("without.safetensors")
    calibrate(_llama(1), _samples(), means=True).save(other)
    calibrate(_llama(), _samples()).save(without)
    assert Statistics.load(file).layers["model.layers.0.mlp.down_proj.weight"].means is not None
    for path, message in ((other, "of another model"), (without, "calibrate with --means")):
        step = _compiled(_llama(), multiple=4, mlp_ratio=0.5, calibration=path)
        with pytest.raises(BackendCompilerFailed, match=message):
            _steps(_llama(), step, _llama().config)
