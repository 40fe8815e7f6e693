"""Block influence and perplexity without layers equal what the plain model gives with its modules deleted."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tilewright.compiler.diagnostics import CaptureError, FactError, LoadError, OptionError
from tilewright.compiler.influence import Influence
from tilewright.compiler.pipeline import Pipeline
from tilewright.frontends.influence import measure_influence, perplexities_without

LAYERS = 4


def _llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def _calls() -> list[Any]:
    ids = torch.randint(40, (3, 1, 23), generator=torch.Generator().manual_seed(1))
    return [((), {"input_ids": row, "use_cache": False}) for row in ids]


@torch.no_grad()
def _perplexity(model: nn.Module, dropped: list[int]) -> float:
    shorter: Any = copy.deepcopy(model)
    for i in sorted(dropped, reverse=True):
        del shorter.model.layers[i]
    losses = [shorter(labels=k["input_ids"], **k).loss for _, k in _calls()]
    return math.exp(float(sum(losses) / len(losses)))


@torch.no_grad()
def test_influence_and_both_orders_equal_the_obvious_way() -> None:
    model = _llama()
    found = measure_influence(model, _calls(), count=3, pool=LAYERS)
    states = [model(output_hidden_states=True, **k).hidden_states for _, k in _calls()]
    # The last hidden state stands behind the final norm: its cosine is not that of the last layer.
    for i in range(LAYERS - 1):
        x, y = (torch.cat([s[j] for s in states], 1).flatten(0, 1) for j in (i, i + 1))
        want = 1 - float(torch.cosine_similarity(x, y, dim=-1).mean())
        assert found.influence[i] == pytest.approx(want, abs=1e-5)
        assert found.gain[i] == pytest.approx(
            float(y.square().mean().sqrt() / x.square().mean().sqrt()), 1e-4
        )
    assert found.tokens == 3 * 23
    assert found.perplexity == pytest.approx(_perplexity(model, []), rel=1e-4)
    ranked = sorted(range(LAYERS), key=found.influence.__getitem__)
    assert [n for n, _ in found.orders["influence"]] == ranked[:3]
    dropped: list[int] = []
    for layer, ratio in found.orders["perplexity"]:
        best = {i: _perplexity(model, [*dropped, i]) for i in range(LAYERS) if i not in dropped}
        assert layer == min(best, key=best.__getitem__)
        assert ratio == pytest.approx(best[layer] / found.perplexity, rel=1e-4)
        dropped.append(layer)
    for n, (_, ratio) in enumerate(found.orders["influence"], 1):
        assert ratio == pytest.approx(_perplexity(model, ranked[:n]) / found.perplexity, rel=1e-4)


def _shifted(model: Any, dropped: list[int]) -> tuple[Any, dict[int, torch.Tensor]]:
    """The model with the dropped layers replaced by the mean difference to the whole model's stream."""
    whole, shorter = [], copy.deepcopy(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *got: whole[-1].append(got[2]))
    for _, k in _calls():
        whole.append([])
        model(**k)
    for layer in model.model.layers:
        layer._forward_hooks.clear()
    shifts: dict[int, torch.Tensor] = {}
    for n in sorted(dropped):
        entries: list[torch.Tensor] = []
        shorter.model.layers[n].forward = lambda x, *_, into=entries, **__: into.append(x) or x
        for _, k in _calls():
            shorter(**k)
        shifts[n] = (torch.cat([w[n] for w in whole], 1) - torch.cat(entries, 1)).mean((0, 1))
        shorter.model.layers[n].forward = lambda x, *_, by=shifts[n], **__: x + by
    return shorter, shifts


@torch.no_grad()
def test_the_shifted_order_restores_the_mean() -> None:
    """Each step drops the best layer of all, with every shift found anew from the shallowest on."""
    model = _llama(2)
    found = measure_influence(model, _calls(), count=3, rules=("perplexity", "shifted"), pool=LAYERS)
    plain = measure_influence(model, _calls(), count=3, rules=("perplexity",), pool=LAYERS)
    assert found.orders["perplexity"] == plain.orders["perplexity"], "the other rule has no shifts"
    dropped: list[int] = []
    for k, (layer, ratio) in enumerate(found.orders["shifted"], 1):
        ratios = {}
        for n in set(range(LAYERS)) - set(dropped):
            shorter, _ = _shifted(model, [*dropped, n])
            ratios[n] = _perplexity(shorter, []) / found.perplexity
        assert layer == min(ratios, key=ratios.__getitem__)
        assert ratio == pytest.approx(ratios[layer], rel=1e-4)
        dropped.append(layer)
        shifts = found.shifts_of(k)
        assert list(shifts) == dropped
        for n, want in _shifted(model, dropped)[1].items():
            torch.testing.assert_close(shifts[n][0], want, rtol=1e-3, atol=1e-4)
    assert dropped != sorted(dropped), "a shift of before changed"


def test_files_are_whole_and_of_this_model(tmp_path: Path) -> None:
    found = measure_influence(_llama(), _calls(), count=2, rules=("influence", "shifted"), source="test")
    found.save(tmp_path / "a.json")
    assert Influence.load(tmp_path / "a.json") == found
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    for change, message in (
        ({"format": "x"}, "no importance data"),
        ({"gain": "x"}, "damaged"),
        ({"influence": [None]}, "damaged"),
        ({"orders": {"influence": [[9, 1.0]]}}, "does not exist"),
        ({"more": 1}, "damaged"),
        ({"shifts": found.shifts[:1]}, "shifts and order do not belong together"),
        ({"shifts": [found.shifts[0], [[[math.nan]]] * 2]}, "a shift is no finite number"),
    ):
        data = json.loads((tmp_path / "a.json").read_text())
        (tmp_path / "b.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(LoadError, match=message):
            Influence.load(tmp_path / "b.json")
    with pytest.raises(LoadError, match="cannot be read"):
        Influence.load(tmp_path / "none.json")
    with pytest.raises(OptionError, match="measured for 2 dropped layers"):
        found.chosen(3, "influence")
    with pytest.raises(OptionError, match="measured for 0"):
        found.chosen(1, "perplexity")


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="0 samples"):
        measure_influence(_llama(), [])
    with pytest.raises(OptionError, match=f"the model has {LAYERS} layers"):
        measure_influence(_llama(), _calls(), count=LAYERS)
    plain = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    with pytest.raises(CaptureError, match="no layers"):
        measure_influence(_Taking(plain), [((), {"input_ids": torch.ones(1, 5).long()})])


class _Taking(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_pass_takes_its_layers_from_the_file(tmp_path: Path) -> None:
    from tilewright.frontends.compile import REPORTS

    model, path = _llama(), tmp_path / "layers.json"
    rules: Any = ("influence", "perplexity", "shifted")
    found = measure_influence(model, _calls(), count=2, pool=LAYERS, rules=rules)
    found.save(path)

    def compiled(target: nn.Module, options: str) -> Any:
        torch._dynamo.reset()
        text = f"drop-layers{{{options}}}"
        return torch.compile(
            target, backend="tilewright", options={"pipeline": text, "lower": "eager", "kernels": False}
        )

    ids = _calls()[0][1]["input_ids"]
    with torch.no_grad():
        for rule in ("influence", "perplexity"):
            shorter: Any = copy.deepcopy(model)
            for i in sorted(found.chosen(2, rule)[0], reverse=True):
                del shorter.model.layers[i]
            want = shorter(ids, use_cache=False).logits
            options = f"count=2,importance={path},rule={rule},max_share=0.5,max_ppl_ratio=1e9"
            torch.testing.assert_close(compiled(model, options)(ids, use_cache=False).logits, want)
        notes = " ".join(REPORTS[-1].passes[-1].notes)
        assert f"perplexity x {found.chosen(2, 'perplexity')[1]:.3f}" in notes
        moved, _ = _shifted(model, found.chosen(2, "shifted")[0])
        options = f"count=2,importance={path},rule=shifted,max_share=0.5,max_ppl_ratio=1e9"
        torch.testing.assert_close(
            compiled(model, options)(ids, use_cache=False).logits, moved(ids, use_cache=False).logits
        )
        louder: Any = copy.deepcopy(model)
        first = found.chosen(1, "influence")[0][0]
        gain = found.gain[first]
        louder.model.layers[first].forward = lambda x, *_, **__: x * gain
        options = f"count=1,importance={path},rule=influence,max_ppl_ratio=1e9,keep_variance=true"
        got = compiled(model, options)(ids, use_cache=False).logits
        torch.testing.assert_close(got, louder(ids, use_cache=False).logits)
        found.orders["perplexity"][1] = (found.orders["perplexity"][1][0], 2.0)
        worse = tmp_path / "worse.json"
        found.save(worse)
        for other, options, message in (
            (_llama(7), f"count=1,importance={path}", "of another model"),
            (model, f"count=2,importance={worse},max_share=0.5", "perplexity grew 2.000 times"),
            (model, f"count=3,importance={path},max_share=0.5", "measured for 2"),
        ):
            with pytest.raises(Exception, match=message) as caught:
                compiled(other, options)(ids, use_cache=False)
            chain = [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
            assert any(isinstance(e, (OptionError, FactError)) for e in chain)
        for options, message in (
            ("count=1", "importance"),
            (f"importance={path}", "count"),
            (f"count=1,importance={path},layers=2", "layers"),
            ("keep_variance=true,layers=1", "importance"),
            ("layers=1,max_ppl_ratio=0.5", "max_ppl_ratio"),
            ("layers=1,rule=shifted", "rule"),
            (f"count=1,importance={path},rule=shifted,keep_variance=true", "rule"),
            (f"count=1,importance={path},rule=shifted,part=mlp", "rule"),
        ):
            with pytest.raises(OptionError, match=message):
                Pipeline.parse(f"drop-layers{{{options}}}")
    torch._dynamo.reset()


@torch.no_grad()
def test_perplexity_without_given_layers() -> None:
    model = _llama()
    found = list(perplexities_without(model, _calls(), [(2,), (0, 1), (1, 3)]))
    assert [layers for layers, _ in found] == [(), (2,), (0, 1), (1, 3)]
    for layers, perplexity in found:
        assert perplexity == pytest.approx(_perplexity(model, list(layers)), rel=1e-5)
    with pytest.raises(OptionError, match="expected different numbers, 0 to 3"):
        list(perplexities_without(model, _calls(), [(4,)]))
