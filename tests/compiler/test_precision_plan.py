"""Mixed precision: the choice is the best under its budget, holds on other data, and survives as a file."""

from __future__ import annotations

import itertools

import pytest
import torch

from tilewright.compiler import Pipeline, RunOptions, ops
from tilewright.compiler.calibration import Observer, Statistics, fingerprint, vocabulary_of
from tilewright.compiler.diagnostics import FactError, LoadError, OptionError
from tilewright.compiler.passes_base import Example, Tensor
from tilewright.compiler.precision_plan import (
    KEEP,
    Choice,
    LayerChoices,
    PrecisionPlan,
    choose,
    measure,
    output_error,
    plan_of,
)
from tilewright.compiler.selftest import capture_example

FORMATS = (
    "int8.0.symmetric.none.blocks8",
    "int4.32.float-zero.none.blocks8",
    "int4.0.symmetric.none.blocks8",
    "int2.32.float-zero.none.blocks8",
)


def random_layers(seed: int, count: int = 5) -> list[LayerChoices]:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for i in range(count):
        sizes = sorted(torch.randint(10, 100, (3,), generator=generator).tolist(), reverse=True)
        errors = sorted((torch.rand(3, generator=generator) * 0.1).tolist())
        rest = [Choice(f"f{k}", s, e) for k, (s, e) in enumerate(zip(sizes, errors, strict=True))]
        layers.append(LayerChoices(f"layer{i}", (Choice(KEEP, 200, 0.0), *rest)))
    return layers


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(seed):
    """Against every combination: 4^5 of them."""
    layers = random_layers(seed)
    every = list(itertools.product(*[layer.choices for layer in layers]))
    max_bytes, max_error = 400, 0.03
    small = choose(layers, max_bytes=max_bytes)
    assert sum(d.choice.bytes for d in small) <= max_bytes
    least = min(sum(c.error for c in row) for row in every if sum(c.bytes for c in row) <= max_bytes)
    assert sum(d.choice.error for d in small) == pytest.approx(least, abs=1e-9)
    good = choose(layers, max_error=max_error)
    mean = sum(d.choice.error for d in good) / len(layers)
    assert mean <= max_error
    fewest = min(
        sum(c.bytes for c in row) for row in every if sum(c.error for c in row) <= max_error * len(layers)
    )
    assert sum(d.choice.bytes for d in good) == fewest


def test_budgets_that_cannot_be_met():
    layers = random_layers(0)
    with pytest.raises(OptionError, match="max_bytes = 10: no choice of formats meets it, the least is"):
        choose(layers, max_bytes=10)
    with pytest.raises(OptionError, match="either"):
        choose(layers, max_bytes=10, max_error=0.1)
    with pytest.raises(OptionError, match="either"):
        choose(layers)
    with pytest.raises(OptionError, match="no layers"):
        choose([], max_bytes=10)
    assert {d.choice.format for d in choose(layers, max_error=0.0)} == {KEEP}


def model():
    """Four layers of 64 channels, of which the later ones have outlier weights."""

    def run(x, *weights):
        for weight in weights:
            x = torch.tanh(ops.linear(x, weight))
        return x

    weights = tuple(Tensor(64, 64, gain=0.2, weight=True) for _ in range(4))
    program = capture_example(Example(run, (Tensor(256, 64, gain=1.0), *weights)))
    for i, value in enumerate(program.example_inputs[1:]):
        value[:, :2] *= 4.0**i
    return program


def observed(program, x):
    found = Statistics(fingerprint(program), vocabulary_of(program))
    Observer(program, found, hessian=True).run(x, *program.example_inputs[1:])
    return found


def test_error_is_the_share_of_output_energy():
    weight, x = torch.randn(5, 8), torch.randn(40, 8)
    rounded = weight + 0.1 * torch.randn(5, 8)
    want = (x @ (rounded - weight).t()).square().sum() / (x @ weight.t()).square().sum()
    got = output_error(weight, rounded, (x.double().t() @ x.double()))
    assert got == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_the_error_budget_holds_on_held_out_data(seed):
    program = model()
    generator = torch.Generator().manual_seed(seed)
    layers = measure(program, observed(program, torch.randn(256, 64, generator=generator)), FORMATS)
    assert [len(layer.choices) for layer in layers] == [5] * 4
    budget = 0.004
    decisions = choose(layers, max_error=0.9 * budget)
    held_out = measure(program, observed(program, torch.randn(256, 64, generator=generator)), FORMATS)
    by_path = {layer.path: {c.format: c.error for c in layer.choices} for layer in held_out}
    assert sum(by_path[d.path][d.choice.format] for d in decisions) / 4 <= budget
    assert len({d.choice.format for d in decisions}) > 1, "one format for all would be no mixture"


def test_a_plan_goes_through_its_file_into_the_program(tmp_path):
    program = model()
    layers = measure(program, observed(program, program.example_inputs[0]), FORMATS)
    decisions = choose(layers, max_bytes=sum(layer.choices[0].bytes for layer in layers) // 5)
    plan = plan_of(decisions, fingerprint=fingerprint(program), budget="a fifth")
    plan.save(tmp_path / "plan.toml")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.toml"]
    assert PrecisionPlan.load(tmp_path / "plan.toml") == plan
    assert "would be" in decisions[0].reason
    (report,) = Pipeline.parse(f"quantize-plan{{plan={tmp_path / 'plan.toml'}}}").run(program, RunOptions())
    assert [a.rule for a in report.applied] == [f for f in plan.layers.values() if f != KEEP]
    packed = sum(d.choice.bytes for d in decisions if d.choice.format != KEEP)
    assert sum(b.numel() for b in program.module.buffers() if b.dtype == torch.uint8) == packed


def test_a_plan_of_another_model_is_refused(tmp_path):
    PrecisionPlan(fingerprint="0" * 64).save(tmp_path / "plan.toml")
    with pytest.raises(FactError, match="another model"):
        Pipeline.parse(f"quantize-plan{{plan={tmp_path / 'plan.toml'}}}").run(model(), RunOptions())


def test_statistics_without_hessians_are_refused():
    program = model()
    found = Statistics(fingerprint(program), 0)
    Observer(program, found).run(*program.example_inputs)
    with pytest.raises(FactError, match="no Hessian"):
        measure(program, found, FORMATS)
    with pytest.raises(OptionError, match="weight format"):
        measure(program, found, ("int7",))
    with pytest.raises(OptionError, match="the step of static activations is no part of a plan"):
        measure(program, found, ("int8.0.symmetric.int8-static.blocks8",))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = [", "is no TOML file"),
        ("a = 1\n", "is no precision plan"),
        ('format = "tilewright-precision-1"\nlayers = 3\n', "is no precision plan"),
        ('format = "tilewright-precision-1"\n[layers]\n"a" = "int9.0.x"\n', "layer 'a'"),
        (
            'format = "tilewright-precision-1"\n[layers]\n"a" = "int8.0.symmetric.int8-static.rows"\n',
            "no part of a plan",
        ),
    ],
)
def test_files_that_are_no_plans(tmp_path, text, reason):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(LoadError, match=reason):
        PrecisionPlan.load(tmp_path / "plan.toml")
    with pytest.raises(LoadError, match="cannot be read"):
        PrecisionPlan.load(tmp_path / "absent.toml")
