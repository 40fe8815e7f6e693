"""smooth-scales and smooth-rotate on a decoder with statistics: exact, flatter, only with the right file."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler import Pipeline, Program, RunOptions, ops
from tilewright.compiler.calibration import Observer, Statistics
from tilewright.compiler.diagnostics import FactError, OptionError, PipelineError
from tilewright.compiler.float64 import Float64
from tilewright.compiler.replay import tensors_in
from tilewright.compiler.schema import arguments
from tilewright.compiler.smoothing import scales
from tilewright.frontends.calibration import calibrate
from tilewright.frontends.capture import from_dynamo, normalize
from tilewright.frontends.loaders import resolve
from tilewright.passes.weights.smooth_scales import SmoothScales


@pytest.fixture(scope="module")
def program() -> Program:
    model = resolve("tiny-llama")
    args, kwargs = model.example(None, length=16)
    found: list[Program] = []

    def backend(gm, example_inputs):
        found.append(from_dynamo(gm, example_inputs))
        normalize(found[-1], RunOptions(replay=False))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.module, backend=backend)(*args, **kwargs)
    return max(found, key=lambda p: len(p.graph.nodes))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model = resolve("tiny-llama")
    with torch.no_grad():  # one massive hidden channel
        model.module.model.layers[1].mlp.up_proj.weight[7] *= 300.0
    args, kwargs = model.example(None, length=16)
    found = calibrate(model.module, [(args, kwargs)])
    path = tmp_path_factory.mktemp("calibration") / "tiny.safetensors"
    found.save(path)
    return path


@pytest.fixture(scope="module")
def spiked(program) -> Program:
    """The program with the same massive channel."""
    copy = program.clone()
    for i, spec in enumerate(copy.inputs):
        if spec.source == "model.layers.1.mlp.up_proj.weight":
            copy.example_inputs[i] = copy.example_inputs[i].detach().clone()
            copy.example_inputs[i][7] *= 300.0
    return copy


def run(program: Program, pipeline: str) -> Program:
    after = program.clone()
    after.reports = Pipeline.parse(pipeline).run(after, RunOptions(replay=False))  # type: ignore[attr-defined]
    want = tensors_in(Float64(program).run_on(program.example_inputs))
    got = tensors_in(Float64(after).run_on(after.example_inputs))
    assert max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)) <= 1e-10
    return after


def channels(program: Program, path: str) -> torch.Tensor:
    """Largest magnitude of each channel of a layer's input."""
    observed = Statistics("")
    Observer(program, observed).run(*program.example_inputs)
    return observed.layers[path].absmax


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_hidden_channels_get_flatter_and_the_function_stays(spiked, file):
    before = channels(spiked, DOWN)
    smoothed = run(spiked, f"smooth-scales{{calibration={file},norms=false}}")
    rotated = run(spiked, "rotate-hadamard{r1=false,r2=false}")
    both = run(spiked, f"smooth-rotate{{calibration={file}}}")
    assert len(smoothed.reports[0].applied) == 2
    flatter = channels(smoothed, DOWN)
    assert flatter.max() / flatter.mean() < 0.2 * before.max() / before.mean()
    turned, smoothed_first = channels(rotated, DOWN), channels(both, DOWN)
    assert smoothed_first.max() < 0.5 * turned.max() < 0.5 * before.max()


def test_norm_sites_and_the_whole_composition(spiked, file):
    both = run(spiked, f"smooth-scales{{calibration={file}}}")
    assert len(both.reports[0].applied) == 6
    whole = run(spiked, f"smooth-rotate{{calibration={file}}},fold-norm-scale,rotate-hadamard{{r4=false}}")
    rules = [a.rule for a in whole.reports[-1].applied]
    assert rules.count("r1") == 1
    assert rules.count("r2") == 2


def test_folding_first_leaves_no_place_in_the_norms(spiked, file):
    after = run(spiked, f"fold-norm-scale,smooth-scales{{calibration={file}}}")
    assert len(after.reports[1].applied) == 2
    assert {r.reason for r in after.reports[1].refused} >= {"it has no gain to hold the scales"}


def test_the_gate_is_not_smoothed(spiked, file):
    after = run(spiked, f"smooth-scales{{calibration={file},norms=false}}")
    gates = [arguments(n)["gate"] for n in after.graph.nodes if n.target is ops.gated_mlp]
    assert all(arguments(g)["weight"].op == "placeholder" for g in gates)


def test_a_calibration_of_another_model_is_refused(program, file):
    with pytest.raises(FactError, match="of another model"):
        Pipeline.parse(f"smooth-scales{{calibration={file}}}").run(program.clone(), RunOptions(replay=False))


def test_a_calibration_of_another_vocabulary_is_refused(spiked, file, tmp_path):
    found = Statistics.load(file)
    found.vocabulary = 99
    found.save(tmp_path / "other")
    with pytest.raises(FactError, match="vocabulary of 99"):
        Pipeline.parse(f"smooth-scales{{calibration={tmp_path / 'other'}}}").run(spiked.clone(), RunOptions())


def test_a_calibration_of_another_basis_is_refused(spiked, file, tmp_path):
    found = Statistics.load(file)
    for layer in found.layers.values():
        layer.basis = "rotate-hadamard"
    found.save(tmp_path / "other")
    with pytest.raises(FactError, match="behind the same passes"):
        Pipeline.parse(f"smooth-rotate{{calibration={tmp_path / 'other'}}}").run(spiked.clone(), RunOptions())


def test_options():
    with pytest.raises(OptionError, match="needs a calibration file"):
        SmoothScales()
    with pytest.raises(OptionError, match="expected 0 to 1"):
        SmoothScales(alpha=1.5, calibration="x")
    with pytest.raises(PipelineError, match="must come after smooth-scales"):
        Pipeline.parse("rotate-hadamard,smooth-scales{alpha=0}")


def test_scales_stay_finite():
    weight = torch.tensor([[0.0, 2.0], [0.0, -4.0]])
    found = scales((weight,), torch.tensor([0.0, 9.0]), 0.5)
    assert torch.allclose(found, torch.tensor([1.0, 1.5], dtype=torch.float64))
    assert torch.allclose(
        scales((weight, 2 * weight), None, 0.0)[1:], torch.tensor([0.125], dtype=torch.float64)
    )
