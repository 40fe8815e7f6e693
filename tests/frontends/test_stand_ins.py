"""Linear maps in the place of dropped layers, fitted, chosen and put in: a plain model edited by hand."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from tilewright.compiler.diagnostics import LoadError, OptionError
from tilewright.compiler.pipeline import Pipeline
from tilewright.compiler.stand_in import RidgeSums, StandIns, stretches
from tilewright.frontends.compile import REPORTS
from tilewright.frontends.influence import measure_influence
from tilewright.frontends.stand_ins import measure_stand_ins

LAYERS, RIDGE = 6, 0.05


def _llama(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _calls(samples: int = 9) -> list[Any]:
    ids = torch.randint(40, (samples, 1, 31), generator=torch.Generator().manual_seed(1))
    return [((), {"input_ids": row, "use_cache": False}) for row in ids]


def _least_squares(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, ridge: float) -> Any:
    """W [C, K] and b [C] from one stacked system: the ridge as rows of its own."""
    x, y, root = x.double(), y.double(), weight.double().sqrt()[:, None]
    mean_x, mean_y = ((root**2 * v).sum(0) / (root**2).sum() for v in (x, y))
    centred = root * (x - mean_x)
    by = ridge * centred.square().sum(0).mean()
    rows = torch.cat([centred, by.sqrt() * torch.eye(x.shape[1]).double()])
    right = torch.cat([root * (y - mean_y), torch.zeros(x.shape[1], y.shape[1]).double()])
    w = torch.linalg.lstsq(rows, right, driver="gelsd").solution
    return w.T, mean_y - mean_x @ w


@torch.no_grad()
def _edited(model: Any, layers: list[int], calls: list[Any], ridge: float) -> Any:
    """The model without these layers, each down projection in front of a gap moved; from the first on."""
    shorter = copy.deepcopy(model)
    streams: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    handles = [
        layer.register_forward_hook(lambda m, a, out, i=i: streams[i].append(out))
        for i, layer in enumerate(model.model.layers)
    ]
    for _, k in calls:
        model(**k)
    for handle in handles:
        handle.remove()
    for first, last in stretches(layers):
        read: list[torch.Tensor] = []
        entries: list[torch.Tensor] = []
        front = shorter.model.layers[first - 1]
        hooks = [
            front.mlp.down_proj.register_forward_pre_hook(lambda m, a, into=read: into.append(a[0])),
            front.register_forward_hook(lambda m, a, out, into=entries: into.append(out)),
        ]
        for _, k in calls:
            shorter(**k)
        for hook in hooks:
            hook.remove()
        x, entry, want = (torch.cat(v, 1)[0] for v in (read, entries, streams[last]))
        w, b = _least_squares(x, want - entry, 1 / want.double().square().mean(1), ridge)
        moved = nn.Linear(x.shape[1], entry.shape[1])
        moved.weight.copy_(front.mlp.down_proj.weight + w.float())
        moved.bias.copy_(b)
        front.mlp.down_proj = moved
        for n in range(first, last + 1):
            shorter.model.layers[n].forward = lambda x, *_, **__: x
    return shorter


@torch.no_grad()
def _perplexity(model: nn.Module, calls: list[Any]) -> float:
    losses = [model(labels=k["input_ids"], **k).loss for _, k in calls]
    return math.exp(float(sum(losses) / len(losses)))


def _compiled(model: nn.Module, options: str, behind: str = "") -> Any:
    torch._dynamo.reset()
    text = f"drop-layers{{{options},rule=linear,max_share=0.7,max_ppl_ratio=1e9}}{behind}"
    return torch.compile(
        model, backend="tilewright", options={"pipeline": text, "lower": "eager", "kernels": False}
    )


def test_ridge_sums_are_the_stacked_system() -> None:
    make = torch.Generator().manual_seed(3)
    x, y = torch.randn(50, 7, generator=make), torch.randn(50, 3, generator=make)
    weight = torch.rand(50, generator=make)
    sums = RidgeSums(7, 3)
    for part in torch.arange(50).split(13):
        sums.take(x[part], y[part], weight[part])
    for got, want in zip(sums.solve(0.2), _least_squares(x, y, weight, 0.2), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert stretches([7, 2, 3, 9, 8]) == [(2, 3), (7, 9)]


@torch.no_grad()
def test_the_best_stretch_is_chosen_on_held_out_samples() -> None:
    model, calls = _llama(), _calls()
    found = measure_stand_ins(model, calls, held=2, count=2, pool=LAYERS, ridges=(RIDGE, 1.0), source="test")
    ratios = {
        (first, ridge): _perplexity(_edited(model, [first, first + 1], calls[:-2], ridge), calls[-2:])
        / _perplexity(model, calls[-2:])
        for first in range(1, LAYERS - 1)
        for ridge in (RIDGE, 1.0)
    }
    best = min(range(1, LAYERS - 1), key=lambda n: ratios[n, RIDGE])
    assert found.dropped() == [best, best + 1]
    ridge = min((RIDGE, 1.0), key=lambda r: ratios[best, r])
    assert found.ridge == ridge
    assert found.ratio == pytest.approx(ratios[best, ridge], rel=1e-4)
    assert (found.tokens, found.layers, found.source) == (7 * 31, LAYERS, "test")
    again = measure_stand_ins(model, calls, held=2, count=2, pool=LAYERS, ridges=(RIDGE, 1.0))
    for one, other in zip(found.maps[0].maps[0], again.maps[0].maps[0], strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[2, 3], [1, 3, 4]])
def test_the_pass_is_the_model_edited_by_hand(layers: list[int], tmp_path: Path) -> None:
    """A map for each stretch, the second fitted behind the first; no node is added."""
    model, calls, path = _llama(), _calls(), tmp_path / "maps"
    measure_stand_ins(model, calls, held=2, layers=layers, ridges=(RIDGE,)).save(path)
    edited, ids = _edited(model, layers, calls[:-2], RIDGE), _calls(1)[0][1]["input_ids"]
    options = f"count={len(layers)},importance={path}"
    got = _compiled(model, options)(ids, use_cache=False).logits
    torch.testing.assert_close(got, edited(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    report = REPORTS[-1].passes[-1]
    assert len(report.applied) == len(layers)
    folded = [note for note in report.notes if "no multiplication more" in note]
    assert len(folded) == len(stretches(layers))
    assert f"model.layers.{layers[0] - 1}.mlp.down_proj.weight" in " ".join(folded)
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    before = [layer.keys.clone() for layer in cache.layers]
    want = edited(ids[:, 5:6], past_key_values=copy.deepcopy(cache), use_cache=True).logits
    step = _compiled(model, options)(ids[:, 5:6], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(step, want, rtol=1e-4, atol=1e-4)
    same = [torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True)]
    assert same == [n in layers for n in range(LAYERS)]


class _Tapped(nn.Module):
    """Returns the stream in front of layer 2 too, so that nothing may be folded into what makes it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        base = self.inner.model
        x, positions = base.embed_tokens(input_ids), torch.arange(input_ids.shape[1])[None]
        angles, seen = base.rotary_emb(x, positions), []
        for layer in base.layers:
            seen.append(x)
            x = layer(x, position_embeddings=angles, position_ids=positions, use_cache=use_cache)
        return self.inner.lm_head(base.norm(x)), seen[2]


@torch.no_grad()
def test_what_cannot_be_folded_is_a_linear_layer_of_its_own(tmp_path: Path) -> None:
    """Behind a stream that is returned, and in the place of the first layer, which has nothing in front."""
    model, calls, path = _llama(), _calls(), tmp_path / "maps"
    ids = calls[0][1]["input_ids"]
    tapped = _Tapped(model)
    measure_stand_ins(tapped, calls, held=2, layers=[2, 3], ridges=(RIDGE,)).save(path)
    edited = _Tapped(_edited(model, [2, 3], calls[:-2], RIDGE))
    got, stream = _compiled(tapped, f"count=2,importance={path}")(ids, use_cache=False)
    torch.testing.assert_close(got, edited(ids, use_cache=False)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stream, tapped(ids, use_cache=False)[1], rtol=1e-5, atol=1e-5)
    notes = " ".join(REPORTS[-1].passes[-1].notes)
    assert "a linear layer [24, 40] stands in" in notes
    assert "no multiplication more" not in notes
    found = measure_stand_ins(model, calls, held=2, layers=[0], ridges=(RIDGE,))
    found.save(path)
    assert not found.maps[0].front
    rows = [(k["input_ids"], model(output_hidden_states=True, **k).hidden_states) for _, k in calls[:-2]]
    x, want = (torch.cat([states[i] for _, states in rows], 1)[0] for i in (0, 1))
    w, b = _least_squares(x, want - x, 1 / want.double().square().mean(1), RIDGE)
    hand = copy.deepcopy(model)
    hand.model.layers[0].forward = lambda x, *_, **__: x + x @ w.float().T + b.float()
    got = _compiled(model, f"count=1,importance={path}")(ids, use_cache=False).logits
    torch.testing.assert_close(got, hand(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert "a linear layer [24, 24] stands in" in " ".join(REPORTS[-1].passes[-1].notes)


@torch.no_grad()
def test_a_folded_map_is_quantized_with_its_weight(tmp_path: Path) -> None:
    """quantize-linear behind it packs the moved weight, as of the model edited by hand."""
    model, calls, path = _llama(), _calls(), tmp_path / "maps"
    ids = calls[0][1]["input_ids"]
    measure_stand_ins(model, calls, held=2, layers=[2, 3], ridges=(RIDGE,)).save(path)
    behind = "quantize-linear{weight=int8,group=0,activation=none}"
    got = _compiled(model, f"count=2,importance={path}", f",{behind}")(ids, use_cache=False).logits
    edited = _edited(model, [2, 3], calls[:-2], RIDGE)
    torch._dynamo.reset()
    options = {"pipeline": behind, "lower": "eager", "kernels": False}
    want = torch.compile(edited, backend="tilewright", options=options)(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (want - edited(ids, use_cache=False).logits).abs().max() > 1e-2, "int8 does something"


def test_files_are_whole_and_of_this_model(tmp_path: Path) -> None:
    model, path, other = _llama(), tmp_path / "maps", tmp_path / "other"
    found = measure_stand_ins(model, _calls(), held=2, layers=[1, 3], ridges=(RIDGE,), source="test")
    found.save(path)
    back = StandIns.load(path)
    assert back.dropped() == [1, 3]
    assert [one.front for one in back.maps] == [True, True]
    for one, two in zip(found.maps, back.maps, strict=True):
        for a, b in zip(one.maps[0], two.maps[0], strict=True):
            assert torch.equal(a, b)
    names = ("fingerprint", "layers", "ratio", "ridge", "tokens", "source")
    assert all(getattr(back, n) == getattr(found, n) for n in names)
    assert [p.name for p in tmp_path.iterdir()] == ["maps"]
    with safe_open(path, framework="pt") as file:
        head, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    inner = json.loads(head["statistics"])
    turned = [dict(inner["maps"][1]), dict(inner["maps"][0])]
    for change, more, message in (
        ({"format": "x"}, {}, "no linear maps"),
        ({"statistics": json.dumps({**inner, "maps": turned})}, {}, "not behind those of before"),
        ({"statistics": json.dumps({**inner, "layers": 3})}, {}, "do not exist"),
        ({"statistics": json.dumps({**inner, "ratio": math.nan})}, {}, "no finite number"),
        ({"statistics": json.dumps({**inner, "maps": 1})}, {}, "damaged"),
        ({"statistics": "{"}, {}, "damaged"),
        ({}, {"0.0.bias": torch.zeros(3)}, r"map 0 has shapes \[24, 40\], \[3\]"),
        ({}, {"1.0.weight": torch.full((24, 40), math.inf)}, "map 1 is not finite"),
    ):
        save_file({**tensors, **more}, other, metadata={**head, **change})
        with pytest.raises(LoadError, match=message):
            StandIns.load(other)
    other.write_text("{}")
    with pytest.raises(LoadError, match="no linear maps"):
        StandIns.load(other)
    with pytest.raises(LoadError, match="cannot be read"):
        StandIns.load(tmp_path / "none")


@torch.no_grad()
def test_what_does_not_go_together_is_an_error(tmp_path: Path) -> None:
    model = _llama()
    path, orders, wide, worse = (tmp_path / name for name in ("maps", "orders", "wide", "worse"))
    calls = _calls(4)
    found = measure_stand_ins(model, calls, held=1, layers=[2, 3], ridges=(RIDGE,))
    found.save(path)
    measure_influence(model, calls, count=2).save(orders)
    weight, bias = found.maps[0].maps[0]
    found.maps[0] = replace(found.maps[0], maps=((weight[:, :7].clone(), bias),))
    found.save(wide)
    found.maps[0], found.ratio = replace(found.maps[0], maps=((weight, bias),)), 2.0
    found.save(worse)
    for target, options, message in (
        (_llama(7), f"count=2,importance={path}", "linear maps are of another model"),
        (model, f"count=3,importance={path}", "count = 3: .* holds linear maps for 2 layers"),
        (model, f"count=2,importance={orders}", "holds no linear maps"),
        (model, f"count=2,importance={wide}", r"the file maps \[\(24, 7\)\], the model has \[\(24, 40\)\]"),
    ):
        with pytest.raises(Exception, match=message):
            _compiled(target, options)(calls[0][1]["input_ids"], use_cache=False)
    for options, message in (
        (f"count=2,rule=perplexity,importance={path}", "holds no importance data"),
        (f"count=2,rule=linear,importance={worse},max_share=0.5", "perplexity grew 2.000"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            torch.compile(
                model,
                backend="tilewright",
                options={"pipeline": f"drop-layers{{{options}}}", "lower": "eager"},
            )(calls[0][1]["input_ids"], use_cache=False)
    for options, message in (
        (f"layers=1,rule=linear,importance={path}", "importance"),
        (f"count=1,importance={path},rule=linear,keep_variance=true", "rule"),
        (f"count=1,importance={path},rule=linear,part=mlp", "rule"),
    ):
        with pytest.raises(OptionError, match=message):
            Pipeline.parse(f"drop-layers{{{options}}}")
    for given, message in (
        ({"held": 4}, "expected fewer held than samples"),
        ({"held": 1, "ridges": (0.0,)}, "ridges above 0"),
        ({"held": 1, "count": LAYERS}, "expected 1 to 5"),
        ({"held": 1, "layers": [1, 9]}, "expected different numbers, 0 to 5"),
    ):
        with pytest.raises(OptionError, match=message):
            measure_stand_ins(model, calls, **given)  # type: ignore[arg-type]
