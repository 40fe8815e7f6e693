"""quantize-linear on a small language model: what it takes, what it leaves, how it composes, GPTQ."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilewright.compiler import Example, RunOptions, Tensor, ops
from tilewright.compiler.calibration import Observer, Statistics, fingerprint, vocabulary_of
from tilewright.compiler.diagnostics import FactError, LoadError, OptionError, PipelineError
from tilewright.compiler.float_format import parse_format
from tilewright.compiler.pipeline import Pipeline
from tilewright.compiler.report import Report
from tilewright.compiler.selftest import capture_example
from tilewright.compiler.selftest import run as values_of
from tilewright.compiler.weight_format import WeightFormat
from tilewright.frontends.calibration import calibrate
from tilewright.frontends.compile import REPORTS

TOKENS = (torch.arange(3, 43)[None] * 7) % 128


class Layer(torch.nn.Module):
    """The seven linear layers of a decoder layer: three read one input, two another. No attention."""

    def __init__(self) -> None:
        super().__init__()
        linear = partial(torch.nn.Linear, bias=False)
        self.q, self.k, self.v, self.o = linear(96, 96), linear(96, 32), linear(96, 32), linear(96, 96)
        self.gate, self.up, self.down = linear(96, 160), linear(96, 160), linear(160, 96)
        self.norm, self.late = torch.nn.RMSNorm(96), torch.nn.RMSNorm(96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.o(torch.sigmoid(self.q(h)) * torch.cat((self.k(h), self.v(h), self.k(h)), -1))
        h = self.late(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Small(torch.nn.Module):
    """Two layers between an embedding and a head that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = torch.nn.Embedding(128, 96), torch.nn.ModuleList([Layer(), Layer()])
        self.head = torch.nn.Linear(96, 128, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(6)
    return Small().eval()


def run(model: torch.nn.Module, pipeline: str, **options: Any) -> tuple[torch.Tensor, Report]:
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="tilewright", options={"pipeline": pipeline, "lower": "eager", **options}
    )
    with torch.no_grad():
        logits = compiled(TOKENS)
    return logits, REPORTS[-1]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def exact(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)


def applied(report: Report, name: str) -> list[Any]:
    return [a for p in report.passes if p.name == name for a in p.applied]


def refused(report: Report) -> list[str]:
    return [r.reason for p in report.passes if p.name == "quantize-linear" for r in p.refused]


def test_it_takes_every_layer_but_the_head_and_shares_inputs(model: torch.nn.Module) -> None:
    want = exact(model)
    got, report = run(model, "exact,quantize-linear{weight=int8,activation=int8-token}")
    assert len(applied(report, "quantize-linear")) == 14
    assert len(applied(report, "fuse-projections")) == 4
    assert [r for r in refused(report) if "a head stays" in r]
    assert 1e-4 < error(got, want) < 0.05
    kernels = [row["op"] for row in report.kernels if row["kernel"].startswith("quantized")]
    assert kernels.count("quantized_linear_multi") == 4
    assert kernels.count("quantized_linear") == 4


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        # A last bit of x can move an activation to the next code, so the two differ by a few such steps.
        ("weight=int4,group=32,mode=float-zero,activation=int8-group", 1e-3),
        ("weight=int3,group=64,mode=float-zero,rounding=hqq", 1e-5),
    ],
)
def test_the_kernels_compute_the_definition(model: torch.nn.Module, options: str, bound: float) -> None:
    pipeline = f"exact,quantize-linear{{{options}}}"
    got, _ = run(model, pipeline)
    want, report = run(model, pipeline, kernels=False)
    assert all(row["why"] for row in report.kernels)
    assert error(got, want) < bound < 0.1 * error(want, exact(model))


def test_errors_fall_with_the_bits(model: torch.nn.Module) -> None:
    want = exact(model)
    errors = [
        error(run(model, f"exact,quantize-linear{{weight=int{b},group=32,mode=float-zero}}")[0], want)
        for b in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 < errors[0]


@pytest.mark.parametrize(
    ("options", "low", "high", "bits"),
    [
        ("weight=fp8-e4m3", 0.005, 0.1, 8.5),
        ("weight=fp8-e5m2,per_tensor=true", 0.01, 0.2, 8.5),
        ("weight=fp8-e4m3,group=32,activation=fp8-token", 0.005, 0.15, 9.1),
        ("weight=nvfp4", 0.02, 0.4, 5.1),
    ],
)
def test_small_floats(model: torch.nn.Module, options: str, low: float, high: float, bits: float) -> None:
    """All layers take them, what is kept is as small as said, and their inputs are shared."""
    got, report = run(model, f"exact,quantize-linear{{{options}}}")
    assert len(applied(report, "quantize-linear")) == 14
    assert len(applied(report, "fuse-projections")) == 4
    assert low < error(got, exact(model)) < high
    form = parse_format(applied(report, "quantize-linear")[0].rule)
    weight = model.layers[0].gate.weight.detach()
    packed = form.pack_weight(weight)
    assert packed.dtype == torch.uint8
    assert 8 * packed.numel() / weight.numel() < bits


def test_sixteen_bits_change_no_bit(model: torch.nn.Module) -> None:
    got, report = run(model, "quantize-linear{weight=int16}", kernels=False)
    assert torch.equal(got, run(model, "dead-code", kernels=False)[0])
    assert not applied(report, "quantize-linear")
    assert any("stays as it is" in note for p in report.passes for note in p.notes)


def test_the_head_on_request_and_nothing_twice(model: torch.nn.Module) -> None:
    body = "quantize-linear{weight=int4,group=32,mode=float-zero}"
    _, report = run(model, f"{body},quantize-linear{{weight=int8,head=true}}")
    assert [a.rule for a in applied(report, "quantize-linear")].count("int8.0.symmetric.none.blocks8") == 1
    assert sum("quantized already: int4" in r for r in refused(report)) == 14


def test_a_changed_weight_is_packed_again(model: torch.nn.Module) -> None:
    torch._dynamo.reset()
    options = {"pipeline": "quantize-linear{weight=int8}", "lower": "eager"}
    compiled = torch.compile(model, backend="tilewright", options=options)
    with torch.no_grad():
        before = compiled(TOKENS).clone()
        model.layers[0].down.weight.mul_(3.0)
        after = compiled(TOKENS)
    assert error(after, before) > 0.01
    assert error(after, exact(model)) < 0.02


def test_weights_that_are_not_finite_are_left(model: torch.nn.Module) -> None:
    model.layers[1].up.weight.data[0, 0] = float("inf")
    _, report = run(model, "quantize-linear{weight=int4,group=32}")
    assert len(applied(report, "quantize-linear")) == 13
    assert [r for r in refused(report) if "holds 1 NaN or infinite" in r]


def test_options_are_checked_before_any_model_is_seen() -> None:
    for text, said in (
        ("quantize-linear{group=48}", "option 'group' = 48: expected a multiple of 32"),
        ("quantize-linear{weight=int5}", "int5"),
        ("quantize-linear{weight=fp8-e4m3,activation=int8-token}", "goes with activation=none or fp8-token"),
        ("quantize-linear{weight=nvfp4,activation=fp8-token}", "goes with activation=none"),
        ("quantize-linear{activation=fp8-token}", "fp8 activations go with fp8 weights, not with int8"),
        ("quantize-linear{weight=nvfp4,group=32}", "nvfp4 has a scale per 16 columns"),
        ("quantize-linear{weight=fp8-e5m2,group=48}", "expected a multiple of 32"),
        ("quantize-linear{weight=fp8-e5m2,mode=float-zero}", "has no offsets"),
        ("quantize-linear{weight=fp8-e4m3,group=32,per_tensor=true}", "not both"),
        ("quantize-linear{per_tensor=true}", "fp8 may have one in all"),
        ("quantize-linear{weight=nvfp4,rounding=gptq}", "is rounded to nearest"),
        ("quantize-linear{weight=fp8-e4m4}", "fp8-e4m3"),
        ("quantize-linear{activation=int8-group}", "the weight has no groups"),
        ("quantize-linear{rounding=hqq}", "needs mode=float-zero"),
        ("quantize-linear{weight=int4,rounding=whole-zero}", "whole zero points need mode=float-zero"),
        ("quantize-linear{mode=float-zero,rounding=whole-zero}", "4 bits or fewer"),
        ("quantize-linear{dynamic_above=4}", "goes with activation=int8-static"),
        ("quantize-linear{activation=int8-static,calibration=a.st,dynamic_above=0.5}", "expected 1 or more"),
        ("quantize-linear{rounding=gptq}", "a calibration file goes with rounding=gptq"),
        ("quantize-linear{calibration=a.st}", "a calibration file goes with rounding=gptq"),
    ):
        with pytest.raises(OptionError) as raised:
            Pipeline.parse(text)
        assert said in str(raised.value)
    with pytest.raises(PipelineError):
        Pipeline.parse("fuse-projections,quantize-linear")


def calibrated(model: torch.nn.Module, path: Path, **more: Any) -> Any:
    statistics = calibrate(model, [((TOKENS,), {})], **more)
    statistics.save(path)
    return statistics


def test_static_activations_lie_on_the_calibrated_grid(model: torch.nn.Module, tmp_path: Path) -> None:
    statistics = calibrated(model, tmp_path / "s.safetensors")
    pipeline = (
        f"quantize-linear{{activation=int8-static,calibration={tmp_path}/s.safetensors}},fuse-projections"
    )
    got, report = run(model, pipeline)
    assert report.applied("quantize-linear") == 14
    assert report.applied("fuse-projections") == 4
    kernels = [row["kernel"] for row in report.kernels if "quantized_linear" in row["op"]]
    assert len(kernels) == 8
    assert all(kernels), "none is left to the definition"
    copy = Small().eval()
    copy.load_state_dict(model.state_dict())
    for name, layer in copy.named_modules():
        if not isinstance(layer, torch.nn.Linear) or name == "head":
            continue
        step = statistics.layers[f"{name}.weight"].absmax.max() / 127
        row = layer.weight.data.abs().amax(1, keepdim=True) / 127
        layer.weight.data = torch.round(layer.weight.data / row) * row

        def on_grid(_: Any, given: Any, step: torch.Tensor = step) -> Any:
            return (torch.clamp(torch.round(given[0] * (1 / step)), -127, 127) * step,)

        layer.register_forward_pre_hook(on_grid)
    with torch.no_grad():
        want, plain = copy(TOKENS), model(TOKENS)
    # A last bit of x can move an activation to the next code: few do, so the typical logit is far closer.
    assert error(want, plain) > 3e-3
    assert error(got, want) < 0.05 * error(want, plain)
    assert float((got - want).abs().median()) < 1e-3 * float((want - plain).abs().median())


def test_a_range_that_few_tokens_set_is_left_to_scales_per_token(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    """One token drives the input of one layer far beyond the others': that layer alone stays dynamic."""
    down = model.layers[1].down
    with torch.no_grad():
        state = model.layers[0](model.embed(TOKENS))
        wanted = model.layers[1].late(state)[0, 5]
        model.layers[1].up.weight[3] = 200 * wanted / wanted.norm()
        model.layers[1].gate.weight[3] = 200 * wanted / wanted.norm()
        down.weight[:, 3] *= 1e-3
    statistics = calibrated(model, tmp_path / "s.safetensors")
    spread = {name: float(layer.absmax.max()) / layer.typical for name, layer in statistics.layers.items()}
    outlier = max(spread, key=lambda name: spread[name])
    assert outlier == "layers.1.down.weight"
    rest = max(v for name, v in spread.items() if name != outlier)
    assert 1.0 < rest < 0.5 * spread[outlier]
    scheme = f"quantize-linear{{activation=int8-static,calibration={tmp_path}/s.safetensors"
    got, report = run(model, f"{scheme},dynamic_above={2 * rest:.3f}}}")
    rules = [a.rule for a in applied(report, "quantize-linear")]
    assert rules.count("int8.0.symmetric.int8-token.blocks8") == 1
    assert rules.count("int8.0.symmetric.int8-static.blocks8") == 13
    assert error(got, exact(model)) < error(run(model, scheme + "}")[0], exact(model))
    old = statistics.layers["layers.0.q.weight"]
    old.typical = 0.0
    statistics.save(tmp_path / "old.safetensors")
    with pytest.raises(Exception, match="does not say what a token"):
        run(model, scheme.replace("/s.", "/old.") + ",dynamic_above=9}")


@pytest.mark.parametrize(
    "more",
    [
        "rounding=gptq",
        "activation=int8-static",
        "rounding=gptq,activation=int8-static",
        "activation=int4-token",
    ],
)
def test_the_reference_of_what_is_calibrated(more: str, tmp_path: Path) -> None:
    """The pass and its reference agree; the reference without what the calibration says would not."""

    def two(x: Any, w: Any, v: Any) -> Any:
        return ops.linear(ops.linear(x, w).relu(), v).relu()

    weights = (Tensor(24, 40, weight=True), Tensor(13, 24, weight=True))
    program = capture_example(Example(two, (Tensor(64, 40), *weights)))
    statistics = Statistics(fingerprint(program), vocabulary_of(program))
    Observer(program, statistics, hessian=True).run(*program.example_inputs)
    statistics.save(tmp_path / "s.safetensors")
    file = "" if "int4" in more else f",calibration={tmp_path}/s.safetensors"
    pipeline = Pipeline.parse(f"quantize-linear{{weight=int4,{more}{file}}}")
    reference = program.clone()
    pipeline.run(program, RunOptions())
    pipeline.passes[0].reference(reference)
    x = 2 * torch.randn(9, 40, generator=torch.Generator().manual_seed(1))  # beyond what was calibrated
    given = [x, *program.example_inputs[1:]]
    (got,), (want,) = (values_of(p, given) for p in (program, reference))
    assert error(got, want) < 1e-5
    plain = Pipeline.parse("quantize-linear{weight=int4}").passes[0]
    other = capture_example(Example(two, (Tensor(64, 40), *weights)))
    plain.reference(other)
    assert error(values_of(other, given)[0], want) > 1e-3


def test_four_bit_activations(model: torch.nn.Module) -> None:
    got, report = run(model, "quantize-linear{activation=int4-token}")
    eight, _ = run(model, "quantize-linear{activation=int8-token}")
    assert report.applied("quantize-linear") == 14
    plain = exact(model)
    errors = [float((x - plain).square().mean()) for x in (got, eight)]
    assert 30 < errors[0] / errors[1] < 3000, "16 times coarser: 256 times the squared error"
    assert all(row["kernel"] for row in report.kernels if "quantized_linear" in row["op"])
    want, _ = run(model, "quantize-linear{activation=int4-token}", kernels=False)
    assert float((got - want).abs().median()) < 1e-3 * float((want - plain).abs().median())


def test_gptq_beats_rounding_to_nearest(model: torch.nn.Module, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    calls: list[Any] = [((torch.randint(0, 128, (4, 64), generator=generator),), {})]
    calibrate(model, calls, hessian=True).save(tmp_path / "h.safetensors")
    calibrate(model, calls).save(tmp_path / "none.safetensors")
    want = exact(model)
    scheme = "quantize-linear{weight=int3,group=0,mode=float-zero"
    near, _ = run(model, scheme + "}")
    got, _ = run(model, f"{scheme},rounding=gptq,calibration={tmp_path}/h.safetensors}}")
    assert error(got, want) < 0.85 * error(near, want)
    assert F.mse_loss(got, want) < F.mse_loss(near, want)
    with pytest.raises(Exception, match="no Hessian") as raised:
        run(model, f"{scheme},rounding=gptq,calibration={tmp_path}/none.safetensors}}")
    assert isinstance(raised.value, FactError) or isinstance(
        getattr(raised.value, "inner_exception", None), FactError
    )
    with pytest.raises(Exception, match="cannot be read") as raised:
        run(model, f"{scheme},rounding=gptq,calibration={tmp_path}/absent.safetensors}}")
    assert isinstance(raised.value, LoadError) or isinstance(
        getattr(raised.value, "inner_exception", None), LoadError
    )


@pytest.mark.parametrize("form", [WeightFormat(4, 32, "float-zero"), WeightFormat(8, 0, "symmetric")])
def test_a_large_weight_is_packed_in_pieces_as_in_one(form, monkeypatch) -> None:
    from tilewright.passes.quantize import _linear_weights

    weight = torch.randn(83, 96, generator=torch.Generator().manual_seed(0))
    packed = []
    for piece in (1 << 20, 96 * 16):
        monkeypatch.setattr(_linear_weights, "_PIECE", piece)
        packed.append(_linear_weights.pack_weight(weight, form=form, rounding="rtn"))
    assert torch.equal(*packed)
