"""Every zoo model builds, runs and calls what its configuration says: counts come from the configuration, and
are held here against the torch functions that the eager model really calls."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tilewright.tools.zoo_entry import COUNTED, ZooEntry, counts, right_padding
from tilewright.tools.zoo_models import entries, select

RMS_NORM = re.compile(r"(RMSNorm|RMSNormGated|T5LayerNorm)$")
DECOMPOSED_LAYER_NORM = re.compile(r"^Cohere2?LayerNorm$")
MATMULS = {"linear", "addmm", "matmul", "__matmul__", "mm", "bmm"}


class Observed(TorchFunctionMode):
    """Counts the torch functions behind the counted ops while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls = Counter(dict.fromkeys(("attention", "linear", "rms_norm", "layer_norm", "embedding"), 0))
        self._matrices = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 2}
        for module in model.modules():
            name = type(module).__name__
            wraps_norm = any(RMS_NORM.search(type(child).__name__) for child in module.children())
            if RMS_NORM.search(name) and not wraps_norm:
                module.register_forward_hook(lambda *_: self.calls.update(["rms_norm"]))
            elif DECOMPOSED_LAYER_NORM.search(name):
                module.register_forward_hook(lambda *_: self.calls.update(["layer_norm"]))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "multi_head_attention_forward":
            # One attention; q alone, k and v in one product, the output.
            self.calls.update({"attention": 1, "linear": 3})
        elif name == "scaled_dot_product_attention" or (name == "softmax" and args[0].dim() >= 3):
            self.calls["attention"] += 1
        elif name in MATMULS:
            operands = [a for a in args if isinstance(a, torch.Tensor)]
            self.calls["linear"] += any(a.untyped_storage().data_ptr() in self._matrices for a in operands)
        elif name in ("layer_norm", "embedding"):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def run(entry: ZooEntry) -> tuple[list[torch.Tensor], Counter[str]]:
    model = entry.build()
    args, kwargs = entry.inputs()
    observed = Observed(model)
    with torch.no_grad(), observed:
        out = model(*args, **kwargs)
    assert isinstance(out, tuple)
    return tree_leaves(out), observed.calls


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.name)
def test_model_runs_and_calls_what_its_configuration_says(entry):
    outputs, calls = run(entry)
    for output in outputs:
        assert output.dtype == torch.float32
        assert output.isfinite().all()
        assert output.std() > 0.01, "outputs so flat that a wrong rewrite would not show"
    if entry.gathers:
        del calls["attention"]  # one call a sample; one attention for us
    assert dict(calls) == {op: entry.expected[op] for op in calls}


@pytest.mark.parametrize("name", ["qwen3-moe", "mamba2", "deberta-v2", "whisper", "swin", "flux"])
def test_building_twice_gives_the_same_model(name):
    (entry,) = select([name])
    first, second = run(entry)[0], run(entry)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_zoo_is_as_broad_as_it_claims():
    families = Counter(entry.family for entry in entries())
    assert sum(families.values()) - families["diffusion"] >= 45
    assert families["diffusion"] >= 8


def test_select_by_name_and_family():
    assert [e.name for e in select(["gpt2", "llama"])] == ["llama", "gpt2"]
    assert {e.family for e in select(["diffusion"])} == {"diffusion"}
    with pytest.raises(ValueError, match="no zoo model or family 'lama'; did you mean llama"):
        select(["lama"])


def test_counts_add_up_and_refuse_unknown_ops():
    total = counts((3, {"linear": 7, "attention": 1}), (1, {"linear": 1}))
    assert tuple(total) == COUNTED
    assert (total["linear"], total["attention"], total["rope"]) == (22, 3, 0)
    with pytest.raises(ValueError, match="conv"):
        counts((1, {"conv": 1}))


def test_padding_leaves_a_token_in_every_row():
    mask = right_padding(5, 3)
    assert mask.sum(-1).tolist() == [3, 2, 1, 1, 1]
