"""Calibration: what is collected, that it repeats, is saved whole, and is refused where it does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tilewright.compiler.calibration import LayerStatistics, Statistics
from tilewright.compiler.described_tensors import read_described, write_described
from tilewright.compiler.diagnostics import CaptureError, FactError, LoadError, OptionError
from tilewright.compiler.paging import page_out
from tilewright.frontends.calibration import calibrate, token_windows


class Model(nn.Module):
    """An embedding, a norm with a gain, two projections and one more behind an activation."""

    def __init__(self, seed: int = 0, vocabulary: int = 11) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding(vocabulary, 8)
        self.norm = nn.RMSNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, tokens):
        return self.down(self.up(self.norm(self.table(tokens))).relu())


def calls(seed: int = 1, count: int = 3, vocabulary: int = 11):
    generator = torch.Generator().manual_seed(seed)
    return [((torch.randint(0, vocabulary, (2, 6), generator=generator),), {}) for _ in range(count)]


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return calibrate(Model(), calls(), hessian=True, source="unit test")


def inputs_of_down(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.up(model.norm(model.table(a[0]))).relu().reshape(-1, 16) for a, _ in calls()])


def test_what_is_collected(statistics):
    assert set(statistics.layers) == {"up.weight", "down.weight"}
    assert (statistics.samples, statistics.vocabulary, statistics.source) == (3, 11, "unit test")
    layer, x = statistics.layers["down.weight"], inputs_of_down(Model())
    assert layer.tokens == 36
    assert torch.allclose(layer.absmax, x.abs().amax(0), rtol=1e-6)
    assert layer.hessian is not None
    assert torch.allclose(layer.hessian, x.double().t() @ x.double(), rtol=1e-6)
    assert bool((layer.upper <= layer.absmax).all())
    assert layer.basis == ""


def test_it_repeats_bit_for_bit_and_reports_progress(statistics):
    seen = []
    again = calibrate(Model(), calls(), hessian=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert again.fingerprint == statistics.fingerprint
    for path, layer in statistics.layers.items():
        assert torch.equal(layer.absmax, again.layers[path].absmax)
        assert torch.equal(layer.hessian, again.layers[path].hessian)


class Wide(nn.Module):
    """Two layers that read 256 channels: their second moments are half a megabyte."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.left, self.right = nn.Linear(256, 96, bias=False), nn.Linear(256, 64, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x):
        return self.left(x).sum() + self.right(x.tanh()).sum()


def test_scratch_files_change_no_bit(tmp_path):
    torch.manual_seed(0)
    given = [((torch.randn(9, 256),), {}) for _ in range(3)]
    pipeline = "rotate-hadamard"
    in_memory = calibrate(Wide(), given, hessian=True, pipeline=pipeline, scratch=None)
    filed = calibrate(Wide(), given, hessian=True, pipeline=pipeline, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
    for path, layer in in_memory.layers.items():
        assert not page_out(layer.hessian)
        assert page_out(filed.layers[path].hessian), "a file holds it"
        assert torch.equal(filed.layers[path].hessian, layer.hessian)
        assert torch.equal(filed.layers[path].absmax, layer.absmax)
    for found in (in_memory, filed):
        found.save(tmp_path / "stats")
        back = Statistics.load(tmp_path / "stats")
        assert all(torch.equal(back.layers[p].hessian, v.hessian) for p, v in in_memory.layers.items())


def test_files_are_as_those_of_the_library(tmp_path):
    """Read by it, and with the same data at the same places."""
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(2, 2, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.0),
        "c": torch.arange(7, dtype=torch.uint8),
    }
    write_described(tmp_path / "ours", "some-format", {"x": "\u00fc"}, tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "some-format", "statistics": "{}"})
    ours, theirs = ((tmp_path / n).read_bytes() for n in ("ours", "theirs"))
    begins = [8 + int.from_bytes(data[:8], "little") for data in (ours, theirs)]
    assert ours[begins[0] :] == theirs[begins[1] :]
    heads = [json.loads(data[8:begin]) for data, begin in zip((ours, theirs), begins, strict=True)]
    assert {k: v for k, v in heads[0].items() if k in tensors} == {k: heads[1][k] for k in tensors}
    assert begins[0] % 8 == 0
    with read_described(tmp_path / "ours", "some-format", missing="", remedy="") as (data, file):
        assert data == {"x": "\u00fc"}
        assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())


def test_it_is_saved_whole(statistics, tmp_path):
    path = tmp_path / "stats.safetensors"
    statistics.save(path)
    statistics.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    back = Statistics.load(path)
    assert back.fingerprint == statistics.fingerprint
    assert (back.samples, back.vocabulary, back.quantile) == (3, 11, statistics.quantile)
    for name, layer in statistics.layers.items():
        other = back.layers[name]
        assert (other.basis, other.tokens) == (layer.basis, layer.tokens)
        assert torch.equal(other.absmax, layer.absmax)
        assert torch.equal(other.upper, layer.upper)
        assert torch.equal(other.hessian, layer.hessian)


class Branches(nn.Module):
    """Two layers that read one value, and one that is called on two."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.left, self.right, self.twice = (nn.Linear(8, n, bias=False) for n in (4, 6, 8))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x):
        return self.left(x) + self.right(x).sum() + self.twice(self.twice(x)).sum()


def test_layers_that_read_one_value_share_its_statistics(tmp_path):
    torch.manual_seed(0)
    given, model = [((torch.randn(5, 8),), {}) for _ in range(2)], Branches()
    found = calibrate(model, given, hessian=True)
    left, right, twice = (found.layers[f"{n}.weight"] for n in ("left", "right", "twice"))
    assert left.hessian is right.hessian
    x = torch.cat([a[0] for a, _ in given]).double()
    assert torch.allclose(left.hessian, x.t() @ x, rtol=1e-6)
    again = x @ model.twice.weight.detach().double().t()
    assert torch.allclose(twice.hessian, x.t() @ x + again.t() @ again, rtol=1e-5)
    path = tmp_path / "stats"
    found.save(path)
    with safe_open(path, framework="pt") as file:
        assert len([name for name in file.keys() if name.endswith("hessian")]) == 2  # noqa: SIM118
    back = Statistics.load(path)
    assert back.layers["left.weight"].hessian is back.layers["right.weight"].hessian
    assert torch.equal(back.layers["right.weight"].hessian, right.hessian)


def test_damaged_files_are_one_error(statistics, tmp_path):
    whole = tmp_path / "whole"
    statistics.save(whole)
    data = whole.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "empty": b"", "text": b"no statistics here"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoadError, match=name):
            Statistics.load(tmp_path / name)
    with pytest.raises(LoadError, match="cannot be read"):
        Statistics.load(tmp_path / "absent")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(LoadError, match="is no calibration file"):
        Statistics.load(tmp_path / "other")
    row = {"path": "p", "basis": "", "tokens": 1}
    head = {"fingerprint": "f", "vocabulary": 1, "samples": 1, "source": "", "quantile": 0.9, "layers": [row]}
    alike = {**head, "layers": [row | {"like": 0}]}
    for broken in (alike, {**head, "layers": 3}, {k: v for k, v in head.items() if k != "samples"}, [], head):
        metadata = {"format": "tilewright-calibration-1", "statistics": json.dumps(broken)}
        save_file({"a": torch.zeros(1)}, tmp_path / "odd", metadata=metadata)
        with pytest.raises(LoadError, match="damaged"):
            Statistics.load(tmp_path / "odd")


def test_values_that_are_not_finite_are_an_error():
    layer = LayerStatistics("")
    with pytest.raises(FactError, match="not finite"):
        layer.observe(torch.tensor([[1.0, float("nan")]]), quantile=0.9, hessian=False)


def test_bad_requests():
    with pytest.raises(OptionError, match="no samples"):
        calibrate(Model(), [])
    with pytest.raises(OptionError, match="quantile"):
        calibrate(Model(), calls(), quantile=2.0)
    with pytest.raises(OptionError, match="nowhere.*No such file"):
        calibrate(Model(), calls(), scratch="/nowhere")
    with pytest.raises(CaptureError, match="no linear layer"):
        calibrate(nn.ReLU(), [((torch.ones(2, 2),), {})])


class Tokenizer:
    def __call__(self, text, **_):
        return {"input_ids": torch.arange(len(text))[None]}


def test_windows_of_a_text():
    found, source = token_windows(Tokenizer(), "x" * 20, length=4, samples=3, first=5)
    assert [c[1]["input_ids"][0].tolist()[0] for c in found] == [5, 9, 13]
    assert source.endswith("tokens 5-17")
    with pytest.raises(OptionError, match="the text has 20"):
        token_windows(Tokenizer(), "x" * 20, length=8, samples=3)
    found, source = token_windows(Tokenizer(), "x" * 20, length=4, samples=2, first=1, every=3)
    assert [call[1]["input_ids"].tolist() for call in found] == [[[1, 2, 3, 4]], [[13, 14, 15, 16]]]
    assert source.endswith("tokens 1-17, one window in 3")
    with pytest.raises(OptionError, match="every = 4, need 21 tokens; the text has 20"):
        token_windows(Tokenizer(), "x" * 20, length=4, samples=2, first=1, every=4)
